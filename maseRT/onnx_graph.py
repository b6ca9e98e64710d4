"""Reads an exported ONNX file: its Q/DQ pairs, and the precision that each torch layer was given.

Needs neither torch nor a runtime. A node's torch layer is in its metadata, where the exporter keeps the module's path.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from maseRT.errors import StepError

SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata key of a node's module path: the names of the modules from the model down, then the node's own."""

QUANTIZER = "_quantizer"
"""How the name of a module ends that stands for a Q/DQ pair."""

_RECURRENT = frozenset(("LSTM", "GRU", "RNN"))
_MATRIX = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", *_RECURRENT))
_QDQ = frozenset(("QuantizeLinear", "DequantizeLinear"))
_RESHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Identity")
_MOVING = frozenset((*_RESHAPING, "Slice", "Gather", "Concat", "Split", "Pad"))
_SHAPES = frozenset(("Shape", "Size", "Constant", "ConstantOfShape", "Range"))
_FLOATS: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class ExportedLayer:
    """How a torch layer stands in a file.

    Attributes:
        precision: int8, fp32, fp16 or bf16; several joined by "+" where its nodes differ.
        float: the type in which it hands its result on, also when it is int8: that of its scales and bias.
        nodes: its nodes, Q/DQ pairs, casts and what only moves data left out.
        products: those of them that multiply with a weight; recurrent nodes, whose products have no names, left out.
        looks_up: it takes rows of a table, as an embedding does, and nothing else.
    """

    precision: str
    float: str
    nodes: tuple[str, ...]
    products: tuple[str, ...] = ()
    looks_up: bool = False


def count_qdq(path: Path) -> int:
    """Return the number of Q/DQ pairs. One pair can serve several quantized readers of a tensor.

    Raises:
        StepError: it is missing or damaged.
    """
    return sum(node.op_type == "QuantizeLinear" for node in _load(path).graph.node)


def layer_precisions(path: Path, layers: Iterable[str] | None = None) -> dict[str, ExportedLayer]:
    """Return how each torch layer was exported, by its name; layers without nodes of their own are left out.

    A layer with weights is int8 when both operands of all its products with a weight come from DequantizeLinear nodes;
    one without, an embedding among them, is int8 when what it reads does. Otherwise its nodes' types tell.

    Args:
        path: the file.
        layers: names of modules that count as a whole, with everything inside; None takes every module by itself.

    Raises:
        StepError: the file is missing or damaged.
    """
    graph = _Graph(_load(path))
    wanted = None if layers is None else set(layers)
    nodes: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        layer = _layer_of(node, wanted)
        if layer is not None:
            nodes.setdefault(layer, []).append(node)
    found = {layer: graph.exported(members) for layer, members in nodes.items()}
    return {layer: exported for layer, exported in found.items() if exported is not None}


def _layer_of(node: NodeProto, wanted: set[str] | None) -> str | None:
    """Return the module that a node belongs to; a quantizer's nodes belong to the module that holds it."""
    scopes = scopes_of(node)
    modules = [name for name in scopes[:-1] if not name.endswith(QUANTIZER)]
    if wanted is None:
        return modules[-1] if modules else None
    return next((name for name in reversed(modules) if name in wanted), None)


def scopes_of(node: NodeProto) -> list[str]:
    """Return the modules that a node was exported from, from the model down, and its own name; [] where untold."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes = ast.literal_eval(entry.value)
            return [str(name) for name in scopes]
    return []


class _Graph:
    """A model's nodes with their producers and tensor types."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self._makers = {name: node for node in self.nodes for name in node.output if name}
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = (*graph.input, *graph.value_info, *graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {weight.name: weight.data_type for weight in graph.initializer}
        self._constants = dict.fromkeys((weight.name for weight in graph.initializer), True)

    def type_of(self, name: str) -> str:
        """Return fp32, fp16, bf16, or "" for what is no float."""
        return _FLOATS.get(self._types.get(name, 0), "")

    def exported(self, nodes: list[NodeProto]) -> ExportedLayer | None:
        computing = [node for node in nodes if self._computes(node)]
        if not computing:
            return None
        products = [node for node in computing if node.op_type in _MATRIX and self._weight_of(node) is not None]
        if products:
            found = {"int8" if self._is_int8(node) else self.type_of(node.output[0]) for node in products}
        elif any(self._is_dequantized(node.input[0]) for node in computing):
            found = {"int8"}
        else:
            found = {self.type_of(node.output[0]) for node in computing}
        return ExportedLayer(
            precision="+".join(sorted(found)),
            float=self.type_of(computing[-1].output[0]),
            nodes=tuple(node.name for node in computing),
            products=tuple(node.name for node in products if node.op_type not in _RECURRENT),
            looks_up=all(self._looks_up(node) for node in computing),
        )

    def _computes(self, node: NodeProto) -> bool:
        """Whether a node makes new floating-point values from activations."""
        op = node.op_type
        if self._looks_up(node):
            return True
        if op in _QDQ or op in _MOVING or op in _SHAPES or op == "Cast" or not self.type_of(node.output[0]):
            return False
        return not all(self._is_constant(name) for name in node.input if name)

    def _looks_up(self, node: NodeProto) -> bool:
        """Whether a node takes rows of a constant table of floats, as an embedding does."""
        return (
            node.op_type == "Gather"
            and bool(self.type_of(node.output[0]))
            and self._is_constant(node.input[0])
            and not self._is_constant(node.input[1])
        )

    def _weight_of(self, node: NodeProto) -> str | None:
        """Return the operand of a product that is a constant matrix."""
        return next((name for name in node.input[:2] if self._is_constant(name)), None)

    def _is_int8(self, node: NodeProto) -> bool:
        return all(self._is_dequantized(name) for name in node.input[:2])

    def _is_dequantized(self, name: str) -> bool:
        """Whether a tensor comes from a DequantizeLinear through nothing but moved data."""
        node = self._makers.get(name)
        while node is not None and node.op_type in _MOVING and node.input:
            node = self._makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def _is_constant(self, name: str) -> bool:
        if name not in self._constants:
            node = self._makers.get(name)
            self._constants[name] = node is not None and all(self._is_constant(each) for each in node.input if each)
        return self._constants[name]


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path))
    except FileNotFoundError:
        raise StepError("no such ONNX file", where=str(path), fix="run `masert export`") from None
    except Exception as error:  # protobuf's DecodeError, or what a broken file does to onnx
        raise StepError(
            "damaged: not an ONNX file", where=str(path), fix="rebuild it with `masert export --force`"
        ) from error
