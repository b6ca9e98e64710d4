"""What earlier steps left on disk, as parts of the report: calibrators, curves of training, the precision receipt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from maseRT.checkpoints import load_tensors
from maseRT.config import Config
from maseRT.quant.histogram import Histogram, histograms_from_tensors
from maseRT.receipt import Receipt
from maseRT.report.schema import (
    Calibration,
    CalibratorResult,
    Epoch,
    HistogramStrip,
    LayerStrip,
    Learning,
    Metrics,
    Precision,
)
from maseRT.steps.candidates import corrected_name
from maseRT.steps.table import trains
from maseRT.workspace import Workspace, read_json, write_json

_SHOWN_BINS = 128


def metrics_of(flat: Mapping[str, Any]) -> Metrics:
    """Return metrics as a step's JSON file has them, all in one object."""
    values = {name: value for name, value in flat.items() if name not in ("samples", "loss", "confusion")}
    return Metrics(samples=flat["samples"], loss=flat["loss"], values=values, confusion=flat.get("confusion"))


def training(config: Config, workspace: Workspace) -> Learning | None:
    """Return the curve of [train]; None where the weights came from elsewhere."""
    return _learning(read_json(workspace.training, made_by="train")) if trains(config) else None


def finetuning(config: Config, workspace: Workspace) -> Learning | None:
    """Return the curve of [finetune]; None where there was nothing to tune."""
    if config.finetune is None or not workspace.finetuning_history.exists():
        return None
    return _learning(read_json(workspace.finetuning_history, made_by="finetune"))


def _learning(raw: Mapping[str, Any]) -> Learning | None:
    epochs = [
        Epoch(epoch=each["epoch"], loss=each["loss"], validation=metrics_of(each["validation"]))
        for each in raw.get("epochs", [])
    ]
    return Learning(epochs=epochs, best_epoch=raw.get("best_epoch")) if epochs else None


def calibration(config: Config, workspace: Workspace) -> Calibration | None:
    """Return the calibrators' results, and the ranges that the best one chose; None where nothing was calibrated."""
    if config.calibrate is None or not workspace.calibration.exists():
        return None
    raw = read_json(workspace.calibration, made_by="calibrate")
    corrected = raw.get("bias_correction", {})
    methods = [
        CalibratorResult(
            name=name,
            metrics=metrics_of(each["validation"]),
            mean_sqnr_db=_mean(each["sqnr_db"].values()),
            chosen=name == raw["best"] and not corrected.get("kept"),
        )
        for name, each in raw["methods"].items()
    ]
    if corrected:
        metrics = metrics_of(corrected["validation"])
        methods.append(CalibratorResult(name=corrected_name(raw["best"]), metrics=metrics, chosen=corrected["kept"]))
    return Calibration(methods=methods, histograms=_histograms(workspace, raw["best"]))


def _histograms(workspace: Workspace, best: str) -> list[HistogramStrip]:
    """Return the tensors that have one range each; weights have one per channel."""
    histograms = histograms_from_tensors(*load_tensors(workspace.histograms, made_by="calibrate"))
    amax, _ = load_tensors(workspace.amax(best), made_by="calibrate")
    return [
        _strip(name, histogram, float(amax[name]))
        for name, histogram in histograms.items()
        if name in amax and amax[name].numel() == 1
    ]


def _strip(name: str, histogram: Histogram, amax: float) -> HistogramStrip:
    bins = histogram.bins()
    used = int(bins.used[0])
    wide = -(-used // _SHOWN_BINS)
    counts = bins.counts[0, : wide * _SHOWN_BINS].numpy()
    padded = np.pad(counts, (0, -len(counts) % wide))
    shown = padded.reshape(-1, wide).sum(1)[: -(-used // wide)]
    return HistogramStrip(
        tensor=name, amax=amax, top=float(bins.width[0]) * wide * len(shown), counts=[int(count) for count in shown]
    )


def precision(config: Config, workspace: Workspace, kernels_ms: Mapping[str, float]) -> Precision | None:
    """Return the engine's receipt; None where there is no engine.

    Args:
        kernels_ms: kernel -> time of one inference, where the engine ran.
    """
    if config.build_engine is None:
        return None
    raw = read_json(workspace.receipt, made_by="build-engine")
    receipt = Receipt.from_json(raw, where=str(workspace.receipt)).with_times(kernels_ms)
    told = [receipt.conversions(), receipt.hiding(), *(layer.describe() for layer in receipt.mismatches)]
    return Precision(
        runtime=receipt.runtime,
        version=receipt.version,
        observed_from=receipt.observed_from,
        summary=receipt.summary(),
        layers=[
            LayerStrip(
                name=layer.name,
                type=layer.type,
                asked=layer.asked,
                exported=layer.exported,
                executed=layer.executed,
                verdict=str(layer.verdict),
                ms=receipt.ms_of(layer.name),
            )
            for layer in receipt.layers
        ],
        told=[sentence for sentence in told if sentence],
    )


def _mean(values: Any) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def save_kernel_times(config: Config, workspace: Workspace, kernels_ms: Mapping[str, float]) -> None:
    """Leave the kernels' times for `masert explain`."""
    if config.build_engine is not None and kernels_ms:
        receipt = read_json(workspace.receipt, made_by="build-engine")
        write_json(workspace.kernel_times, {"onnx_sha256": receipt["onnx_sha256"], "ms": dict(kernels_ms)})
