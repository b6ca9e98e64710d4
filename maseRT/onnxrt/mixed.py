"""FP16 by tolerance: as much of a float model in half precision as its outputs allow."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from maseRT.errors import StepError
from maseRT.onnxrt.graph import Array, Graph, attribute
from maseRT.onnxrt.quantizers import Feed


@dataclass(frozen=True)
class Mixed:
    """The outcome.

    Attributes:
        half: nodes in FP16.
        kept: names of the nodes that stayed FP32, in execution order.
        untried: how many of these were in no piece small enough, when the trials were used up.
        trials: models that were tried.
        worst: the largest |difference| - rtol * |expected| of the result, at most atol.
    """

    half: int
    kept: tuple[str, ...]
    untried: int
    trials: int
    worst: float


def auto_mixed(
    model: ModelProto, feeds: Sequence[Feed], *, rtol: float, atol: float, keep_io_types: bool, max_trials: int = 64
) -> tuple[ModelProto, Mixed]:
    """Turn a float model to FP16 but for the nodes that the tolerance keeps in FP32.

    FP16 is simulated: what turned nodes read and write is rounded to it, sums are FP32. (Asked to run an FP16 model,
    ONNX Runtime's CPU provider computes in FP32 and leaves most of the roundings out, overflows included.)

    Nodes are tried in one piece, then in halves, in quarters, down to single ones: a piece turns to FP16 when the
    outputs with it and all turned before it stay within atol + rtol * |expected|.

    Args:
        model: FP32; not changed.
        feeds: inputs to compare on.
        rtol: relative tolerance.
        atol: absolute tolerance.
        keep_io_types: leave the model's inputs and outputs FP32.
        max_trials: pieces to try; what is left after them stays FP32.

    Raises:
        StepError: onnxruntime cannot run the model.
    """
    search = _Search(model, feeds, rtol, atol, keep_io_types, max_trials)
    names = [node.name for node in search.model.graph.node]
    search.turn(names)
    kept = tuple(name for name in names if name not in search.turned)
    result = search.converted(set(kept)) if search.turned else search.model
    return result, Mixed(len(search.turned), kept, search.untried, search.trials, search.excess(search.turned))


class _Search:
    """Halves the graph until every piece is within the tolerance, or one node."""

    def __init__(
        self, model: ModelProto, feeds: Sequence[Feed], rtol: float, atol: float, keep_io_types: bool, max_trials: int
    ) -> None:
        self.model = _with_names(model)
        self.turned: set[str] = set()
        self.trials = 0
        self.untried = 0
        self._names = {node.name for node in self.model.graph.node}
        self._feeds = feeds
        self._rtol = rtol
        self._atol = atol
        self._keep_io_types = keep_io_types
        self._max_trials = max_trials
        self._expected = self._outputs(self.model)

    def turn(self, names: Sequence[str]) -> None:
        """Turn as many nodes as can be, large pieces first: the trials would not last to the small ones everywhere."""
        waiting = deque([names] if names else [])
        while waiting and self.trials < self._max_trials:
            piece = waiting.popleft()
            self.trials += 1
            if self._accepts(self.turned | set(piece)):
                self.turned |= set(piece)
            elif len(piece) > 1:
                middle = len(piece) // 2
                waiting += [piece[:middle], piece[middle:]]
        self.untried = sum(len(piece) for piece in waiting)

    def converted(self, kept: set[str]) -> ModelProto:
        """Return the model in FP16 but for some nodes."""
        from onnxruntime.transformers.float16 import convert_float_to_float16

        copy = ModelProto()
        copy.CopyFrom(self.model)
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            half: ModelProto = convert_float_to_float16(
                copy, keep_io_types=self._keep_io_types, node_block_list=sorted(kept), disable_shape_infer=False
            )
        finally:
            logging.disable(before)
        graph = Graph(half)
        _join_kept_nodes(graph)
        return graph.finish()  # the converter leaves its Casts behind their readers

    def excess(self, turned: set[str]) -> float:
        """Return the largest |difference| - rtol * |expected| of some nodes in FP16; infinite where one overflows."""
        worst = 0.0
        outputs = self._outputs(simulated(self.model, turned))
        for found, expected in zip(outputs, self._expected, strict=True):
            if not np.isfinite(found).all():
                return float("inf")
            worst = max(worst, float((np.abs(found - expected) - self._rtol * np.abs(expected)).max()))
        return worst

    def _accepts(self, turned: set[str]) -> bool:
        return self.excess(turned) <= self._atol

    def _outputs(self, model: ModelProto) -> list[Array]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            outputs = [session.run(None, dict(feed)) for feed in self._feeds]
        except Exception as error:
            raise StepError(f"onnxruntime cannot run it: {error}", where="auto-mixed") from error
        return [np.asarray(value, np.float64) for batch in outputs for value in batch]


def simulated(model: ModelProto, turned: set[str]) -> ModelProto:
    """Return an FP32 model whose named nodes read and write values that FP16 holds.

    Args:
        model: FP32, with the types of its tensors inferred; not changed.
        turned: names of nodes.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    values = (*copy.graph.input, *copy.graph.value_info, *copy.graph.output)
    floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {tensor.name for tensor in copy.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    graph = Graph(copy)
    rounded: set[str] = set()
    for node in [node for node in graph.nodes if node.name in turned]:
        for name in {*node.input} & floats - rounded:
            half = _round_to_half(graph, name, f"{name}::half")
            graph.redirect(name, half, [reader for reader in graph.readers(name) if reader.name in turned])
        for name in {*node.output} & floats:
            exact = graph.fresh(f"{name}::exact")
            graph.rename_output(node, name, exact)
            _round_to_half(graph, exact, name)
            rounded.add(name)
    return graph.finish()


def _join_kept_nodes(graph: Graph) -> None:
    """Take out what rounds values between two FP32 nodes: the converter casts each kept node's result to FP16."""
    for back in [node for node in graph.nodes if _casts_to(node, TensorProto.FLOAT)]:
        there = graph.producer(back.input[0])
        if there is not None and _casts_to(there, TensorProto.FLOAT16):
            graph.redirect(back.output[0], there.input[0], graph.readers(back.output[0]))


def _casts_to(node: NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and attribute(node, "to") == kind


def _round_to_half(graph: Graph, source: str, result: str) -> str:
    half = graph.fresh(f"{source}::fp16")
    graph.add_node("Cast", [source], half, to=TensorProto.FLOAT16)
    graph.add_node("Cast", [half], result, to=TensorProto.FLOAT)
    return result


def _with_names(model: ModelProto) -> ModelProto:
    """Return a copy in which every node has a name of its own and shapes are known."""
    named: ModelProto = onnx.shape_inference.infer_shapes(model)
    seen: set[str] = set()
    for index, node in enumerate(named.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)
    return named
