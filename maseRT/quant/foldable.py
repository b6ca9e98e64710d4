"""Which BatchNorms of a model can be folded into the layer before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

from maseRT.plan import Fold
from maseRT.quant.fold import BATCHNORMS, applies_activation, fold_refusal
from maseRT.quant.operations import joined, runs_as
from maseRT.quant.trace import Graph, Kind, Node

_RESHAPING = ("flatten", "reshape", "view", "unflatten")
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Flatten)


def find_folds(
    graph: Graph, shared: frozenset[str], modules: Mapping[str, nn.Module]
) -> tuple[list[Fold], dict[str, str]]:
    """Return the BatchNorms that can be folded into the layer before them, and BatchNorm -> reason for the others.

    Args:
        graph: the recorded dataflow.
        shared: names of layers that have several names; nothing is folded into them.
        modules: the model's modules by name.
    """
    folds: list[Fold] = []
    refused: dict[str, str] = {}
    for node in graph.nodes:
        if node.kind is Kind.OPERATION and node.op == "batch_norm":
            name, module, reason = node.owner, modules.get(node.owner), _other_code(graph, node, modules)
        elif isinstance(node.module, BATCHNORMS):
            name, module, reason = node.name, node.module, None
        else:
            continue
        if name in refused:
            continue
        if reason is None and module is not None:
            reason = _fold_obstacle(graph, node, module, shared)
        if reason is None:
            folds.append(Fold(layer=_normalized(graph, node).name, batchnorm=name))
        else:
            refused[name] = reason
    return folds, refused


def nodes_of_folded(names: Iterable[str]) -> frozenset[str]:
    """Return the names of folded BatchNorms in a graph: their own, or that of the operation in their forward."""
    return frozenset(each for name in names for each in (name, joined(name, "batch_norm")))


def _other_code(graph: Graph, operation: Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return why a module that calls `batch_norm` itself cannot be folded; None if only its drop and act follow."""
    module = modules.get(operation.owner)
    following = [f"{operation.owner}.drop", f"{operation.owner}.act"]
    chain: list[str] = []
    node = operation
    while len(readers := graph.readers(node.index)) == 1 and len(chain) < len(following):
        node = readers[0][0]
        chain.append(node.name)
    own = graph.operations_per_owner()[operation.owner]
    if module is None or not applies_activation(module) or chain != following or own != [operation.name]:
        return "it runs in code of its own"
    return None


def _fold_obstacle(graph: Graph, batchnorm: Node, module: nn.Module, shared: frozenset[str]) -> str | None:
    if batchnorm.operands[0].source is None:
        return "it does not follow a layer"
    source = _normalized(graph, batchnorm)
    if source.kind is not Kind.LAYER or source.module is None:
        return f"it follows {_described(source)}"
    reason = fold_refusal(source.module, module)
    if reason is not None:
        return reason
    if (
        {source.name, batchnorm.name} & shared
        or len(graph.calls(source.name)) > 1
        or sum(node.name == batchnorm.name for node in graph.nodes) > 1
    ):
        return "it or the layer before it is used more than once"
    if any(len(_value_readers(graph, node)) > 1 for node in _way_back(graph, batchnorm)):
        return f"something else reads the output of {source.name} too"
    if not _normalizes_channels(batchnorm.operands[0].shape, source):
        return f"it normalizes another axis than the output channels of {source.name}"
    return None


def _normalizes_channels(shape: tuple[int, ...], source: Node) -> bool:
    """Whether a BatchNorm that reads a layer's output in some shape normalizes that layer's output channels."""
    if isinstance(source.module, nn.Linear):
        return len(shape) == 2
    return len(source.shape) > 2 and shape[:2] == source.shape[:2]


def _described(node: Node) -> str:
    return {Kind.INPUT: "the model's input", Kind.OPERATION: f"the operation {node.op}"}.get(node.kind, node.name)


def _normalized(graph: Graph, batchnorm: Node) -> Node:
    """Return the node whose output a BatchNorm normalizes."""
    return _way_back(graph, batchnorm)[-1]


def _way_back(graph: Graph, batchnorm: Node) -> list[Node]:
    """Return the nodes before a BatchNorm, back to the one that computes what it normalizes.

    Between them can be what hands values on, in eval mode, and reshapes that keep the channels apart: of a linear
    layer's output from [N, ..., C] to [M, C], of a convolution's from [N, C, ...] to [N, C, ...].
    """
    found = [graph.source(batchnorm)]
    while _keeps_channels(found[-1]) and found[-1].operands[0].source is not None:
        found.append(graph.source(found[-1]))
    return found


def _keeps_channels(node: Node) -> bool:
    if node.op == "contiguous":
        return True
    if not (_passes(node.module) or (node.kind is Kind.OPERATION and node.op in _RESHAPING)):
        return False
    before, after = node.operands[0].shape, node.shape
    return before == after or before[:2] == after[:2] or (len(after) == 2 and before[-1:] == after[-1:])


def _passes(layer: nn.Module | None) -> bool:
    """Whether a layer hands on what it reads, and neither its own forward nor a hook does anything to it."""
    return layer is not None and runs_as(layer, _PASSING) and not (layer._forward_hooks or layer._forward_pre_hooks)


def _value_readers(graph: Graph, node: Node) -> list[tuple[Node, int]]:
    """Return what reads a node's values; `x.reshape_as(y)` only reads the shape of y."""
    return [(reader, operand) for reader, operand in graph.readers(node.index) if not _is_shape(reader, operand)]


def _is_shape(reader: Node, operand: int) -> bool:
    return reader.op.endswith("_as") and operand == 1


def folds_in_sequentials(model: nn.Module) -> tuple[list[Fold], dict[str, str]]:
    """Return the same as `find_folds` for a model that cannot be traced.

    Without a graph only a BatchNorm right after a convolution in an nn.Sequential is certain to read nothing else.
    """
    names = {module: name for name, module in model.named_modules()}
    uses = [module for _, module in model.named_modules(remove_duplicate=False)]
    folds = []
    for parent in names:
        for layer, batchnorm in pairwise(parent.children() if isinstance(parent, nn.Sequential) else ()):
            once = uses.count(layer) == uses.count(batchnorm) == 1
            convolution = type(batchnorm) in BATCHNORMS and isinstance(layer, nn.modules.conv._ConvNd)
            if once and convolution and fold_refusal(layer, batchnorm) is None:
                folds.append(Fold(layer=names[layer], batchnorm=names[batchnorm]))
    folded = {fold.batchnorm for fold in folds}
    others = [name for module, name in names.items() if isinstance(module, BATCHNORMS) and name not in folded]
    return folds, dict.fromkeys(others, "the model's dataflow is unknown")
