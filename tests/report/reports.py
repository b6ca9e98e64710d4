"""Reports in the shape of real runs: a CNN on the digits with a CPU, VGG7 on CIFAR-10 with a GPU, and odd ones."""

import math
import random

from maseRT.report.schema import Report

POINTS = ("mean", "p50", "p90", "p99")


def latency(p50_ms, *, spread=0.012, clock="wall", iterations=400):
    values = dict(zip(POINTS, (1.01 * p50_ms, p50_ms, 1.06 * p50_ms, 1.19 * p50_ms), strict=True))
    return {
        "iterations": iterations,
        **{f"{name}_ms": value for name, value in values.items()},
        "cov": 0.031,
        "intervals": {name: interval(value, spread * value) for name, value in values.items()},
        "clock": clock,
    }


def interval(value, half):
    return {"low": value - half, "high": value + half}


def timing(batch, p50_ms, *, base_ms=None, device_ms=None, spread=0.012):
    found = {"batch": batch, "end_to_end": latency(p50_ms, spread=spread), "throughput": 1e3 * batch / (1.01 * p50_ms)}
    if device_ms is not None:
        found["device"] = latency(device_ms, spread=0.002, clock="device events")
    if base_ms is not None:
        ratio = base_ms / p50_ms
        found |= {"ratio": ratio, "ratio_interval": interval(ratio, 1.4 * spread * ratio)}
    return found


