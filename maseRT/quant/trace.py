"""Records a model's dataflow by running it once: which layer or operation reads what which other one wrote.

Nothing is compiled and the model stays as it is: hooks see the layers, a TorchFunctionMode the functional operations,
and tensors are known by identity. So everything that runs can be recorded, and an operation's place in its owner's
forward is exact by construction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from maseRT.quant.layers import LAYERS
from maseRT.quant.operations import RESHAPING, SELECTING, joined, local_name, runs_as
from maseRT.quant.own_code import Product
from maseRT.quant.walk import Call, Frame, Walker, any_complex, tensors_in

_COMPOSITES = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
_RESHAPING_LAYERS = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)


class Kind(Enum):
    """What a node of the graph is."""

    INPUT = "input"
    LAYER = "layer"
    OPERATION = "operation"
    OUTPUT = "output"


@dataclass(frozen=True)
class Operand:
    """One tensor that a node reads.

    Attributes:
        source: the node that wrote it; None for a parameter or a constant.
        shape: its shape.
    """

    source: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One call of a layer or an operation.

    Attributes:
        index: its place in the order of execution.
        kind: layer, operation, or one of the model's ends.
        name: the layer's path, or the operation's name; several calls of one layer share it.
        op: the operation, or the layer's class.
        owner: for an operation, the module whose forward calls it.
        ordinal: for an operation, how many of the same op precede it in one forward of the owner.
        operands: the tensors it reads.
        shape: of its first result.
        floating: its first result holds floating-point numbers, or complex ones.
        module: the layer.
        constants: for an operation, its (args, kwargs) with None for tensors.
        called: for a layer, its own forward ran; else its owner's forward multiplied with its weight.
    """

    index: int
    kind: Kind
    name: str
    op: str
    owner: str
    ordinal: int
    operands: tuple[Operand, ...]
    shape: tuple[int, ...]
    floating: bool
    module: nn.Module | None = None
    constants: Any = None
    called: bool = True

    @property
    def reshapes(self) -> bool:
        """It hands on the values that it reads, only arranged in another way."""
        if self.kind is Kind.LAYER:
            return self.module is not None and is_reshaping(self.module)
        return self.kind is Kind.OPERATION and self.op in RESHAPING

    @property
    def passes(self) -> bool:
        """It hands on values that it reads, all of them or some."""
        return self.reshapes or (self.kind is Kind.OPERATION and self.op in SELECTING)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of its first operand, () where it reads no tensor, and of its first result."""
        return self.operands[0].shape if self.operands else (), self.shape

    def argument(self, position: int, name: str) -> Any:
        """Return an argument of an operation that is no tensor; None where it is not given."""
        args, kwargs = self.constants
        return args[position] if len(args) > position else kwargs.get(name)

    @property
    def signature(self) -> tuple[object, ...]:
        """What must be the same in every recording of a model without data-dependent control flow."""
        return self.kind, self.name, self.op, self.ordinal, tuple(operand.source for operand in self.operands)


@dataclass
class Graph:
    """The nodes of one run, in the order of execution: the model's input first, its output last."""

    nodes: list[Node] = field(default_factory=list)

    def source(self, node: Node, operand: int = 0) -> Node:
        """Return the node that wrote a tensor that another one reads.

        Raises:
            ValueError: the operand is a parameter or a constant.
        """
        index = node.operands[operand].source
        if index is None:
            raise ValueError(f"operand {operand} of {node.name} is a constant")
        return self.nodes[index]

    def readers(self, index: int) -> list[tuple[Node, int]]:
        """Return the (node, operand) pairs that read what a node wrote."""
        return self._readers.get(index, [])

    def calls(self, name: str) -> list[Node]:
        """Return every call of a layer."""
        return [node for node in self.nodes if node.kind is Kind.LAYER and node.name == name]

    def origin(self, index: int, through: Callable[[Node], bool]) -> Node:
        """Follow the first operand back through nodes of some kind to the node that made the values."""
        node = self.nodes[index]
        while through(node) and node.operands and node.operands[0].source is not None:
            node = self.nodes[node.operands[0].source]
        return node

    def final_readers(self, index: int, through: Callable[[Node], bool]) -> list[tuple[Node, int]]:
        """Return the pairs that read a node's result, also behind nodes of some kind."""
        found: list[tuple[Node, int]] = []
        for node, operand in self.readers(index):
            if through(node) and operand == 0:
                found += self.final_readers(node.index, through)
            else:
                found.append((node, operand))
        return found

    def same_flow(self, other: Graph) -> bool:
        """Whether two recordings ran the same calls on the same operands."""
        return [n.signature for n in self.nodes] == [n.signature for n in other.nodes]

    def operations_per_owner(self) -> dict[str, list[str]]:
        """Return the operations of each owner, in the order of execution."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            if node.kind is Kind.OPERATION:
                found.setdefault(node.owner, []).append(node.name)
        return found

    @cached_property
    def _readers(self) -> dict[int, list[tuple[Node, int]]]:
        readers: dict[int, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for position, operand in enumerate(node.operands):
                if operand.source is not None:
                    readers.setdefault(operand.source, []).append((node, position))
        return readers


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one node.

    That is a type of the table, a layer of torch.nn, one whose weight is computed, or a subclass of a type of the table
    with code of its own, as long as no other such layer is inside (a padding may be).
    """
    if type(module) in LAYERS or parametrize.is_parametrized(module):
        return True
    known = tuple(LAYERS)
    if isinstance(module, known):
        return not any(isinstance(part, known) for part in module.modules() if part is not module)
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _COMPOSITES)


