"""Which tensors of a graph can never be negative, whatever the data: targets with unsigned activations gain a bit."""

from __future__ import annotations

from typing import Any

from torch import nn

from maseRT.quant.operations import runs_as
from maseRT.quant.pooling import POOLS
from maseRT.quant.trace import Graph, Kind, Node

_SOURCE_LAYERS = (
    nn.ReLU,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softmax,
    nn.Softmax2d,
    nn.Softplus,
    nn.Softmin,
)
_SOURCE_OPERATIONS = frozenset(
    ("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "exp", "square")
)
_KEEPING_LAYERS = (
    *POOLS,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
)
_POOLING = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d mean sum amax max amin min
"""
_KEEPING_OPERATIONS = frozenset(("cat", "stack", "add", "mul", "maximum", "sqrt", *_POOLING.split()))


def nonnegative_nodes(graph: Graph) -> frozenset[int]:
    """Return the nodes whose result is never negative."""
    found: set[int] = set()
    for node in graph.nodes:
        if _makes(node) or (_keeps(node) and _reads_only(node, found)):
            found.add(node.index)
    return frozenset(found)


def _makes(node: Node) -> bool:
    if node.kind is Kind.LAYER:
        module = node.module
        if module is None or not runs_as(module, (*_SOURCE_LAYERS, nn.Hardtanh, nn.Threshold)):
            return False
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return bool(module.min_val >= 0)
        return not isinstance(module, nn.Threshold) or _threshold(module)
    if node.kind is not Kind.OPERATION:
        return False
    if node.op in _SOURCE_OPERATIONS:
        return True
    if node.op == "clamp":
        return _at_least_zero(node.argument(1, "min"))
    if node.op == "clamp_min":
        return _at_least_zero(node.argument(1, "min"))
    if node.op == "hardtanh":
        return _at_least_zero(node.argument(1, "min_val"))
    return False


def _threshold(module: nn.Threshold) -> bool:
    return module.threshold >= 0 and module.value >= 0


def _keeps(node: Node) -> bool:
    """Nonnegative operands give a nonnegative result."""
    if node.kind is Kind.LAYER:
        if node.module is None or not runs_as(node.module, (*_KEEPING_LAYERS, nn.Upsample)):
            return node.reshapes
        return not isinstance(node.module, nn.Upsample) or bool(node.module.mode != "bicubic")
    if node.kind is not Kind.OPERATION:
        return False
    if node.op == "interpolate":
        return bool(node.argument(3, "mode") != "bicubic")
    if node.op in ("add", "mul"):
        return all(value >= 0 for value in _numbers(node))
    return node.passes or node.op in _KEEPING_OPERATIONS


def _reads_only(node: Node, found: set[int]) -> bool:
    sources = [operand.source for operand in node.operands]
    if node.passes:  # the other operands are indices
        sources = sources[:1]
    return bool(sources) and all(source in found for source in sources)


def _numbers(node: Node) -> list[float]:
    args, kwargs = node.constants
    return [value for value in (*args, *kwargs.values()) if isinstance(value, int | float)]


def _at_least_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0
