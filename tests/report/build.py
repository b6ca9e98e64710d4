"""A sound report, and ways to spoil one value of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from maseRT.report.schema import Report

CLASSES = 10
SAMPLES = 360
BATCH = 64


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, Any]:
    """Return what an evaluation of logits [N, classes] puts into a report."""
    values = {
        "accuracy": multiclass_accuracy(logits, labels, classes, average="micro"),
        "top5": multiclass_accuracy(logits, labels, classes, average="micro", top_k=min(5, classes)),
        "precision": multiclass_precision(logits, labels, classes, average="macro"),
        "recall": multiclass_recall(logits, labels, classes, average="macro"),
        "f1": multiclass_f1_score(logits, labels, classes, average="macro"),
    }
    return {
        "samples": len(labels),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "values": {name: value.item() for name, value in values.items()},
        "confusion": multiclass_confusion_matrix(logits, labels, classes).tolist(),
    }


def latency(mean_ms: float, *, seed: int = 0, clock: str = "wall", cov: float = 0.01) -> dict[str, Any]:
    """Return a latency whose figures come from one set of times."""
    times = mean_ms * (1 + cov * np.random.default_rng(seed).gamma(4.0, 0.5, 200) - 2 * cov)
    p50, p90, p99 = np.percentile(times, [50, 90, 99]).tolist()
    mean = float(times.mean())
    figures = {"mean": mean, "p50": p50, "p90": p90, "p99": p99}
    return {
        "iterations": len(times),
        **{f"{name}_ms": value for name, value in figures.items()},
        "cov": float(times.std()) / mean,
        "intervals": {name: {"low": value * 0.99, "high": value * 1.01} for name, value in figures.items()},
        "clock": clock,
        "rounds": [float(np.median(each)) for each in times.reshape(10, -1)],
    }


def timing(mean_ms: float, base: dict[str, Any] | None, *, seed: int, batch: int, device: bool) -> dict[str, Any]:
    """Return a timing; `base` is that of the baseline."""
    end_to_end = latency(mean_ms, seed=seed)
    made: dict[str, Any] = {"batch": batch, "end_to_end": end_to_end, "throughput": batch / end_to_end["mean_ms"] * 1e3}
    if device:
        made["device"] = latency(mean_ms * 0.8, seed=seed + 1000, clock="device events", cov=0.004)
    if base is not None:
        ratio = float(np.exp(np.mean(np.log(base["end_to_end"]["rounds"]) - np.log(end_to_end["rounds"]))))
        made |= {"ratio": ratio, "ratio_interval": {"low": ratio * 0.98, "high": ratio * 1.02}}
    return made


def energy(mean_ms: float, *, watts: float, batch: int = BATCH) -> dict[str, Any]:
    """Return an energy: power times time, over the samples."""
    seconds = 4.01
    samples = round(seconds / (mean_ms / 1000)) * batch
    joules, net = watts * seconds / samples, (watts - 20.0) * seconds / samples
    return {
        "source": "RAPL package counters", "device": "1 CPU package", "batch": batch, "seconds": seconds,
        "samples": samples, "watts": watts, "watts_low": watts * 0.97, "watts_high": watts * 1.03, "idle_watts": 20.0,
        "joules_per_sample": joules, "net_joules_per_sample": net, "visits": 4, "idle_watts_low": 19.5,
        "idle_watts_high": 20.5, "joules_low": joules * 0.97, "joules_high": joules * 1.03,
        "net_joules_low": net * 0.96, "net_joules_high": net * 1.04,
    }  # fmt: skip


def method(*, device: str, batches: Sequence[int]) -> dict[str, Any]:
    """Return how a row was measured."""
    gpu = device != "cpu"
    return {
        "versions": {"numpy": "2.3.0"}, "device": device, "hardware": "NVIDIA H100" if gpu else "AMD EPYC 9R14",
        "threads": 2, "batch_sizes": list(batches), "warmup": 10, "iterations": 200, "seconds": 0.5, "rounds": 10,
        "transfers": "inputs from host memory, outputs to host memory", "cuda_graph": True if gpu else None,
        "isolated": True,
    }  # fmt: skip


SPEEDS = {"torch-fp32": 3.0, "onnxruntime-fp32": 1.5, "onnxruntime-int8": 1.6, "onnxruntime-qdq": 0.9}
"""Mean milliseconds of a batch, by row name."""


class Builder:
    """Makes rows that agree with each other."""

    def __init__(self, *, seed: int = 0, speed: float = 1.0, device: str = "cpu", batches: Sequence[int] = (1, BATCH)):
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        noise = torch.randn(SAMPLES, CLASSES, generator=generator)
        self.base = noise + 3.0 * torch.nn.functional.one_hot(self.labels, CLASSES)
        self.seed, self.speed, self.device, self.batches = seed, speed, device, batches
        self.timings: dict[str, list[dict[str, Any]]] = {}

    def logits(self, name: str) -> torch.Tensor:
        """Return the float model's outputs, a little off; a quantized model's more so."""
        if name == "torch-fp32":
            return self.base
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + self.seed)
        scale = 1e-6 if name.endswith("fp32") else 0.2
        return self.base + scale * torch.randn(SAMPLES, CLASSES, generator=generator)

    def row(self, name: str, role: str) -> dict[str, Any]:
        """Return one row."""
        runtime, artifact = name.split("-", 1)
        logits, baseline = self.logits(name), name == "torch-fp32"
        made: dict[str, Any] = {
            "name": name, "runtime": runtime, "artifact": artifact, "role": role,
            "precision": "fp32" if artifact == "fp32" else "int8",
            "size_bytes": 400_000 if artifact == "fp32" else 110_000,
            "sha256": f"{sum(map(ord, name)):064x}", "metrics": classification_metrics(logits, self.labels, CLASSES),
        }  # fmt: skip
        if not baseline:
            accuracy = self.row("torch-fp32", "baseline")["metrics"]["values"]["accuracy"]
            value = made["metrics"]["values"]["accuracy"] - accuracy
            made["difference"] = {
                "metric": "accuracy",
                "value": value,
                "interval": {"low": value - 0.008, "high": value + 0.008},
            }
            made["agreement"] = self.agreement(self.base, logits)
        if role != "simulated" and name in SPEEDS:
            made |= self.measured(name)
        if runtime == "onnxruntime":
            made["provider"] = self.provider(integer=artifact != "fp32")
        return made

    def measured(self, name: str) -> dict[str, Any]:
        """Return what a row that is timed has."""
        mean_ms, base = SPEEDS[name] * self.speed, self.timings.get("torch-fp32")
        seed = sum(map(ord, name)) + self.seed
        timings = [
            timing(
                mean_ms * (0.3 + 0.7 * batch / BATCH),
                base[index] if base else None,
                seed=seed + index,
                batch=batch,
                device=self.device != "cpu",
            )
            for index, batch in enumerate(self.batches)
        ]
        self.timings[name] = timings
        calls = [timing[kind] for timing in timings for kind in ("end_to_end", "device") if kind in timing]
        timed = sum(each["mean_ms"] * each["iterations"] / 1000 for each in calls)
        made: dict[str, Any] = {
            "timings": timings,
            "energy": energy(
                timings[-1]["end_to_end"]["mean_ms"], watts=60.0 + sum(map(ord, name)) / 700, batch=self.batches[-1]
            ),
            "memory": {"host_mb": 50.0 + len(name)},
            "method": method(device=self.device, batches=self.batches),
            "measured_seconds": timed,
            "seconds": timed + 6.0,
        }
        if self.device != "cpu":
            made["gpu"] = {
                "sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 45, "power_w": 120.0,
                "power_limit_w": 700.0, "limits": [],
            }  # fmt: skip
        return made

    def agreement(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
        """Return how close outputs are."""
        error = (after - before).abs().max().item()
        noise = ((after - before) ** 2).sum()
        return {
            "samples": SAMPLES, "max_error": error, "relative_error": error / before.abs().max().item(),
            "sqnr_db": 10 * torch.log10((before**2).sum() / noise).item() if noise else None,
            "label_agreement": (before.argmax(1) == after.argmax(1)).double().mean().item(),
        }  # fmt: skip

    def provider(self, *, integer: bool) -> dict[str, Any]:
        """Return what ONNX Runtime did."""
        name = "CPUExecutionProvider" if self.device == "cpu" else "CUDAExecutionProvider"
        kernels = {"integer_convolutions": 3 if integer else 0, "integer_products": 0, "float_convolutions": 0}
        return {"asked": name, "got": [name], "nodes": {name: 9}, "kernels": kernels}

    def rung(self, source: str, target: str) -> dict[str, Any]:
        """Return a step of the ladder."""
        before, after = (
            classification_metrics(self.logits(name), self.labels, CLASSES)["values"]["accuracy"]
            for name in (source, target)
        )
        agreement = self.agreement(self.logits(source), self.logits(target))
        return {
            "source": source, "target": target, "metric_before": before, "metric_after": after,
            "agreement": agreement, "holds": True,
        }  # fmt: skip


def raw_report(**options: Any) -> dict[str, Any]:
    """Return a sound report as plain values; see `Builder` for the options."""
    builder = Builder(**options)
    roles = {
        "torch-fp32": "baseline", "torch-int8-ptq": "simulated", "torch-int8": "simulated", "onnxruntime-fp32": "float",
        "onnxruntime-int8": "deployed", "onnxruntime-qdq": "deployed",
    }  # fmt: skip
    rows = [builder.row(name, role) for name, role in roles.items()]
    rows.append(
        {
            "name": "tensorrt-int8", "runtime": "tensorrt", "artifact": "int8", "role": "deployed", "precision": "int8",
            "size_bytes": 90_000, "sha256": "f" * 64, "not_run": "no NVIDIA driver here",
        }
    )  # fmt: skip
    layers = [
        {"name": "conv1", "type": "Conv2d", "asked": "int8", "exported": "int8", "executed": "int8",
         "verdict": "as asked", "ms": None},
        {"name": "bn1", "type": "BatchNorm2d", "asked": "int8", "exported": "folded into conv1", "executed": "",
         "verdict": "nothing to run", "ms": None},
    ]  # fmt: skip
    metrics = rows[1]["metrics"]
    return {
        "schema_version": 2, "masert": "0.1.0", "run": "digits", "created": "2026-11-23T09:00:00+00:00", "verdict": "",
        "task": {"name": "classification", "primary": "accuracy", "higher_is_better": True},
        "samples": {"data": "digits", "split": "test", "available": SAMPLES, "evaluated": SAMPLES, "batch_size": BATCH,
                    "sha256": "a" * 64},
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "threads": 2, "gpus": [], "system": "Linux", "python": "3.11.9",
                    "versions": {"torch": "2.13.0"}},
        "baseline": "torch-fp32", "result": "onnxruntime-qdq", "rows": rows,
        "drift": [builder.rung("torch-fp32", "torch-int8-ptq"), builder.rung("torch-int8", "onnxruntime-int8")],
        "precision": {"runtime": "tensorrt", "version": "10.13", "observed_from": "inspector", "summary": "",
                      "layers": layers},
        "calibration": {"methods": [{"name": name, "metrics": metrics, "chosen": name == "mse"}
                                    for name in ("max", "mse")]},
        "finetuning": {"epochs": [{"epoch": epoch, "loss": 0.1, "validation": metrics} for epoch in (0, 1)],
                       "best_epoch": 1},
        "wall_seconds": sum(row.get("seconds", 0.0) for row in rows) + 5.0,
        "config": {"run": {"name": "digits"}, "analyze": {"split": "test"}},
    }  # fmt: skip


def regression_report() -> Report:
    """Return a sound report of a regression, where less is better."""
    raw = raw_report()
    raw["task"] = {"name": "regression", "primary": "mse", "higher_is_better": False}
    raw |= {"drift": [], "calibration": None, "finetuning": None}
    for index, row in enumerate(row for row in raw["rows"] if row.get("metrics")):
        mse = 0.25 + index / 1000
        row["metrics"] = {"samples": SAMPLES, "loss": mse, "values": {"mse": mse, "mae": mse**0.5 * 0.8, "r2": 0.9}}
        if "difference" in row:
            interval = {"low": mse - 0.252, "high": mse - 0.248}
            row["difference"] = {"metric": "mse", "value": mse - 0.25, "interval": interval}
            row["agreement"]["label_agreement"] = None
    return Report.model_validate(raw)


def report(*, spoil: Callable[[dict[str, Any]], object] | None = None, **options: Any) -> Report:
    """Return a sound report; `spoil` changes its plain values first."""
    raw = raw_report(**options)
    if spoil is not None:
        spoil(raw)
    return Report.model_validate(raw)


def row(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a row of a report's plain values."""
    return next(row for row in raw["rows"] if row["name"] == name)
