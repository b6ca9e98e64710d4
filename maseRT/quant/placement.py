"""Where Q/DQ pairs go: what the dataflow says about residual adds, concatenations, pools and shared ranges.

Presets
    tensorrt    INT8 where it makes the network faster on TensorRT: see `Placer`.
    layerwise   Each quantizable layer's own input and weight, nothing else; BatchNorm is folded all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from maseRT.plan import INPUT, OUTPUT, ResidualAdd, SitePlan
from maseRT.precision import QuantSpec
from maseRT.quant.layers import kind_of, operands
from maseRT.quant.operations import joined
from maseRT.quant.pooling import AVERAGE_POOLS, MAX_POOLS, pool_of, without_kernel
from maseRT.quant.trace import Graph, Kind, Node

TINY_MACS = 1 << 14
"""Multiply-adds per sample below which a matrix product stays float: launching a Q kernel costs more than its INT8
kernel saves. An order of magnitude (a 128x128 layer), not a measured limit; rules override it."""

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ACTIVATION_NAMES = """
    relu relu6 leaky_relu sigmoid tanh hardsigmoid hardswish hardtanh silu gelu elu selu softplus clamp mish
"""
ACTIVATIONS = frozenset(_ACTIVATION_NAMES.split())
_AVERAGING = """
    mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
"""
_GLOBAL_POOLINGS = frozenset(_AVERAGING.split())


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with one input channel per group."""
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1


def tiny_macs(node: Node) -> int | None:
    """Return the multiply-adds per sample of a matrix product if they are below TINY_MACS, else None.

    A convolution that writes one pixel is a matrix product. Larger ones are never tiny: INT8 makes what they read and
    write smaller.
    """
    module = node.module
    if isinstance(module, nn.Linear):
        positions = math.prod(node.shape[1:-1])
    elif isinstance(module, nn.modules.conv._ConvNd) and math.prod(node.shape[2:]) == 1:
        positions = 1
    else:
        return None
    macs = module.weight.numel() * positions
    return macs if macs < TINY_MACS else None


@dataclass
class Placement:
    """What the dataflow adds to a plan; see maseRT.plan.Plan for the fields of the same name."""

    pools: dict[str, str] = field(default_factory=dict)
    """INT8 pools and why."""
    sites: list[SitePlan] = field(default_factory=list)
    ties: list[tuple[str, ...]] = field(default_factory=list)


