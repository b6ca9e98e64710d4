"""Times a model on the CPU in torch, ONNX Runtime and OpenVINO, float and INT8, interleaved in one process.

    OMP_NUM_THREADS=2 python scripts/bench_cpu.py --threads 2 --batch 1 --markdown cpu.md

Needs onnxruntime. OpenVINO and NNCF take part where `openvino` and `nncf` are installed, torch.compile where a C++
compiler is. Every round runs every variant in turn, so that what disturbs the machine disturbs all of them alike; a
variant's ratio is the median over the rounds of its time over that of ONNX Runtime's FP32 in the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from torch import nn

from maseRT.config import ModelSection, QuantizeSection
from maseRT.hardware import cpu
from maseRT.measure import wall_times_ms
from maseRT.models.build import build_model
from maseRT.onnx_export import export_onnx
from maseRT.onnxrt.forms import cpu_form, openvino_form
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import SessionSettings
from maseRT.onnxrt.quantizers import StaticSettings, preprocess, quantize_dynamic, quantize_static
from maseRT.onnxrt.ranges import measure_ranges
from maseRT.quant import make_plan, quantize_model
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.observe import load_amax, observe
from maseRT.runtimes.onnxruntime import OnnxRuntime

BASE = "ORT FP32"
TARGETS = {
    ("ORT CPU form", "vgg7"): 3.2,
    ("ORT CPU form", "resnet18"): 2.5,
    ("ORT CPU form", "mobilenetv2"): 1.5,
    ("ORT CPU form", "transformer-d384"): 2.0,
    ("ORT quantize_dynamic", "lstm-classifier"): 1.5,
    ("OpenVINO, our form", "vgg7"): 7.0,
    ("OpenVINO, our form", "resnet18"): 7.0,
    ("OpenVINO, our form", "mobilenetv2"): 1.9,
    ("OpenVINO, our form", "transformer-d384"): 3.0,
}
"""What must be reached over ONNX Runtime's FP32, at batch 1 with two threads."""

LEAST_ROUNDS = 3

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Model:
    shape: tuple[int, ...]
    args: dict[str, int] = field(default_factory=dict)
    classes: int = 1000


MODELS = {
    "vgg7": Model((3, 32, 32), classes=10),
    "resnet18": Model((3, 224, 224)),
    "mobilenetv2": Model((3, 224, 224)),
    "mobilenetv3-small": Model((3, 224, 224)),
    "transformer-d384": Model((3, 224, 224)),
    "lstm-classifier": Model((64, 64), {"width": 256, "depth": 2}, classes=9),
}


@dataclass
class Variant:
    name: str
    run: Run
    kernels: str = ""
    times_ms: list[float] = field(default_factory=list)
    error: float = 0.0


@dataclass(frozen=True)
class Files:
    """A model's files, and what torch computes of it."""

    folder: Path
    module: nn.Module
    inputs: np.ndarray
    expected: np.ndarray

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def feeds(self) -> list[dict[str, np.ndarray]]:
        return [{"input": self.inputs[i : i + 8]} for i in range(0, 16, 8)]


