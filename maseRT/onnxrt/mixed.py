"""FP16 by tolerance: as much of a float model in half precision as its outputs allow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto

from maseRT.errors import StepError
from maseRT.onnxrt.graph import Array, Graph
from maseRT.onnxrt.quantizers import Feed


@dataclass(frozen=True)
class Mixed:
    """The outcome.

    Attributes:
        half: nodes in FP16.
        kept: names of the nodes that stayed FP32, in execution order.
        trials: models that were tried.
        worst: the largest |difference| - rtol * |expected| of the result, at most atol.
    """

    half: int
    kept: tuple[str, ...]
    trials: int
    worst: float


def auto_mixed(
    model: ModelProto, feeds: Sequence[Feed], *, rtol: float, atol: float, keep_io_types: bool, max_trials: int = 64
) -> tuple[ModelProto, Mixed]:
    """Turn a float model to FP16 but for the nodes that the tolerance keeps in FP32.

    Nodes are tried in one piece, then in halves, down to single ones: a piece turns to FP16 when the outputs of all it
    and all turned before it stay within atol + rtol * |expected|.

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
    return result, Mixed(len(search.turned), kept, search.trials, search.excess(result))


class _Search:
    """Halves the graph until every piece is within the tolerance, or one node."""

    def __init__(
        self, model: ModelProto, feeds: Sequence[Feed], rtol: float, atol: float, keep_io_types: bool, max_trials: int
    ) -> None:
        self.model = _with_names(model)
        self.turned: set[str] = set()
        self.trials = 0
        self._names = {node.name for node in self.model.graph.node}
        self._feeds = feeds
        self._rtol = rtol
        self._atol = atol
        self._keep_io_types = keep_io_types
        self._max_trials = max_trials
        self._expected = self._outputs(self.model)

    def turn(self, piece: Sequence[str]) -> None:
        """Turn as much of a piece as can be."""
        if not piece or self.trials >= self._max_trials:
            return
        self.trials += 1
        if self._accepts(self.turned | set(piece)):
            self.turned |= set(piece)
        elif len(piece) > 1:
            middle = len(piece) // 2
            self.turn(piece[:middle])
            self.turn(piece[middle:])

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
        return Graph(half).finish()  # it puts its Casts at the end, behind their readers

    def excess(self, model: ModelProto) -> float:
        """Return the largest |difference| - rtol * |expected|; infinite where a value is not finite."""
        worst = 0.0
        for found, expected in zip(self._outputs(model), self._expected, strict=True):
            if not np.isfinite(found).all():
                return float("inf")
            worst = max(worst, float((np.abs(found - expected) - self._rtol * np.abs(expected)).max()))
        return worst

    def _accepts(self, turned: set[str]) -> bool:
        try:
            return self.excess(self.converted(self._names - turned)) <= self._atol
        except StepError:  # a piece that onnxruntime has no half kernels for
            return False

    def _outputs(self, model: ModelProto) -> list[Array]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        # "all" looks for shapes that the Casts between half nodes do not have, and crashes.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            types = {value.name: value.type for value in session.get_inputs()}
            outputs = [
                session.run(None, {name: _cast(x, types[name]) for name, x in feed.items()}) for feed in self._feeds
            ]
        except Exception as error:
            raise StepError(f"onnxruntime cannot run it in mixed precision: {error}", where="auto-mixed") from error
        return [np.asarray(value, np.float64) for batch in outputs for value in batch]


def _cast(array: Array, kind: str) -> Array:
    return array.astype(np.float16) if kind == "tensor(float16)" and array.dtype == np.float32 else array


def _with_names(model: ModelProto) -> ModelProto:
    """Return a copy in which every node has a name of its own and shapes are known."""
    named: ModelProto = onnx.shape_inference.infer_shapes(model)
    seen: set[str] = set()
    for index, node in enumerate(named.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)
    return named