class Placer:
    """The "tensorrt" preset.

    * The skip input of a residual add whose other input comes straight from an INT8 convolution is quantized: TensorRT
      runs convolution, add and activation as one kernel that reads INT8. That convolution's own output is not: nothing
      is ever quantized between a convolution and the add or activation that it fuses with.
    * A concatenation that only INT8 layers read gets all its inputs quantized with one range, shared with the readers:
      it becomes a no-op or a copy of INT8.
    * A max pool that only INT8 layers read is INT8, with their range: rounding and maximum commute, and TensorRT would
      swap them by itself. With a reshape in between it is left to do so: TensorRT-RTX moves the reader's Q in front of
      reshape and pool, but keeps a pool in float whose own Q/DQ pair a reshape parts from the next one. An average pool
      is INT8 between INT8 layers, with a range of its own. Pools over the whole image stay float, and so do those that
      TensorRT has no INT8 kernel for; see `maseRT.quant.pooling.without_kernel`.
    * Quantized readers of one tensor share one range, so that TensorRT sees one Q/DQ pair.
    * Adds behind linear layers stay float: the sum goes on as a float residual stream into a LayerNorm, and rounding it
      to INT8 in between would only cost. (Not measured.)

    Args:
        graph: the recorded dataflow.
        int8: names of the INT8 layers, pools that a rule asks for included.
        folded: names of folded BatchNorms.
        free_pools: pools that may become INT8.
        frozen_owners: modules whose operations cannot be relied on.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        int8: frozenset[str],
        folded: frozenset[str],
        free_pools: frozenset[str],
        frozen_owners: frozenset[str],
    ) -> None:
        self._graph = graph
        self._int8 = set(int8)
        self._free_pools = free_pools
        self._frozen = frozen_owners
        self._folded = folded
        self._reads: dict[int, list[str]] = {}
        self._quantized: set[tuple[int, int]] = set()
        self._union = _Union()
        self._residual = {add.operation: add for add in residual_adds(graph, folded=folded, preferred=int8)}
        self._placement = Placement()

    def place(self) -> Placement:
        """Decide from the output to the input: whether a tensor should be INT8 depends on what reads it."""
        for node in reversed(self._graph.nodes):
            if node.kind is Kind.LAYER:
                self._place_layer(node)
            elif node.op == "add":
                self._place_add(node)
            elif node.op == "cat":
                self._place_concat(node)
            else:
                self._place_pooling(node)
        self._tie_readers()
        self._placement.sites.reverse()
        self._placement.ties = self._union.groups()
        return self._placement

    def _place_layer(self, node: Node) -> None:
        if node.name in self._free_pools and node.name not in self._int8:
            reason = self._pool_reason(node, node.module)
            if reason is not None:
                self._int8.add(node.name)
                self._placement.pools[node.name] = reason
        if node.name not in self._int8:
            return
        for operand in range(len(node.operands)):
            name = read_name(node, operand)
            if name is not None:
                self._read(node, operand, name)
        if isinstance(node.module, MAX_POOLS):
            self._tie_to_readers(str(read_name(node, 0)), node)

    def _place_pooling(self, node: Node) -> None:
        pool = pooling_of(node)
        if pool is None or without_kernel(pool, [node.shapes]) is not None or node.owner in self._frozen:
            return
        reason = self._pool_reason(node, pool)
        if reason is not None:
            name = self._add_site(node, 0, reason)
            if isinstance(pool, MAX_POOLS):
                self._tie_to_readers(name, node)

    def _pool_reason(self, node: Node, pool: nn.Module | None) -> str | None:
        if not self._all_readers_int8(node, reshaped=False) or is_global_pool(node):
            return None
        if isinstance(pool, MAX_POOLS):
            return "max pool that INT8 layers read"
        return "average pool between INT8 layers" if self._comes_from_int8(node) else None

    def _tie_to_readers(self, name: str, node: Node) -> None:
        for reader in self._int8_readers(node):
            self._union.join(name, reader)

    def _place_add(self, node: Node) -> None:
        residual = self._residual.get(node.name)
        if residual is None or residual.layer not in self._int8 or node.owner in self._frozen:
            return
        module = next(call.module for call in self._graph.calls(residual.layer))
        if isinstance(module, _CONVOLUTIONS):
            self._add_site(node, residual.skip, f"skip input of the add that {residual.layer} fuses with")

    def _place_concat(self, node: Node) -> None:
        constants = any(operand.source is None for operand in node.operands)
        if constants or node.owner in self._frozen or not self._all_readers_int8(node):
            return
        if not any(self._made_by_int8(self._graph.source(node, i)) for i in range(len(node.operands))):
            return
        for operand in reversed(range(len(node.operands))):
            self._tie_to_readers(self._add_site(node, operand, "input of a concatenation that INT8 layers read"), node)

    def _add_site(self, node: Node, operand: int, reason: str) -> str:
        name = f"{node.name}.{operand}"
        if all(site.name != name for site in self._placement.sites):
            self._placement.sites.append(
                SitePlan(name, node.name, node.owner, node.op, node.ordinal, operand, QuantSpec(), reason)
            )
        self._read(node, operand, name)
        return name

    def _read(self, node: Node, operand: int, name: str) -> None:
        source = node.operands[operand].source
        if source is not None:
            root = self._graph.origin(source, self._transparent)
            self._reads.setdefault(root.index, []).append(name)
            self._quantized.add((node.index, operand))

    def _tie_readers(self) -> None:
        for names in self._reads.values():
            for name in names[1:]:
                self._union.join(names[0], name)

    def _transparent(self, node: Node) -> bool:
        return node.reshapes or node.name in self._folded

    def _readers(self, node: Node) -> list[tuple[Node, int]]:
        return self._graph.final_readers(node.index, self._transparent)

    def _all_readers_int8(self, node: Node, *, reshaped: bool = True) -> bool:
        """Whether everything that reads a node's result quantizes it; behind reshapes too, if those are welcome."""
        found = self._readers(node) if reshaped else self._graph.readers(node.index)
        readers = [(reader.index, operand) for reader, operand in found]
        return bool(readers) and self._quantized.issuperset(readers)

    def _int8_readers(self, node: Node) -> list[str]:
        names = []
        for reader, operand in self._readers(node):
            if (reader.index, operand) in self._quantized:
                layer = read_name(reader, operand) if reader.kind is Kind.LAYER else None
                names.append(layer or f"{reader.name}.{operand}")
        return names

    def _comes_from_int8(self, node: Node) -> bool:
        source = node.operands[0].source
        return source is not None and self._made_by_int8(self._graph.nodes[source])

    def _made_by_int8(self, node: Node) -> bool:
        """Whether an INT8 kernel writes the tensor: behind activations, the fused add or a concatenation too."""
        while True:
            if node.name in self._int8 and node.kind is Kind.LAYER:
                return True
            if node.op == "add" and node.name in self._residual:
                return self._residual[node.name].layer in self._int8
            if node.op == "cat":
                sources = [operand.source for operand in node.operands]
                return all(s is not None and self._made_by_int8(self._graph.nodes[s]) for s in sources)
            if not (self._transparent(node) or is_activation(node)) or node.operands[0].source is None:
                return False
            node = self._graph.source(node)