def inputs_of(shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Return noise, smooth where it is an image: white noise has none of the large areas that images have."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, *shape, generator=generator)
    if len(shape) != 3:
        return noise
    coarse = torch.randn(count, shape[0], shape[1] // 8, shape[2] // 8, generator=generator)
    return nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear") + 0.2 * noise


def prepare(name: str, folder: Path) -> Files:
    """Build, quantize, calibrate and export a model with random weights; write every file that is timed."""
    torch.manual_seed(0)
    spec = MODELS[name]
    section = ModelSection(name=name, args=spec.args, random_weights=True)

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = build_model(section, num_classes=spec.classes, input_shape=spec.shape)
        settle_batchnorms(model, x)
        return model

    x = inputs_of(spec.shape, 32)
    module = build()
    with torch.inference_mode():
        files = Files(folder, module, x.numpy(), module(x).numpy())
    export_onnx(module, x[:2], files.path("float"), opset=20)
    quantized = build()
    quantize_model(quantized, make_plan(quantized, x[:2], QuantizeSection(), model_name=name))
    with torch.inference_mode(), observe(quantized) as histograms:
        for start in (0, 8):
            quantized(x[start : start + 8])
    load_amax(quantized, amax_from_histograms(histograms, lambda tensor: Method("max")))
    export_onnx(quantized, x[:2], files.path("symmetric"), opset=20)
    model = onnx.load(files.path("symmetric"))

    def ranges_of(m: onnx.ModelProto, names: Sequence[str]) -> Mapping[str, tuple[float, float]]:
        return measure_ranges(m, names, files.feeds())

    onnx.save(cpu_form(model, ranges_of)[0], files.path("cpu"))
    onnx.save(openvino_form(model, ranges_of)[0], files.path("openvino"))
    preprocess(files.path("float"), files.path("prepared"))
    quantize_static(files.path("prepared"), files.path("static"), files.feeds(), StaticSettings())
    quantize_dynamic(files.path("prepared"), files.path("dynamic"))
    return files


def settle_batchnorms(model: nn.Module, x: torch.Tensor) -> None:
    """Give BatchNorms the statistics of the inputs, so that activations are of a size that a trained network has."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.momentum = None
    if norms:
        model.train()
        with torch.no_grad():
            model(x[:16])
    model.eval()


def variants(files: Files, *, threads: int, skip: list[str]) -> Iterator[Variant]:
    torch.set_num_threads(threads)
    yield Variant("torch eager", torch_run(files.module))
    if "torch.compile" not in skip:
        compiled = torch.compile(files.module)
        yield Variant("torch.compile FP32", torch_run(compiled))
        if has_bf16():
            yield Variant("torch.compile BF16", torch_run(compiled, torch.bfloat16))
    for label, name in (
        (BASE, "float"),
        ("ORT, symmetric export", "symmetric"),
        ("ORT CPU form", "cpu"),
        ("ORT quantize_static", "static"),
        ("ORT quantize_dynamic", "dynamic"),
    ):
        yield ort_variant(label, files.path(name), threads)
    if find_spec("openvino"):
        yield from openvino_variants(files, threads=threads, skip=skip)


def torch_run(model: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> Run:
    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return model(torch.from_numpy(x)).float().numpy()

    return run


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def ort_variant(label: str, path: Path, threads: int) -> Variant:
    settings = SessionSettings(threads=threads)
    session = OnnxRuntime().open(path, settings=settings)
    kernels = kernels_of(path, "cpu", settings)
    return Variant(label, lambda x: session.infer({"input": x})["output"], kernels.describe() if kernels else "")


def openvino_variants(files: Files, *, threads: int, skip: list[str]) -> Iterator[Variant]:
    import openvino

    core = openvino.Core()

    def compiled(model: object, **options: str) -> Run:
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda x: request.infer({0: x})[0].copy()

    yield Variant("OpenVINO FP32", compiled(str(files.path("float")), INFERENCE_PRECISION_HINT="f32"))
    yield Variant("OpenVINO default", compiled(str(files.path("float"))))
    yield Variant("OpenVINO, our form", compiled(str(files.path("openvino"))))
    if find_spec("nncf") and "nncf" not in skip:
        import nncf

        data = nncf.Dataset([{"input": x} for feed in files.feeds() for x in feed["input"][:, None]])
        quantized = nncf.quantize(core.read_model(str(files.path("float"))), data, subset_size=16)
        yield Variant("NNCF", compiled(quantized))


def measure(found: list[Variant], x: np.ndarray, *, rounds: int, repeats: int, end: float) -> None:
    """Time every variant in turn; a run before the timed ones brings its weights back into the caches.

    No round but the first three begins after `end`, in seconds of the monotonic clock.
    """
    for variant in found:
        variant.times_ms.clear()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > end:
            return
        for variant in found:
            times = wall_times_ms(partial(variant.run, x), warmup=1, iterations=range(repeats))
            variant.times_ms.append(float(np.median(times)))


def rows_of(found: list[Variant], name: str, *, batch: int, threads: int) -> list[dict[str, object]]:
    base = np.array(next(variant for variant in found if variant.name == BASE).times_ms)
    rows = []
    for variant in found:
        times = np.array(variant.times_ms)
        ratios = base / times
        low, high = np.percentile(ratios, [25, 75]).tolist()
        target = TARGETS.get((variant.name, name)) if (batch, threads) == (1, 2) else None
        rows.append(
            {
                "model": name,
                "batch": batch,
                "threads": threads,
                "rounds": len(times),
                "variant": variant.name,
                "ms": float(np.median(times)),
                "ratio": float(np.median(ratios)),
                "ratio_quartiles": [low, high],
                "target": target,
                "error": variant.error,
                "kernels": variant.kernels,
            }
        )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    lines = []
    groups = dict.fromkeys((row["model"], row["batch"], row["threads"]) for row in rows)
    for model, batch, threads in groups:
        lines += [f"### {model}, batch {batch}, {threads} threads", ""]
        lines += ["| | ms | x ORT FP32 | asked for | error | kernels |", "|---|---:|---:|---:|---:|---|"]
        for row in rows:
            if (row["model"], row["batch"], row["threads"]) == (model, batch, threads):
                low, high = row["ratio_quartiles"]
                error, kernels = row["error"], row["kernels"]
                ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
                asked = f"{row['target']:.1f}" if row["target"] else ""
                lines.append(f"| {row['variant']} | {row['ms']:.2f} | {ratio} | {asked} | {error:.4f} | {kernels} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=["torch.compile", "nncf"])
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds of rounds for each model")
    parser.add_argument("--json", type=Path, help="where to write every number, after each model and thread count")
    parser.add_argument("--markdown", type=Path, help="where to write the tables, as often")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, object]] = []
    for name in options.models:
        with TemporaryDirectory() as folder:
            files = prepare(name, Path(folder))
            for threads in options.threads:
                rows += rows_with(files, name, threads, options)
                write(rows, options)


def rows_with(files: Files, name: str, threads: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure every variant of a model with so many threads, at every batch size, and print the tables."""
    found = list(variants(files, threads=threads, skip=options.skip))
    for variant in found:
        outputs = np.concatenate([variant.run(files.inputs[i : i + 16]) for i in (0, 16)])
        variant.error = float(np.linalg.norm(outputs - files.expected) / np.linalg.norm(files.expected))
    share = options.budget / len(options.threads) / len(options.batch)
    rows = []
    for batch in options.batch:
        end = time.monotonic() + share
        measure(found, files.inputs[:batch], rounds=options.rounds, repeats=options.repeats, end=end)
        rows += rows_of(found, name, batch=batch, threads=threads)
        print(markdown(rows[-len(found) :]), flush=True)
    del found
    gc.collect()
    return rows


def write(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps({"cpu": cpu().name, "rows": rows}, indent=1))
    if options.markdown:
        options.markdown.write_text(f"{cpu().name}, {cpu().cores} cores\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
