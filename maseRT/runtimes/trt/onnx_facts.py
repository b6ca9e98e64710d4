"""What a builder must know about an ONNX file: its inputs, opset, tensor types, and the torch layer of each node."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from maseRT.errors import MissingError, StepError
from maseRT.runtimes.base import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto

FLOATS = ("float32", "float16", "bfloat16")

_SCOPES = "pkg.torch.onnx.name_scopes"
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Gelu", "HardSwish", "HardSigmoid"})


@dataclass(frozen=True)
class OnnxFile:
    """A parsed ONNX file.

    Attributes:
        data: the file's bytes.
        sha256: of those bytes.
    """

    path: Path
    data: bytes
    model: ModelProto
    sha256: str

    @property
    def opset(self) -> int:
        """The version of ONNX's own operator set."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs, without initializers that are listed among them."""
        constants = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(_spec(value.name, value.type) for value in self.model.graph.input if value.name not in constants)

    @cached_property
    def layers(self) -> dict[str, str]:
        """Node name -> torch layer; "" for what the model computes outside of its submodules."""
        return {node.name: torch_layer(node) for node in self.model.graph.node}

    @cached_property
    def ops(self) -> dict[str, str]:
        """Node name -> operator."""
        return {node.name: node.op_type for node in self.model.graph.node}

    @cached_property
    def has_qdq(self) -> bool:
        """Whether anything is quantized."""
        return "QuantizeLinear" in self.ops.values()

    @cached_property
    def node_types(self) -> dict[str, str]:
        """Node name -> numpy's name of the type of its first output, where inference finds one."""
        types = _tensor_types(self.model)
        return {node.name: types[node.output[0]] for node in self.model.graph.node if node.output[0] in types}

    @property
    def floats(self) -> frozenset[str]:
        """The floating-point types among the tensors."""
        return frozenset(FLOATS) & frozenset(self.node_types.values())

    def float_nodes(self) -> dict[str, str]:
        """Return the floating-point nodes that quantization leaves alone, and their types.

        A node that reads a DequantizeLinear or feeds a QuantizeLinear is left out, and so is an activation right
        after one: the Q/DQ pairs decide how those are computed, and a type of their own would keep them from fusing.
        """
        nodes = self.model.graph.node
        maker = {name: node for node in nodes for name in node.output}
        quantized = {name for node in nodes if node.op_type == "QuantizeLinear" for name in node.input[:1]}
        reads_dq = {node.name for node in nodes if any(_makes(maker, name, "DequantizeLinear") for name in node.input)}
        left: dict[str, str] = {}
        for node in nodes:
            after = maker.get(node.input[0]) if node.input and node.op_type in _ACTIVATIONS else None
            fuses = node.name in reads_dq or quantized.intersection(node.output) or (after and after.name in reads_dq)
            kind = self.node_types.get(node.name, "")
            if kind in FLOATS and not fuses and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                left[node.name] = kind
        return left


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file.

    Raises:
        StepError: it is missing or damaged.
        MissingError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingError("onnx is not installed", where="building an engine", fix="pip install onnx") from error
    fix = "rebuild it with `masert export --force`"
    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise StepError(f"cannot read: {error.strerror}", where=str(path), fix="run `masert export` first") from error
    except Exception as error:  # protobuf's DecodeError
        raise StepError("damaged: not an ONNX file", where=str(path), fix=fix) from error
    if not model.graph.node:
        raise StepError("damaged: a graph without nodes", where=str(path), fix=fix)
    return OnnxFile(path, data, model, hashlib.sha256(data).hexdigest())


def torch_layer(node: NodeProto) -> str:
    """Return the name of the module that a node was exported from; "" for the model itself or where it is not told."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def lower_opset(model: OnnxFile, op: str, *, lowest: int) -> int | None:
    """Return the newest opset before the model's that writes `op` in another way; None if that is below `lowest`."""
    from onnx import defs

    if not defs.has(op, max_inclusive_version=model.opset, domain=""):
        return None
    older = int(defs.get_schema(op, max_inclusive_version=model.opset, domain="").since_version) - 1
    return older if older >= lowest else None


def _makes(maker: Mapping[str, NodeProto], tensor: str, op: str) -> bool:
    node = maker.get(tensor)
    return node is not None and node.op_type == op


def _tensor_types(model: ModelProto) -> dict[str, str]:
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model).graph
    types = {value.name: _dtype(value.type.tensor_type.elem_type) for value in (*graph.value_info, *graph.output)}
    return {name: dtype for name, dtype in types.items() if dtype}


def _dtype(element: int) -> str:
    from onnx import TensorProto

    if element == TensorProto.UNDEFINED:
        return ""
    name = str(TensorProto.DataType.Name(element)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _spec(name: str, kind: TypeProto) -> TensorSpec:
    tensor = kind.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return TensorSpec(name, _dtype(tensor.elem_type), shape)