def residual_adds(
    graph: Graph, *, folded: frozenset[str], preferred: frozenset[str] = frozenset()
) -> list[ResidualAdd]:
    """Return the additions of two activations of one shape of which one comes straight from a weighted layer.

    Where both do, the add belongs to a preferred (INT8) layer, then to the one with more layers before it; the shorter
    branch is the skip.
    """
    depths = _depths(graph)
    found: dict[str, ResidualAdd] = {}
    for node in graph.nodes:
        if node.kind is not Kind.OPERATION or node.op != "add" or len(node.operands) != 2:
            continue
        first, second = node.operands
        if (
            first.shape != second.shape
            or first.source is None
            or second.source is None
            or first.source == second.source
        ):
            continue
        candidates = [
            (origin.name in preferred, depths[origin.index], -operand, origin.name)
            for operand in (0, 1)
            if (origin := _fusable_layer(graph, node, operand, folded)) is not None
        ]
        if candidates:
            _, _, operand, layer = max(candidates)
            found[node.name] = ResidualAdd(operation=node.name, layer=layer, skip=1 + operand)
    return list(found.values())


def _fusable_layer(graph: Graph, add: Node, operand: int, folded: frozenset[str]) -> Node | None:
    """Return the weighted layer whose output an add reads, reshaped at most, and nobody else."""
    node = graph.source(add, operand)
    while True:
        if len(graph.readers(node.index)) != 1:
            return None
        if isinstance(node.module, (nn.modules.conv._ConvNd, nn.Linear)):
            return node
        if not (node.reshapes or node.name in folded) or node.operands[0].source is None:
            return None
        node = graph.source(node)


def _depths(graph: Graph) -> list[int]:
    """Return how many weighted layers lie on the longest way from the input to each node, its own included."""
    depths: list[int] = []
    for node in graph.nodes:
        before = max((depths[o.source] for o in node.operands if o.source is not None), default=0)
        depths.append(before + (node.module is not None and _has_parameters(node.module)))
    return depths


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def is_activation(node: Node) -> bool:
    """Whether TensorRT runs a node inside the kernel of the convolution before it."""
    if node.module is not None:
        return type(node.module).__module__ == "torch.nn.modules.activation" and not _has_parameters(node.module)
    return node.op in ACTIVATIONS


