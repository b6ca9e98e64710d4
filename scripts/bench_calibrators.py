"""Entropy calibration, maseRT against pytorch-quantization 2.1.3: time summed over all tensors of a model.

    python scripts/bench_calibrators.py [--model digits-cnn] [--batches 4] [--batch-size 64] [--json FILE]

Both see the same tensors: inputs (of normal random images) and weights of every Conv2d and Linear, per tensor, since
that library collects histograms per tensor only. Both run one after the other in one process, on the CPU and on the GPU
when there is one. "compute" is the time from the collected histograms to the ranges, which the ratio is of; "collect"
is shown beside it. maseRT collects batch by batch; the library gets all batches at once, since its histograms grow
(and its entropy gets slower) with every batch of a larger range. Of maseRT the median of five runs counts, of the
library one run (it takes seconds a tensor). "within a bin" counts the tensors whose two ranges differ by at most the
width of one of 2048 bins.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from absl import logging
from pytorch_quantization.calib import HistogramCalibrator
from torch import Tensor, nn

from maseRT.models.zoo import ZOO
from maseRT.precision import QuantSpec
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.histogram import Histogram

T = TypeVar("T")
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn", choices=sorted(ZOO))
    parser.add_argument("--image-size", type=int, help="height and width; default: the model's own")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = [measure(arguments, device) for device in devices]
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    entry = ZOO[arguments.model]
    shape = entry.input_shape
    if arguments.image_size:
        shape = (shape[0], arguments.image_size, arguments.image_size)
    module, _, function = entry.factory.partition(":")
    factory = getattr(import_module(module), function)
    model = factory(num_classes=entry.num_classes, input_shape=shape).eval().to(device)
    batches = [torch.randn(arguments.batch_size, *shape, device=device) for _ in range(arguments.batches)]
    tensors = tensors_of(model, batches)
    ours, our_collect = timed(device, lambda: collected_here(tensors))
    amax, our_compute = median_of(device, lambda: amax_from_histograms(ours, lambda _: Method("entropy")))
    theirs, their_collect = timed(device, lambda: collected_there(tensors))
    expected, their_compute = timed(device, lambda: {name: c.compute_amax("entropy") for name, c in theirs.items()})
    off = [abs(float(amax[n]) - float(expected[n])) / float(ours[n].bins().width) for n in ours]
    return {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "tensors": len(tensors),
        "values": sum(batch.numel() for seen in tensors.values() for batch in seen),
        "maseRT_collect_s": our_collect,
        "maseRT_compute_s": our_compute,
        "library_collect_s": their_collect,
        "library_compute_s": their_compute,
        "compute_ratio": our_compute / their_compute,
        "collect_ratio": our_collect / their_collect,
        "within_one_bin": sum(bins <= 1.001 for bins in off),
        "largest_difference_bins": max(off),
        "median_difference_bins": statistics.median(off),
    }


def tensors_of(model: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """Return name -> one tensor a batch for inputs, one for weights."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    tensors: dict[str, list[Tensor]] = {f"{name}.input": [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: tensors[f"{name}.input"].append(inputs[0].detach())
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {n: seen for n, seen in tensors.items() if seen} | {
        f"{name}.weight": [layer.weight.detach()] for name, layer in layers.items()
    }


def collected_here(tensors: dict[str, list[Tensor]]) -> dict[str, Histogram]:
    histograms = {name: Histogram(QuantSpec(), device=seen[0].device) for name, seen in tensors.items()}
    for name, seen in tensors.items():
        for x in seen:
            histograms[name].collect(x, where=name)
    return histograms


def collected_there(tensors: dict[str, list[Tensor]]) -> dict[str, HistogramCalibrator]:
    calibrators = {name: HistogramCalibrator(8, None, False) for name in tensors}
    for name, seen in tensors.items():
        calibrators[name].collect(torch.cat(seen))
    return calibrators


def timed(device: str, action: Callable[[], T]) -> tuple[T, float]:
    synchronize(device)
    start = time.perf_counter()
    result = action()
    synchronize(device)
    return result, time.perf_counter() - start


def median_of(device: str, action: Callable[[], T]) -> tuple[T, float]:
    """Return the result and the median of several runs, the first one included."""
    runs = [timed(device, action) for _ in range(REPEATS)]
    return runs[0][0], statistics.median(seconds for _, seconds in runs)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(results: list[dict[str, Any]]) -> None:
    print(f"{'device':<14}{'tensors':>8}{'':>10}{'maseRT s':>10}{'library s':>11}{'ratio':>9}{'within a bin':>14}")
    for r in results:
        for what in ("compute", "collect"):
            times = f"{r[f'maseRT_{what}_s']:>10.4f}{r[f'library_{what}_s']:>11.3f}{r[f'{what}_ratio']:>9.4f}"
            same = f"{r['within_one_bin']}/{r['tensors']}" if what == "compute" else ""
            print(f"{r['device'][:13]:<14}{r['tensors']:>8}{what:>10}{times}{same:>14}")


if __name__ == "__main__":
    main()