def metrics(samples, accuracy, *, loss, classes=10, matrix=True, seed=0):
    """Metrics of a classifier whose confusion matrix has so many right answers."""
    chance = random.Random(seed)
    per_class = [samples // classes + (index < samples % classes) for index in range(classes)]
    confusion = [[0] * classes for _ in range(classes)]
    for true, count in enumerate(per_class):
        confusion[true][true] = count
    for _ in range(round(samples * (1 - accuracy))):
        true = chance.randrange(classes)
        if confusion[true][true]:
            confusion[true][true] -= 1
            confusion[true][(true + chance.choice((1, 2, 5))) % classes] += 1
    right = sum(confusion[index][index] for index in range(classes)) / samples
    recall = sum(confusion[index][index] / per_class[index] for index in range(classes)) / classes
    precision = (
        sum(confusion[index][index] / max(sum(line[index] for line in confusion), 1) for index in range(classes))
        / classes
    )
    f1 = 2 * precision * recall / (precision + recall) - 1e-4 if precision + recall else 0.0
    values = {"accuracy": right, "precision": precision, "recall": recall, "f1": f1}
    return {"samples": samples, "loss": loss, "values": values, "confusion": confusion if matrix else None}


def agreement(samples, share, sqnr_db):
    return {
        "samples": samples,
        "max_error": 0.2895,
        "relative_error": 0.0232,
        "sqnr_db": sqnr_db,
        "label_agreement": share,
    }


def method(*, device="cpu", hardware="AMD EPYC", batches=(64, 1), gpu=False, **versions):
    return {
        "versions": versions,
        "device": device,
        "hardware": hardware,
        "threads": 2,
        "batch_sizes": list(batches),
        "warmup": 10,
        "iterations": 400,
        "rounds": 20,
        "transfers": "inputs from host memory, outputs to host memory",
        "cuda_graph": True if gpu else None,
        "isolated": True,
    }


def energy(watts, joules, *, batch=64, source="RAPL package counters", device="1 CPU package"):
    seconds = 3.2
    return {
        "source": source,
        "device": device,
        "batch": batch,
        "seconds": seconds,
        "samples": round(watts * seconds / joules),
        "watts": watts,
        "watts_low": 0.98 * watts,
        "watts_high": 1.02 * watts,
        "idle_watts": 21.0,
        "joules_per_sample": joules,
        "net_joules_per_sample": joules * (1 - 21.0 / watts),
    }


def row(name, role, precision, size, **more):
    runtime = next(each for each in ("tensorrt-rtx", "tensorrt", "onnxruntime", "torch") if name.startswith(each))
    return {
        "name": name,
        "runtime": runtime,
        "artifact": name.removeprefix(f"{runtime}-"),
        "role": role,
        "precision": precision,
        "size_bytes": size,
        "sha256": f"{sum(map(ord, name)):064x}",
        **more,
    }


def change(value, half):
    return {"metric": "accuracy", "value": value, "interval": interval(value, half)}


def histogram(tensor, seed, *, amax=None, top=4.0, bins=2048, values=2_000_000):
    width = top / 9
    counts = [
        int(values / bins * 9 * math.exp(-index * top / bins / width) * (1 + 0.05 * math.sin(seed + index)))
        for index in range(bins)
    ]
    return {"tensor": tensor, "amax": top if amax is None else amax, "top": top, "counts": counts}


def layer(name, kind, asked, exported=None, executed=None, verdict="as asked", ms=None):
    exported = asked if exported is None else exported
    executed = exported if executed is None else executed
    return {
        "name": name,
        "type": kind,
        "asked": asked,
        "exported": exported,
        "executed": executed,
        "verdict": verdict,
        "ms": ms,
    }


def vgg7_layers(*, timed):
    layers, number = [], 0
    for block in range(6):
        conv = f"feature_layers.{number}"
        cost = (0.021, 0.074, 0.038, 0.069, 0.036, 0.066)[block]
        layers.append(layer(conv, "Conv2d", "int8", ms=cost if timed else None))
        layers.append(
            layer(f"feature_layers.{number + 1}", "BatchNorm2d", "fp16", f"folded into {conv}", "", "nothing to run")
        )
        layers.append(layer(f"feature_layers.{number + 2}", "ReLU", "fp16", "fp16", f"fused into {conv}", "fused"))
        number += 3
        if block % 2:
            layers.append(layer(f"feature_layers.{number}", "MaxPool2d", "int8", ms=0.006 if timed else None))
            number += 1
    layers.append(layer("classifier.0", "Linear", "int8", ms=0.031 if timed else None))
    layers.append(layer("classifier.1", "ReLU", "fp16", "fp16", "fused into classifier.0", "fused"))
    layers.append(layer("classifier.2", "Linear", "fp16", ms=0.009 if timed else None))
    layers.append(layer("classifier.3", "ReLU", "fp16", "fp16", "fused into classifier.2", "fused"))
    layers.append(layer("last_layer", "Linear", "fp16", ms=0.003 if timed else None))
    return layers


def calibration(samples, tensors, *, base=0.99):
    chosen = "mse"
    found = [("max", 0.0, 41.0), ("entropy", -0.0044, 39.1), ("mse", 0.0022, 42.4), ("percentile-99.9", -0.0131, 35.6)]
    return {
        "methods": [
            {
                "name": name,
                "metrics": metrics(samples, base + shift, loss=0.0347 - shift, matrix=False),
                "mean_sqnr_db": sqnr,
                "chosen": name == chosen,
            }
            for name, shift, sqnr in found
        ],
        "histograms": [
            histogram(tensor, seed, amax=2.9 if seed % 2 else None, top=4.0 + seed)
            for seed, tensor in enumerate(tensors)
        ],
    }


def learning(samples, *, epochs, first, best):
    found = []
    for epoch in range(epochs + 1):
        loss = None if epoch == 0 else 0.9 * math.exp(-epoch / 3) + 0.01
        accuracy = best - (best - first) * math.exp(-epoch)
        validation = metrics(samples, accuracy, loss=1.0 * math.exp(-epoch / 3) + 0.03, matrix=False)
        found.append({"epoch": epoch, "loss": loss, "validation": validation})
    return {"epochs": found, "best_epoch": epochs - 1}


CONFIG = {
    "run": {"seed": 0, "threads": 2, "device": "auto"},
    "model": {"name": "digits-cnn", "args": {"channels": 32}, "allow_globals": [], "random_weights": False},
    "data": {"name": "digits", "batch_size": 64, "validation": 0.15, "test": 0.15, "workers": 0},
    "train": {"epochs": 15, "learning_rate": 0.002, "optimizer": "adam", "weight_decay": 0.0, "schedule": "cosine"},
    "quantize": {
        "precision": "int8",
        "float": "fp16",
        "rules": [{"name": "last_layer", "precision": "fp16"}],
        "placement": "tensorrt",
        "overflow": "keep-fp32",
    },
    "calibrate": {"batches": 10, "methods": ["max", "entropy", "mse", {"percentile": 99.9}], "weights": "max"},
    "finetune": {"epochs": 2, "initial_learning_rate": 1e-5, "learned_amax": False},
    "export": {"opset": 20, "targets": ["tensorrt", "onnxruntime-cpu"]},
    "build-engine": {"runtime": "auto", "batch": {"min": 1, "opt": 64, "max": 64}, "tf32": True},
    "analyze": {
        "runtimes": ["torch", "onnxruntime", "tensorrt"],
        "split": "test",
        "batch_sizes": [64, 1],
        "drift": {"accuracy_drop": 0.02, "agreement": 0.95},
    },
    "gate": {"max_accuracy_drop": 0.005, "min_speedup": {"over": "torch-fp32", "ratio": 2.0}},
}


def digits():
    """A CPU run as plain values: ONNX Runtime wins, the engine did not run."""
    n, base = 270, 2.5575
    cpu = {"cpu": "AMD EPYC 9R14", "cores": 2, "threads": 2, "gpus": [], "system": "Linux 6.8", "python": "3.11.7"}
    versions = {"torch": "2.13.0+cpu", "onnx": "1.23.2", "onnxruntime": "1.31.1", "numpy": "2.4.6"}
    ort = method(onnxruntime="1.31.1")
    provider = {
        "asked": "CPUExecutionProvider",
        "got": ["CPUExecutionProvider"],
        "nodes": {"CPUExecutionProvider": 14},
        "kernels": {"integer_convolutions": 3, "integer_products": 1, "float_convolutions": 0},
    }
    rows = [
        row(
            "torch-fp32", "baseline", "fp32", 94408,
            metrics=metrics(n, 0.9852, loss=0.045330634382035995),
            timings=[timing(64, base), timing(1, 0.3121)],
            memory={"host_mb": 61.2}, method=method(torch="2.13.0+cpu"), seconds=9.1, measured_seconds=2.0,
            energy=energy(61.0, 0.00251),
        ),
        row(
            "torch-int8-ptq", "simulated", "int8", 93568,
            metrics=metrics(n, 0.9815, loss=0.0461, seed=1),
            difference=change(-0.0037, 0.0081), agreement=agreement(n, 0.9926, 32.61), seconds=1.4,
        ),
        row(
            "torch-int8", "simulated", "int8", 93568,
            metrics=metrics(n, 0.9852, loss=0.04565960831112332, seed=2),
            difference=change(0.0, 0.0074), agreement=agreement(n, 1.0, 33.74), seconds=1.3,
        ),
        row(
            "onnxruntime-fp32", "float", "fp32", 95186,
            metrics=metrics(n, 0.9852, loss=0.045330640784016364),
            difference=change(0.0, 0.0), agreement=agreement(n, 1.0, 132.64),
            timings=[timing(64, 0.7454, base_ms=base), timing(1, 0.0412, base_ms=0.3121)],
            memory={"host_mb": 24.0}, method=ort, provider=provider, seconds=8.0, measured_seconds=2.0,
            energy=energy(58.2, 0.000702),
        ),
        row(
            "onnxruntime-int8", "deployed", "int8", 100178,
            metrics=metrics(n, 0.9852, loss=0.045671469414675675, seed=3),
            difference=change(0.0, 0.0074), agreement=agreement(n, 1.0, 33.73),
            timings=[timing(64, 0.9312, base_ms=base), timing(1, 0.0530, base_ms=0.3121)],
            memory={"host_mb": 25.1}, method=ort, provider=provider, seconds=8.1, measured_seconds=2.0,
            energy=energy(57.9, 0.000871),
        ),
        row(
            "onnxruntime-qdq", "deployed", "int8", 37120,
            metrics=metrics(n, 0.9815, loss=0.0459, seed=4),
            difference=change(-0.0037, 0.0074), agreement=agreement(n, 0.9963, 33.10),
            timings=[timing(64, 0.5171, base_ms=base), timing(1, 0.0331, base_ms=0.3121)],
            memory={"host_mb": 22.4}, method=ort, provider=provider, seconds=8.1, measured_seconds=2.0,
            energy=energy(56.1, 0.000478),
        ),
        row(
            "tensorrt-rtx-int8", "deployed", "int8", 759212,
            not_run="no NVIDIA driver here (libnvidia-ml.so.1 does not load)",
        ),
    ]  # fmt: skip
    return {
        "masert": "0.1.0",
        "run": "digits-int8",
        "created": "2026-11-23T09:00:00Z",
        "task": {"name": "classification", "primary": "accuracy", "higher_is_better": True},
        "samples": {
            "data": "digits",
            "split": "test",
            "available": n,
            "evaluated": n,
            "batch_size": 64,
            "sha256": "9f" * 32,
        },
        "machine": {**cpu, "versions": versions},
        "baseline": "torch-fp32",
        "result": "onnxruntime-qdq",
        "rows": rows,
        "drift": [
            rung("torch-fp32", "torch-int8-ptq", 0.9852, 0.9815, agreement(n, 0.9926, 32.61)),
            rung("torch-int8-ptq", "torch-int8", 0.9815, 0.9852, agreement(n, 0.9926, 36.2)),
            rung("torch-int8", "onnxruntime-qdq", 0.9852, 0.9815, agreement(n, 0.9963, 41.9)),
        ],
        "precision": {
            "runtime": "tensorrt-rtx",
            "version": "1.7.1.116",
            "observed_from": "build log",
            "summary": "7 as asked, 6 fused, 3 nothing to run (from the build log)",
            "layers": vgg7_layers(timed=False),
            "told": ["2 of 15 kernels only change types or layouts"],
        },
        "calibration": calibration(229, ["conv1.input", "conv1.weight", "conv2.input", "conv2.weight", "fc.input"]),
        "training": learning(229, epochs=15, first=0.21, best=0.991),
        "finetuning": learning(229, epochs=2, first=0.982, best=0.991),
        "notes": ["layer4: kept in FP32, its weights overflow FP16"],
        "wall_seconds": 41.2,
        "config": CONFIG,
    }


def rung(source, target, before, after, agreed, **more):
    return {
        "source": source,
        "target": target,
        "metric_before": before,
        "metric_after": after,
        "agreement": agreed,
        "holds": True,
        **more,
    }


def vgg7():
    """A GPU run as plain values: the engine runs, one rung falls, one gate fails, the self-audit has findings."""
    n, base = 10_000, 1.9821
    gpu = {
        "sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 44, "power_w": 213.0, "power_limit_w": 700.0,
        "limits": [],
    }  # fmt: skip
    common = {"device": "cuda:0", "hardware": "NVIDIA H200", "gpu": True, "batches": (64, 1, 256)}

    def fast(scale, device, **more):
        return {
            "timings": [
                timing(64, scale, base_ms=base, device_ms=device, spread=0.004),
                timing(1, 0.31 * scale, base_ms=0.31 * base * 0.7, device_ms=0.2 * device, spread=0.004),
                timing(256, 3.4 * scale, base_ms=3.6 * base, device_ms=3.5 * device, spread=0.004),
            ],
            "gpu": gpu,
            "seconds": 14.2,
            "measured_seconds": 6.0,
            "memory": {"host_mb": 812.4, "device_mb": 402.0},
            **more,
        }

    def counted(watts, joules):
        return energy(watts, joules, source="NVML total energy counter", device="NVIDIA H200")

    trt = method(**common, tensorrt="10.13.2")
    rows = [
        row(
            "torch-fp32", "baseline", "fp32", 56_113_000,
            metrics=metrics(n, 0.9312, loss=0.2451),
            **{**fast(base, 1.72, method=method(**common, torch="2.13.0+cu130")),
               "timings": [timing(64, base, device_ms=1.72), timing(1, 0.4301, device_ms=0.39),
                           timing(256, 7.1, device_ms=6.4)]},
            energy=counted(402.0, 0.01223),
        ),
        row("torch-int8-ptq", "simulated", "int8", 56_112_000, metrics=metrics(n, 0.9281, loss=0.2561, seed=1),
            difference=change(-0.0031, 0.0018), agreement=agreement(n, 0.981, 24.2), seconds=5.0),
        row("torch-int8", "simulated", "int8", 56_112_000, metrics=metrics(n, 0.9305, loss=0.2467, seed=2),
            difference=change(-0.0007, 0.0016), agreement=agreement(n, 0.989, 26.8), seconds=5.0),
        row("onnxruntime-fp32", "float", "fp32", 56_130_000, metrics=metrics(n, 0.9312, loss=0.2451000317),
            difference=change(0.0, 0.0), agreement=agreement(n, 1.0, 121.0),
            **fast(1.412, 1.31, method=method(**common, onnxruntime="1.31.1")), energy=counted(388.0, 0.00861)),
        row("onnxruntime-int8", "deployed", "int8", 56_190_000, metrics=metrics(n, 0.9303, loss=0.24691, seed=3),
            difference=change(-0.0009, 0.0016), agreement=agreement(n, 0.989, 26.7),
            **fast(1.703, 1.58, method=method(**common, onnxruntime="1.31.1")), energy=counted(371.0, 0.00992)),
        row("tensorrt-fp16", "float", "fp16", 28_301_000, metrics=metrics(n, 0.9312, loss=0.24512, seed=5),
            difference=change(0.0, 0.0003), agreement=agreement(n, 0.9996, 61.3),
            **fast(0.4862, 0.4113, method=trt), energy=counted(431.0, 0.003271)),
        row("tensorrt-int8", "deployed", "int8", 14_411_000, metrics=metrics(n, 0.9302, loss=0.24713, seed=6),
            difference=change(-0.0010, 0.0006), agreement=agreement(n, 0.9887, 26.6),
            **fast(0.3602, 0.2951, method=trt), energy=counted(398.0, 0.002251)),
        row("tensorrt-rtx-int8", "deployed", "int8", 0, not_run="the engine was built by tensorrt"),
    ]  # fmt: skip
    layers = vgg7_layers(timed=True)
    layers[6] = layer("feature_layers.6", "MaxPool2d", "int8", "int8", "fp16", "differs", 0.011)
    found = digits()
    return {
        **found,
        "run": "vgg7-cifar10-int8",
        "samples": {
            "data": "cifar10",
            "split": "test",
            "available": n,
            "evaluated": n,
            "batch_size": 64,
            "sha256": "4e" * 32,
        },
        "machine": {**found["machine"], "gpus": ["NVIDIA H200"], "driver": "580.82.07"},
        "result": "tensorrt-int8",
        "rows": rows,
        "drift": [
            rung("torch-fp32", "torch-int8-ptq", 0.9312, 0.9281, agreement(n, 0.981, 24.2)),
            rung("torch-int8-ptq", "torch-int8", 0.9281, 0.9305, agreement(n, 0.986, 25.0)),
            rung("torch-int8", "onnxruntime-int8", 0.9305, 0.9303, agreement(n, 0.9991, 48.1)),
            rung(
                "onnxruntime-int8",
                "tensorrt-int8",
                0.9303,
                0.9302,
                agreement(n, 0.9423, 21.3),
                holds=False,
                divergence={"layer": "feature_layers.6", "sqnr_db": 19.2, "before": "feature_layers.3", "compared": 9},
            ),
        ],
        "precision": {
            "runtime": "tensorrt",
            "version": "10.13.2",
            "observed_from": "inspector",
            "summary": "9 as asked, 1 differs, 8 fused, 6 nothing to run (from the inspector)",
            "layers": layers,
            "told": [
                "3 of 18 kernels only change types or layouts, 4.1 % of the time",
                "feature_layers.6 (MaxPool2d): asked int8, runs in fp16",
            ],
        },
        "calibration": calibration(
            5000,
            [f"feature_layers.{each}.{kind}" for each in (0, 3, 7, 10, 14, 17) for kind in ("input", "weight")],
            base=0.93,
        ),
        "findings": [
            {
                "check": "latency-spread",
                "severity": "warning",
                "row": "onnxruntime-int8",
                "message": "the coefficient of variation is 31 %: the median is less sure than it looks",
            },
            {
                "check": "precision",
                "severity": "error",
                "row": "tensorrt-int8",
                "message": "1 layer does not run as asked: feature_layers.6",
            },
        ],
        "gates": [
            {
                "name": "max_accuracy_drop",
                "row": "tensorrt-int8",
                "asked": "accuracy drop of at most 0.005",
                "got": "0.0010 (0.0004 to 0.0016)",
                "passed": True,
            },
            {
                "name": "min_speedup",
                "row": "tensorrt-int8",
                "asked": "at least 6x torch-fp32",
                "got": "5.50x (5.47-5.53)",
                "passed": False,
            },
        ],
        "sections": [
            {
                "key": "sensitivity",
                "title": "Sensitivity",
                "values": {"float": {"loss": 0.2451}},
                "lines": [
                    "One layer quantized at a time: change of loss and accuracy on 5000 validation samples.",
                    "",
                    "| layer | loss | accuracy | SQNR |",
                    "| --- | ---: | ---: | ---: |",
                    "| feature_layers.0 | +0.004100 | -0.22% | 27.3 dB |",
                    "| feature_layers.3 | +0.000900 | -0.04% | 33.0 dB |",
                    "",
                    "To keep the worst layer in half precision, put this first into [quantize] rules:",
                    "",
                    "```toml",
                    '{ name = "feature_layers.0", precision = "fp16" },',
                    "```",
                ],
            }
        ],
        "wall_seconds": 131.0,
    }


def regression():
    """A run of a regression, where less is better, as plain values."""
    found = digits()
    for each in found["rows"]:
        if "metrics" in each:
            worse = 0.004 if each["precision"] == "int8" else 0.0
            each["metrics"] = {
                "samples": 270,
                "loss": 0.2512 + worse,
                "values": {"mse": 0.2512 + worse, "mae": 0.3911 + worse, "r2": 0.871 - worse},
            }
        if "difference" in each:
            value = each["metrics"]["values"]["mse"] - 0.2512
            each["difference"] = {"metric": "mse", "value": value, "interval": interval(value, 0.0021)}
        if "agreement" in each:
            each["agreement"]["label_agreement"] = None
    return {
        **found,
        "task": {"name": "regression", "primary": "mse", "higher_is_better": False},
        "drift": [],
        "calibration": None,
        "training": None,
        "finetuning": None,
    }


def huge(layers=300):
    """A run of a deep model, as plain values."""
    found = vgg7()
    names = [f"blocks.{index // 6}.part{index % 6}.projection" for index in range(layers)]
    found["precision"]["layers"] = [
        layer(name, "Linear", "int8" if index % 7 else "fp16", ms=0.01 * (1 + index % 5))
        for index, name in enumerate(names)
    ]
    found["calibration"] = calibration(5000, [f"{name}.{kind}" for name in names for kind in ("input", "weight")])
    return found


def nothing_ran():
    """A run whose deployed models could not run here, as plain values."""
    found = digits()
    for each in found["rows"]:
        if each["role"] in ("float", "deployed"):
            for key in ("metrics", "difference", "agreement", "timings", "energy", "memory", "method", "provider"):
                each.pop(key, None)
            each["not_run"] = "onnxruntime is not installed"
    return {**found, "result": "", "drift": found["drift"][:1]}


def bare():
    """The least that a report can hold, as plain values."""
    found = digits()
    keys = ("masert", "run", "created", "task", "samples", "machine", "baseline", "wall_seconds")
    return {**{key: found[key] for key in keys}, "rows": found["rows"][:1], "config": {}}


def make(raw, **changes):
    """Return the report of plain values, some changed."""
    return Report.model_validate({**raw, **changes})