def is_reshaping(layer: nn.Module) -> bool:
    """Whether a layer hands on the values that it reads, at least in eval mode, only arranged in another way."""
    return runs_as(layer, _RESHAPING_LAYERS)


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every name of every module that is no part of a layer; shared modules have several."""
    names: dict[nn.Module, list[str]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        names.setdefault(module, []).append(name)
        if is_layer(module):
            inside += (f"{name}." if name else "",)
            if not name:
                break
    return names


def record(model: nn.Module, example: Tensor) -> Graph:
    """Run the model once without gradients, in the mode it is in, and return its dataflow."""
    recorder = _Recorder(model)
    with torch.no_grad(), recorder.hooked(), recorder:
        recorder.start(example)
        recorder.finish(model(example))
    return recorder.graph


def record_stable(model: nn.Module, example: Tensor) -> tuple[Graph | None, str]:
    """Record twice on different data, and return the graph, or None and why it cannot be relied on."""
    graph = record(model, example)
    try:
        again = record(model, _other_batch(example))
    except Exception:  # a user's model; whether its batch may grow is not decided here
        again = record(model, _other_batch(example)[: len(example)])
    if graph.same_flow(again):
        return graph, ""
    return None, "the dataflow depends on the data (two batches ran different operations)"


def training_differences(model: nn.Module, example: Tensor, graph: Graph) -> tuple[set[str], str]:
    """Return the owners whose operations differ in training mode, or a note when that cannot be told."""
    try:
        trained = record(copy.deepcopy(model).train(), _other_batch(example)).operations_per_owner()
    except Exception as error:  # a user's model may refuse to be copied or trained in any way it likes
        return set(), f"could not be recorded in training mode ({type(error).__name__}: {error})"
    recorded = graph.operations_per_owner()
    return {owner for owner in {*trained, *recorded} if trained.get(owner) != recorded.get(owner)}, ""


def _other_batch(example: Tensor) -> Tensor:
    """One sample more, and other values."""
    other = -example if example.is_floating_point() else example.flip(0)
    return torch.cat([other, example[:1]])


class _Recorder(Walker):
    """Builds the graph while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        names = {module: all_names[0] for module, all_names in module_names(model).items()}
        layers = {module: name for module, name in names.items() if is_layer(module)}
        super().__init__(layers, {module: name for module, name in names.items() if module not in layers})
        self.graph = Graph()
        self._linears = {id(layer.weight): layer for layer in layers if type(layer) is nn.Linear}
        self._writers: dict[int, int] = {}
        self._alive: dict[int, Tensor] = {}  # a tensor that is gone could lend its id to another one

    def start(self, example: Tensor) -> None:
        self._append(Kind.INPUT, "", "input", (), [], example)

    def finish(self, result: Any) -> None:
        self._append(Kind.OUTPUT, "", "output", self._operands(tensors_in(result)), [], None)

    def on_operation(self, call: Call) -> Any:
        inputs, name = call.inputs, local_name(call.frame.module, call.op, call.ordinal)
        operands, versions = self._operands(inputs), _versions(inputs)
        result = call.run()
        changed = _changed(inputs, versions)
        owner, layer = call.frame.name, self._multiplied_with(call)
        read = tuple(operand for operand in operands if operand.source is not None)
        extra: dict[str, Any]
        if layer is not None and len(read) == 1:
            extra = {"owner": owner, "module": layer, "called": False}
            self._append(Kind.LAYER, self._layers[layer], type(layer).__name__, read, [], result, **extra)
        elif (read and (tensors_in(result) or changed)) or any_complex(tensors_in(result)):
            constants = pytree.tree_map_only(Tensor, lambda t: None, (call.args, call.kwargs))
            extra = {"owner": owner, "ordinal": call.ordinal, "constants": constants}
            self._append(Kind.OPERATION, joined(owner, name), call.op, operands, changed, result, **extra)
        return result

    def _multiplied_with(self, call: Call) -> nn.Linear | None:
        """Return the layer whose weight a functional linear uses, where calling the layer comes to the same."""
        if call.op != "linear":
            return None
        product = Product.of(call.args, call.kwargs)
        layer = self._linears.get(id(product.weight))
        return layer if layer is not None and (layer.bias is None or layer.bias is product.bias) else None

    def enter_layer(self, inputs: list[Tensor]) -> dict[int, int]:
        return _versions(inputs)

    def leave_layer(self, frame: Frame, inputs: list[Tensor], result: Any) -> None:
        kind, changed = type(frame.module).__name__, _changed(inputs, frame.before)
        self._append(Kind.LAYER, frame.name, kind, self._operands(inputs), changed, result, module=frame.module)

    def _operands(self, tensors: list[Tensor]) -> tuple[Operand, ...]:
        return tuple(Operand(self._writers.get(id(t)), tuple(t.shape)) for t in tensors)

    def _append(
        self,
        kind: Kind,
        name: str,
        op: str,
        operands: tuple[Operand, ...],
        changed: list[Tensor],
        result: Any,
        *,
        owner: str = "",
        ordinal: int = 0,
        module: nn.Module | None = None,
        constants: Any = None,
        called: bool = True,
    ) -> None:
        index = len(self.graph.nodes)
        written = [*tensors_in(result), *changed]
        for tensor in changed:  # written in place: whoever shares the memory sees it
            memory = tensor.untyped_storage().data_ptr()
            written += [t for t in self._alive.values() if t.untyped_storage().data_ptr() == memory]
        for tensor in written:
            self._writers[id(tensor)] = index
            self._alive[id(tensor)] = tensor
        shape = tuple(written[0].shape) if written else ()
        floating = bool(written) and (written[0].is_floating_point() or written[0].is_complex())
        self.graph.nodes.append(
            Node(index, kind, name, op, owner, ordinal, operands, shape, floating, module, constants, called)
        )


def _versions(tensors: list[Tensor]) -> dict[int, int]:
    return {id(tensor): tensor._version for tensor in tensors}


def _changed(tensors: list[Tensor], versions: dict[int, int]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor._version != versions[id(tensor)]]
