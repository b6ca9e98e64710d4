"""What a builder must know about an ONNX file: its inputs, opset, tensor types, and the torch layer of each node."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from maseRT.errors import MissingError, StepError
from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.trt.layers import Origin

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto

FLOATS = ("float32", "float16", "bfloat16")

_SCOPES = "pkg.torch.onnx.name_scopes"
_PASSES_QDQ_ON = frozenset(
    {
        *("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Gelu", "HardSwish", "HardSigmoid", "Elu", "Mish"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
        *("Add", "Sub", "Mul", "Concat"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Pad", "Resize"),
    }
)
"""What TensorRT fuses into its neighbours or moves Q/DQ across."""


@dataclass(frozen=True)
class OnnxFile:
    """A parsed ONNX file.

    Attributes:
        data: the file's bytes.
        sha256: of the file.
        types_before: `node_types` before types were changed, where `data` and `model` are a rewrite of the file.
    """

    path: Path
    data: bytes
    model: ModelProto
    sha256: str
    types_before: Mapping[str, str] | None = None

    @property
    def opset(self) -> int:
        """The version of ONNX's own operator set."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs, without initializers that are listed among them."""
        constants = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(_spec(value.name, value.type) for value in self.model.graph.input if value.name not in constants)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs."""
        return tuple(_spec(value.name, value.type) for value in self.model.graph.output)

    @cached_property
    def layers(self) -> dict[str, str]:
        """Node name -> torch layer; "" for what the model computes outside of its submodules."""
        return {node.name: torch_layer(node) for node in self.model.graph.node}

    @cached_property
    def ops(self) -> dict[str, str]:
        """Node name -> operator."""
        return {node.name: node.op_type for node in self.model.graph.node}

    @property
    def origin(self) -> Origin:
        """What tells an engine's layers apart."""
        nodes = self.model.graph.node
        reads = {node.name: tuple(node.input) for node in nodes}
        makers = {tensor: node.name for node in nodes for tensor in node.output}
        return Origin(self.layers, self.ops, reads, makers)

    @cached_property
    def has_qdq(self) -> bool:
        """Whether anything is quantized."""
        return "QuantizeLinear" in self.ops.values()

    @cached_property
    def node_types(self) -> Mapping[str, str]:
        """Node name -> numpy's name of the type that its first output has in the file, where inference finds one."""
        if self.types_before is not None:
            return self.types_before
        return _node_types(self.model)

    @property
    def floats(self) -> frozenset[str]:
        """The floating-point types among the tensors."""
        return frozenset(FLOATS) & frozenset(self.node_types.values())

    def for_tensorrt_8(self) -> OnnxFile:
        """Return the file as TensorRT 8.6 reads it: without FP16 tensors, of which the types are remembered."""
        from onnx import ModelProto

        from maseRT.onnx_compat import attribute_axes, for_tensorrt_8
        from maseRT.onnx_widen import widen

        model = ModelProto()
        model.CopyFrom(self.model)
        for_tensorrt_8(model)
        types = {**_node_types(model), **self.node_types}
        attribute_axes(model.graph)
        widen(model)
        return replace(self, data=model.SerializeToString(), model=model, types_before=types)

    def float_nodes(self) -> dict[str, str]:
        """Return the floating-point nodes that quantization leaves alone, and their types.

        A node that reads a DequantizeLinear or feeds a QuantizeLinear is left out, and so are activations, pools, adds
        and the like around it: the Q/DQ pairs decide how those are computed, and TensorRT 8.6 finds no kernel for an
        INT8 layer whose neighbour has a type of its own.
        """
        left = {
            node.name: self.node_types[node.name]
            for node in self.model.graph.node
            if self.node_types.get(node.name) in FLOATS
            and node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")
        }
        return {name: kind for name, kind in left.items() if name not in self._beside_qdq}

    @cached_property
    def _beside_qdq(self) -> set[str]:
        """The nodes that read a DequantizeLinear or feed a QuantizeLinear, and what is fused with those."""
        nodes = self.model.graph.node
        maker = {name: node for node in nodes for name in node.output}
        around: dict[str, list[NodeProto]] = {node.name: [] for node in nodes}
        for node in nodes:
            for before in (maker[name] for name in node.input if name in maker):
                around[node.name].append(before)
                around[before.name].append(node)
        reached = {
            node.name
            for node in nodes
            if any(_makes(maker, name, "DequantizeLinear") for name in node.input)
            or any(each.op_type == "QuantizeLinear" and each.input[0] in node.output for each in around[node.name])
        }
        todo = list(reached)
        while todo:
            beside = (each for each in around[todo.pop()] if self.node_types.get(each.name) in FLOATS)
            found = {each.name for each in beside if each.op_type in _PASSES_QDQ_ON} - reached
            reached |= found
            todo += found
        return reached


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


def _node_types(model: ModelProto) -> dict[str, str]:
    types = _tensor_types(model)
    return {node.name: types[node.output[0]] for node in model.graph.node if node.output[0] in types}


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