def pooling_of(node: Node) -> nn.Module | None:
    """Return the layer that does what a pooling function does, or None for any other node."""
    if node.kind is not Kind.OPERATION or node.constants is None:
        return None
    return pool_of(node.op, *node.constants)


def is_global_pool(node: Node) -> bool:
    """Whether a node averages each channel of a batch of images or sequences into one number."""
    if node.kind is Kind.LAYER:
        averages = isinstance(node.module, AVERAGE_POOLS)
    else:
        averages = node.kind is Kind.OPERATION and node.op in _GLOBAL_POOLINGS
    if not averages or not node.operands or len(node.operands[0].shape) < 3:
        return False
    batch, channels, *image = node.operands[0].shape
    return math.prod(image) > 1 and node.shape[:2] == (batch, channels) and math.prod(node.shape[2:]) == 1


def read_name(node: Node, operand: int) -> str | None:
    """Return the amax name of a tensor that a layer of the table reads, or None if it does not quantize that one."""
    module = node.module
    if module is None or kind_of(module) is None:
        return None
    names = [o.name for o in operands(module) if o.role == "input"]
    if isinstance(module, nn.LSTM):  # the other ones are what it computes itself
        names = names[:1]
    elif isinstance(module, nn.MultiheadAttention):
        names = names[:3] if len(names) > 3 else names[:1] * 3
    return joined(node.name, names[operand]) if operand < len(names) else None


def flow_of(graph: Graph, *, folded: frozenset[str], inside: Callable[[Node], str]) -> list[tuple[str, str]]:
    """Return the (producer, consumer) pairs of maseRT.plan.Plan.flow.

    Args:
        graph: the recorded dataflow.
        folded: names of folded BatchNorms.
        inside: gives the name that a node has in the plan.
    """

    def passes(node: Node) -> bool:
        return node.passes or node.name in folded

    pairs: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        if passes(node) or not node.floating:
            continue
        producer = INPUT if node.kind is Kind.INPUT else inside(node)
        for reader, _ in graph.final_readers(node.index, passes):
            if reader.kind is Kind.OPERATION and not reader.floating:
                continue  # a comparison, which takes any type
            if passes(reader):
                continue  # it reads the shape or the type alone, as `x.reshape_as(y)` does of y
            consumer = OUTPUT if reader.kind is Kind.OUTPUT else inside(reader)
            if producer != consumer:
                pairs[producer, consumer] = None
    return list(pairs)


def amax_names_of(graph: Graph, nodes: frozenset[int], candidates: Iterable[tuple[Node, int]]) -> list[str]:
    """Return the amax names, among the layers' inputs and the candidate operands, that read one of the nodes.

    A layer that is called several times counts when all its calls do.
    """
    verdicts: dict[str, bool] = {}
    layers = ((node, i) for node in graph.nodes if node.kind is Kind.LAYER for i in range(len(node.operands)))
    for node, operand in (*layers, *candidates):
        name = read_name(node, operand) if node.kind is Kind.LAYER else f"{node.name}.{operand}"
        if name is not None:
            verdicts[name] = verdicts.get(name, True) and node.operands[operand].source in nodes
    return [name for name, verdict in verdicts.items() if verdict]


class _Union:
    """Disjoint groups of names."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, one: str, other: str) -> None:
        self._parents[self._root(one)] = self._root(other)

    def groups(self) -> list[tuple[str, ...]]:
        members: dict[str, list[str]] = {}
        for name in sorted(self._parents):
            members.setdefault(self._root(name), []).append(name)
        return sorted(tuple(group) for group in members.values() if len(group) > 1)

    def _root(self, name: str) -> str:
        while (parent := self._parents.setdefault(name, name)) != name:
            name = parent
        return name
