"""ONNX Runtime's own quantizers, with the settings that its kernels like and the repairs that our exports need."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import NodeProto

from maseRT.errors import StepError
from maseRT.onnxrt.forms import avoid_errors_of_openvino
from maseRT.onnxrt.graph import Array, Graph, attribute
from maseRT.onnxrt.masks import nodes_at_masks
from maseRT.onnxrt.pools import divide_by_what_is_there, is_divided_wrongly
from maseRT.onnxrt.providers import SessionSettings, parse_device
from maseRT.runtimes.onnxruntime import create_session

Calibrator = Literal["minmax", "entropy", "percentile"]
Feed = Mapping[str, Array]

_CALIBRATORS: dict[Calibrator, str] = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_DYNAMIC_OPS = ["MatMul", "Gemm", "LSTM", "Attention", "Gather"]
"""Of Gather, the tables of embeddings alone. Convolutions with dynamic ranges run slower than in float."""
_TOKEN_OPS = ["Conv", "MatMul", "Gemm"]
"""What is quantized where the model normalizes layers: additions and softmaxes of integers cost accuracy there."""


@dataclass(frozen=True)
class StaticSettings:
    """How `quantize_static` works.

    Attributes:
        calibrator: where ranges end.
        percentile: the share of values inside a range, in percent; for that calibrator only.
        signed: int8 activations with zero point 0 and float biases, as TensorRT and OpenVINO want them; else uint8.
        openvino: what OpenVINO computes wrongly is written otherwise: concatenations in uint8, biases as subtractions.
    """

    calibrator: Calibrator = "minmax"
    percentile: float = 99.99
    signed: bool = False
    openvino: bool = False


def optimize(model: Path, out: Path, device: str) -> None:
    """Write a float model after those optimizations of ONNX Runtime that hold on every machine with such a device.

    Operators that ONNX Runtime fuses have kernels in the provider that they were fused for alone: FusedGemm, of the
    CPU's, would move data from a GPU and back. Providers that compile the graph take ONNX's own operators.

    Args:
        model: the ONNX file.
        out: the file to write.
        device: that will run it, such as "cpu" or "cuda:1".

    Raises:
        StepError: onnxruntime cannot load it.
    """
    fuses = parse_device(device)[0].device in ("cpu", "cuda")
    # "all" would write memory layouts of this CPU into the file.
    settings = SessionSettings(optimization="extended" if fuses else "basic")
    create_session(model, device if fuses else "cpu", settings, optimized=out)


def preprocess(model: Path, out: Path) -> None:
    """Write a float model as the quantizers need it: constants folded, BatchNorms absorbed, shapes inferred anew.

    Raises:
        StepError: onnxruntime cannot do it.
    """
    from onnxruntime.quantization import quant_pre_process

    with _named(model, "pre-process"), _silent():
        quant_pre_process(str(model), str(out), skip_symbolic_shape=True)
        graph = Graph(onnx.load(out))
        divide_by_what_is_there(graph)
        # The graph comes without the shapes noted before: quantize_dynamic transposes weights and then trips over them.
        onnx.save(graph.finish(), out)


def quantize_static(preprocessed: Path, out: Path, feeds: Iterable[Feed], settings: StaticSettings) -> None:
    """Write a model with Q/DQ pairs from ranges that ONNX Runtime measures itself, weights per channel.

    Args:
        preprocessed: by `preprocess`.
        out: the result.
        feeds: calibration data.
        settings: of the quantization.

    Raises:
        StepError: onnxruntime cannot do it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    graph = Graph(onnx.shape_inference.infer_shapes(onnx.load(preprocessed)))
    activation = QuantType.QInt8 if settings.signed else QuantType.QUInt8
    options: dict[str, Any] = {"ActivationSymmetric": settings.signed, "QuantizeBias": not settings.signed}
    if settings.calibrator == "percentile":
        options["CalibPercentile"] = settings.percentile
    # It works out a zero point for every tensor that it measured, of masks as well, which get no pair.
    with _named(preprocessed, "quantize_static"), _silent(), np.errstate(invalid="ignore"):
        quantize(
            str(preprocessed),
            str(out),
            _reader(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=activation,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, _CALIBRATORS[settings.calibrator]),
            op_types_to_quantize=_TOKEN_OPS if _normalizes_layers(graph) else None,
            nodes_to_exclude=[
                *_products_of_activations(graph),
                *_averages_divided_wrongly(graph),
                *nodes_at_masks(graph),
            ],
            extra_options=options,
        )
    if settings.openvino:
        graph = Graph(onnx.load(out))
        avoid_errors_of_openvino(graph)
        onnx.save(graph.finish(), out)


def quantize_dynamic(preprocessed: Path, out: Path) -> bool:
    """Write a model with int8 weights in its matrix products and LSTMs; activations are quantized as they come.

    Returns whether it has such weights: else it is the float model still.

    Raises:
        StepError: onnxruntime cannot do it.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    with _named(preprocessed, "quantize_dynamic"), _silent():
        quantize(
            str(preprocessed),
            str(out),
            op_types_to_quantize=_DYNAMIC_OPS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    stored = onnx.load(out, load_external_data=False).graph.initializer
    return any(tensor.data_type == onnx.TensorProto.INT8 for tensor in stored)


def _reader(feeds: Iterable[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            feed = next(self._feeds, None)
            return None if feed is None else dict(feed)

    return Reader()


def _normalizes_layers(graph: Graph) -> bool:
    return any(node.op_type == "LayerNormalization" or _is_root_of_mean(graph, node) for node in graph.nodes)


def _is_root_of_mean(graph: Graph, node: NodeProto) -> bool:
    """Tell whether this is the root of a mean over the last dimension, as in an RMSNorm that is written out."""
    if node.op_type != "Sqrt":
        return False
    before = graph.producer(node.input[0])
    if before is not None and before.op_type == "Add":  # of the epsilon
        before = next(filter(None, map(graph.producer, before.input)), None)
    if before is None or before.op_type != "ReduceMean":
        return False
    axes = graph.constant(before.input[1]) if len(before.input) > 1 else attribute(before, "axes")
    rank = graph.rank(before.input[0])
    return axes is not None and [int(axis) for axis in axes] in ([-1], [rank and rank - 1])


def _products_of_activations(graph: Graph) -> list[str]:
    """Return the matrix products without a constant operand, as in attention: integers cost accuracy and time there."""
    return [
        node.name
        for node in graph.nodes
        if node.op_type == "MatMul" and all(graph.constant(name) is None for name in node.input)
    ]


def _averages_divided_wrongly(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if is_divided_wrongly(node)]


@contextmanager
def _named(model: Path, what: str) -> Iterator[None]:
    """Turn whatever onnxruntime raises into a StepError that names the file."""
    try:
        yield
    except Exception as error:
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StepError(f"onnxruntime's {what} failed: {message}", where=str(model)) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the root logger and stdout, where onnxruntime's quantizers give advice and progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
