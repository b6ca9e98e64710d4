"""Finds the tensors of an ONNX graph that are the outputs of torch layers, and makes them outputs of the graph.

Neither torch nor a runtime is needed. A node's torch layer is in its metadata, where the exporter keeps the path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from maseRT.onnx_graph import QUANTIZER, scopes_of
from maseRT.plan import OUTPUT

_FLOATS = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16))
_RESHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Identity")
_NOT_COMPUTING = frozenset(
    ("QuantizeLinear", "DequantizeLinear", "Cast", *_RESHAPING, "Slice", "Gather", "Split", "Concat", "Pad", "Tile")
)


@dataclass(frozen=True)
class Outputs:
    """What can be looked at inside a graph.

    Attributes:
        tensors: layer or operation -> the tensor that is its output, in the order of execution, and OUTPUT -> that of
            the graph. The further calls of a layer are called as `call_name` says; an operation outside of layers is
            `<module>.<operator>`. A module's output can be that of its last layer, which comes first.
        before: layer or operation -> those whose outputs its own is computed from, with nothing in between.
    """

    tensors: Mapping[str, str]
    before: Mapping[str, frozenset[str]]


def call_name(layer: str, call: int) -> str:
    """Return what the output of a layer's call is called; the first is 0."""
    return f"{layer} (call {call + 1})" if call else layer


def layer_outputs(model: ModelProto) -> Outputs:
    """Return the outputs of layers and operations: floating-point tensors that depend on the input.

    A layer's output is the one tensor that its nodes hand on to others. Q/DQ pairs are part of who reads a tensor, and
    a layer with several outputs is left out.
    """
    graph = _Graph(model)
    found = {name: tensor for _, name, tensor in sorted(graph.outputs())}
    found[OUTPUT] = model.graph.output[0].name
    return Outputs(found, graph.before(found))


