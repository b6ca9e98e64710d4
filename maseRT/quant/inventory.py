"""Which layers and operations of a model a plan lists, before anything is decided about them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import nn

from maseRT.plan import LayerPlan, OperationPlan
from maseRT.precision import Precision
from maseRT.quant.bfloat16 import operation_in_bf16
from maseRT.quant.layers import kind_of, operands
from maseRT.quant.placement import RECURRENT
from maseRT.quant.trace import Graph, Kind, Node, is_layer, is_reshaping, module_names

_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, *RECURRENT)


def calls_of(graph: Graph | None) -> dict[str, list[Node]]:
    """Return the calls of each layer, in the order of execution; modules whose own operations run have none."""
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes if graph is not None else ():
        if node.kind is Kind.LAYER:
            calls.setdefault(node.name, []).append(node)
        elif node.kind is Kind.OPERATION:
            calls.setdefault(node.owner, [])
    return calls


def layers_of(
    model: nn.Module, calls: Mapping[str, Iterable[Node]], *, float: Precision
) -> tuple[dict[str, nn.Module], list[LayerPlan]]:
    """Return the layers by name and as drafts, in the order of execution; those that were not reached come last.

    A layer is a type of the table, a layer of torch.nn, or a module of the user's own without modules inside. What only
    reshapes, or drops values in training, is none.
    """
    names = module_names(model)
    listed = {found[0]: (module, found[1:]) for module, found in names.items() if _is_listed(module)}
    order = [name for name in calls if name in listed] + [name for name in listed if name not in calls]
    drafts = [
        LayerPlan(
            name=name,
            type=type(listed[name][0]).__name__,
            precision=float,
            weight=None,
            input=None,
            reason="",
            float=float,
            weighted=_is_weighted(listed[name][0]),
            aliases=tuple(listed[name][1]),
            callers=tuple(dict.fromkeys(node.owner for node in calls.get(name, ()) if not node.called)),
        )
        for name in order
    ]
    return {name: listed[name][0] for name in order}, drafts


def operations_of(graph: Graph | None, *, float: Precision, layers: Container[str]) -> tuple[OperationPlan, ...]:
    """Return the operations outside of layers that compute floating-point numbers, in the order of execution.

    Those that read such numbers and have no BF16 form, as argsort, are among them: they need another type there.
    """
    found: dict[str, OperationPlan] = {}
    for node in graph.nodes if graph is not None else ():
        if node.kind is not Kind.OPERATION or node.passes or node.owner in layers:
            continue
        if node.floating or (graph is not None and not operation_in_bf16(node) and _reads_floats(graph, node)):
            draft = OperationPlan(node.name, node.owner, node.op, node.ordinal, float, "float")
            found.setdefault(node.name, draft)
    return tuple(found.values())


def _reads_floats(graph: Graph, node: Node) -> bool:
    return any(operand.source is not None and graph.nodes[operand.source].floating for operand in node.operands)


def _is_listed(module: nn.Module) -> bool:
    if is_layer(module):
        return not is_reshaping(module)
    return not any(True for _ in module.children()) and type(module).forward is not nn.Module.forward


def _is_weighted(module: nn.Module) -> bool:
    if kind_of(module) is not None:
        return any(operand.role == "weight" for operand in operands(module))
    return isinstance(module, _WEIGHTED)
