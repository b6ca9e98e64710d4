"""Time a training step of the float model and of its fake-quantized one, in turns.

    python scripts/bench_qat_step.py [--device cuda] [--threads 1] [--steps 40] [--learned]

The float model keeps its BatchNorms; in the quantized one they are folded. Prints medians and tenth percentiles in ms.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maseRT.config import ModelSection, QuantizeSection
from maseRT.models.build import build_model
from maseRT.quant import make_plan, quantize_model, quantizers
from maseRT.quant.fake_quant import max_abs
from maseRT.quant.qat import train_ranges

MODELS = {"digits-cnn": (1, 8, 8), "resnet18": (3, 32, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learned", action="store_true", help="train the activation ranges too (LSQ)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, shape in MODELS.items():
        x = torch.randn(args.batch, *shape)
        model = build_model(ModelSection(name=name), num_classes=10, input_shape=shape)
        plan = make_plan(model, x[:4], QuantizeSection(), model_name=name)
        quantized = with_max_ranges(quantize_model(copy.deepcopy(model), plan, master_weights=True), x)
        train_ranges(quantized, learned=args.learned, ties=plan.ties)
        models = {"float": model.to(args.device).train(), "quantized": quantized.to(args.device).train()}
        times = time_in_turns({key: step_of(m, x.to(args.device)) for key, m in models.items()}, args.steps)
        rows = {key: (quantile(values, 0.5), quantile(values, 0.1)) for key, values in times.items()}
        shown = ", ".join(f"{key} {median:.2f} (p10 {p10:.2f})" for key, (median, p10) in rows.items())
        ratios = [q / f for q, f in zip(rows["quantized"], rows["float"], strict=True)]
        print(f"{name} {args.device} threads {args.threads}: {shown}; ratio {ratios[0]:.2f} (p10 {ratios[1]:.2f})")


def with_max_ranges(model: nn.Module, x: Tensor) -> nn.Module:
    """Set each range to the largest value of one batch."""

    def record(quantizer: nn.Module) -> Callable[[Tensor], None]:
        return lambda seen: quantizer.amax.copy_(max_abs(seen, quantizer.spec.axis))

    for quantizer in quantizers(model).values():
        quantizer.observer = record(quantizer)
    with torch.no_grad():
        model(x)
    for quantizer in quantizers(model).values():
        quantizer.observer = None
    return model


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    target = torch.randint(0, 10, (len(x),), device=x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def time_in_turns(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Run the steps alternately, so that what else the machine does falls on all of them; return ms."""
    times: dict[str, list[float]] = {key: [] for key in steps}
    for index in range(count + 5):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= 5:
                times[key].append((time.perf_counter() - start) * 1e3)
    return times


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(len(values) * q)]


if __name__ == "__main__":
    main()