def with_outputs(model: ModelProto, tensors: Mapping[str, str]) -> tuple[ModelProto, dict[str, str]]:
    """Return a copy of a model that hands out further tensors, in FP32, and the outputs' names.

    Args:
        model: is not changed.
        tensors: any key -> name of a tensor of the graph.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    values = {value.name: value for value in (*_values(model), *graph.output)}
    present = {value.name for value in graph.output}
    named: dict[str, str] = {}
    for key, tensor in tensors.items():
        is_fp32 = values[tensor].type.tensor_type.elem_type == TensorProto.FLOAT
        out = tensor if is_fp32 else f"{tensor}_as_fp32"
        named[key] = out
        if out in present:
            continue
        present.add(out)
        value = graph.output.add()
        value.CopyFrom(values[tensor])
        value.name = out
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        if out != tensor:
            graph.node.append(helper.make_node("Cast", [tensor], [out], name=out, to=TensorProto.FLOAT))
    return copy, named


@dataclass
class _Call:
    """One call of a module: its nodes, which follow one another.

    Attributes:
        module: its path.
        nodes: their numbers.
    """

    module: str
    nodes: list[int] = field(default_factory=list)


class _Graph:
    def __init__(self, model: ModelProto) -> None:
        self.nodes: Sequence[NodeProto] = list(model.graph.node)
        self._last = [value.name for value in model.graph.output]
        self._types = {value.name: value.type.tensor_type.elem_type for value in _values(model)}
        self._maker = {name: number for number, node in enumerate(self.nodes) for name in node.output if name}
        self._readers: dict[str, set[int]] = defaultdict(set)
        self._modules = self._paths()
        self._live = self._depending({value.name for value in model.graph.input})
        for number, node in enumerate(self.nodes):
            if self._is_live(number):
                for name in node.input:
                    self._readers[name].add(number)

    def outputs(self) -> list[tuple[tuple[int, int], str, str]]:
        """Return (place in the order, name, tensor); of one place, the innermost module comes first."""
        found: list[tuple[tuple[int, int], str, str]] = []
        calls: dict[str, int] = defaultdict(int)
        for call in self._calls():
            count = calls[call.module]
            calls[call.module] += 1
            leaving = self._leaving(call)
            if len(leaving) == 1:
                place = (self._maker[leaving[0]], -call.module.count(".") - 1)
                found.append((place, call_name(call.module, count), leaving[0]))
        taken = {tensor for _, _, tensor in found}
        counts: dict[str, int] = defaultdict(int)
        inner = {path[-1] for path in self._modules if path}
        for number, node in enumerate(self.nodes):
            owner = self._modules[number][-1] if self._modules[number] else ""
            if not self._computes(number) or not self._is_container(owner, inner):
                continue
            base = f"{owner}.{node.op_type.lower()}" if owner else node.op_type.lower()
            count = counts[base]
            counts[base] += 1
            if node.output[0] not in taken:
                found.append(((number, 0), f"{base}_{count}" if count else base, node.output[0]))
        return found

    def before(self, tensors: Mapping[str, str]) -> dict[str, frozenset[str]]:
        """Return the edges between outputs. Those that are one tensor follow one another."""
        names: dict[str, list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            names[tensor].append(name)
        edges: dict[str, frozenset[str]] = {}
        nearest: dict[str, frozenset[str]] = {}
        for node in self.nodes:
            read = frozenset[str]().union(*(nearest.get(each, ()) for each in node.input))
            for tensor in node.output:
                here = read
                for name in names.get(tensor, ()):
                    edges[name] = here
                    here = frozenset((name,))
                nearest[tensor] = here
        return {name: edges[name] for name in tensors}

    def _paths(self) -> list[list[str]]:
        """Return the modules that each node is in, from the outermost on; one without metadata follows its input."""
        paths: list[list[str]] = []
        for node in self.nodes:
            scopes = scopes_of(node)
            path = [scope for scope in scopes[:-1] if scope]
            makers = [self._maker[name] for name in node.input if name in self._maker]
            if not scopes and makers and makers[0] < len(paths):
                path = [scope for scope in paths[makers[0]] if not scope.endswith(QUANTIZER)]
            paths.append(path)
        return paths

    def _depending(self, inputs: Collection[str]) -> set[str]:
        """Return the tensors that depend on the graph's inputs by more than their shape."""
        live = set(inputs)
        for node in self.nodes:
            if node.op_type not in ("Shape", "Size") and live.intersection(node.input):
                live.update(node.output)
        return live

    def _calls(self) -> list[_Call]:
        """Split every module's nodes into calls: between two of them, nodes of other modules run."""
        calls: list[_Call] = []
        running: dict[str, _Call] = {}
        for number, path in enumerate(self._modules):
            if not self._is_live(number):
                continue
            running = {module: call for module, call in running.items() if module in path}
            for module in path:
                if module.endswith(QUANTIZER):
                    break
                if module not in running:
                    running[module] = _Call(module)
                    calls.append(running[module])
                running[module].nodes.append(number)
        return calls

    def _leaving(self, call: _Call) -> list[str]:
        """Return the tensors that a call hands on."""
        own = set(call.nodes)
        return [
            name
            for number in call.nodes
            if not self._is_quantizer(number)
            for name in self.nodes[number].output
            if self._is_activation(name) and (name in self._last or self._readers[name] - own)
        ]

    def _computes(self, number: int) -> bool:
        node = self.nodes[number]
        return (
            node.op_type not in _NOT_COMPUTING
            and not self._is_quantizer(number)
            and len(node.output) == 1
            and self._is_activation(node.output[0])
        )

    def _is_container(self, owner: str, inner: Collection[str]) -> bool:
        """Whether a module holds others that have nodes."""
        return not owner or any(each.startswith(f"{owner}.") and not each.endswith(QUANTIZER) for each in inner)

    def _is_live(self, number: int) -> bool:
        return not self._live.isdisjoint(self.nodes[number].output)

    def _is_quantizer(self, number: int) -> bool:
        return any(module.endswith(QUANTIZER) for module in self._modules[number])

    def _is_activation(self, name: str) -> bool:
        return name in self._live and self._types.get(name) in _FLOATS


def _values(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Return every tensor whose type is known."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return [*graph.input, *graph.value_info, *graph.output]
