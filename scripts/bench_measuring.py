"""Checks how the package measures: whether two sessions agree within their own intervals, and what measuring costs.

    OMP_NUM_THREADS=1 python scripts/bench_measuring.py --sessions 10 --threads 1 --markdown measuring.md

A session is what `masert analyze` does for latency: every row in a process of its own, new for each session, timed in
turns. Every two sessions make a pair of each figure: mean, p50, p90 and p99 of each row, and its ratio to the first.
They agree where their difference is within the two intervals' half lengths added in quadrature, which holds for 19 of
20 pairs if the intervals are right; whether the intervals overlap is said as well, and is asked less. "The same idle
machine" is not taken for granted: a yardstick, a fixed piece of work outside all rows, is timed between rounds, and the
sessions in which it was not slow are counted again by themselves.

The cost of measuring is the p50 that a worker tells over that of a bare loop around the runtime's own call, in the same
process on the same session and in turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from maseRT.hardware import cpu
from maseRT.measure import latency
from maseRT.report.estimates import times_faster
from maseRT.workers.process import ProcessWorker
from maseRT.workers.schedule import calls_per_round, measure_rows

CASES = {"jsc-toy": 64, "digits-cnn": 64, "vgg7": 1, "lstm-classifier": 1}
"""Model of the zoo -> batch."""

ABOVE_MS = 0.1
"""The bar for the cost counts from here on."""

YARDSTICK = 500_000
QUIET = 1.05
"""A session is quiet where the yardstick's median and p90 lie below so many times its best median of all sessions."""

BARE_SECONDS = 0.03
BARE_TURNS = 60


@dataclass(frozen=True)
class Figure:
    """A number of one session and its interval."""

    name: str
    value: float
    low: float
    high: float


# what the workers open; imported by their processes


class WithBareLoop:
    """A session whose "kernel times" are a bare loop around the runtime's own call."""

    def __init__(self, session: Any, call: Any) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.infer, self.bind, self.prepare = session.infer, session.bind, session.prepare
        self._session = session
        self._call = call

    def layer_times_ms(self, feed: Mapping[str, Any], *, iterations: int) -> dict[str, float]:
        call, array = self._call, next(iter(feed.values()))
        times = []
        call(array)
        for _ in range(iterations):
            start = time.perf_counter_ns()
            call(array)
            times.append(time.perf_counter_ns() - start)
        return {"p50": median(times) / 1e6}

    def __enter__(self) -> WithBareLoop:
        self._session.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._session.__exit__(*error)


def open_onnx(path: Path, threads: int) -> WithBareLoop:
    from maseRT.onnxrt.providers import SessionSettings
    from maseRT.runtimes.onnxruntime import OnnxSession, create_session

    raw = create_session(path, "cpu", SessionSettings(threads=threads))
    return WithBareLoop(OnnxSession(raw, device="cpu"), lambda array: raw.run(["output"], {"input": array}))


def open_torch(name: str, threads: int) -> WithBareLoop:
    import torch

    from maseRT.runtimes.torch import TorchRuntime

    torch.set_num_threads(threads)
    module, inferring = new_model(name), torch.inference_mode()

    def call(array: np.ndarray) -> np.ndarray:
        with inferring:
            return module(torch.from_numpy(array)).numpy()

    return WithBareLoop(TorchRuntime().open(module), call)


def new_model(name: str) -> Any:
    import torch

    from maseRT.config import ModelSection
    from maseRT.models.build import build_model
    from maseRT.models.zoo import ZOO

    torch.manual_seed(0)
    entry = ZOO[name]
    section = ModelSection(name=name, random_weights=True)
    return build_model(section, num_classes=entry.num_classes, input_shape=entry.input_shape)


# models


def prepare(name: str, batch: int, folder: Path) -> tuple[dict[str, Path], np.ndarray]:
    """Write a model in FP32 and INT8; return the files and a batch for them."""
    import torch

    from maseRT.config import QuantizeSection
    from maseRT.models.zoo import ZOO
    from maseRT.onnx_export import export_onnx
    from maseRT.quant import make_plan, quantize_model
    from maseRT.quant.calibrators import Method, amax_from_histograms
    from maseRT.quant.observe import load_amax, observe

    x = torch.randn(max(batch, 16), *ZOO[name].input_shape, generator=torch.Generator().manual_seed(1))
    files = {kind: folder / f"{name}-{kind}.onnx" for kind in ("fp32", "int8")}
    export_onnx(new_model(name), x[:2], files["fp32"], opset=20)
    quantized = new_model(name)
    quantize_model(quantized, make_plan(quantized, x[:2], QuantizeSection(), model_name=name))
    with torch.inference_mode(), observe(quantized) as histograms:
        quantized(x)
    load_amax(quantized, amax_from_histograms(histograms, lambda tensor: Method("max")))
    export_onnx(quantized, x[:2], files["int8"], opset=20)
    return files, x[:batch].numpy()


def openers(name: str, files: Mapping[str, Path], threads: int) -> dict[str, Any]:
    rows: dict[str, Any] = {"torch-fp32": partial(open_torch, name, threads)}
    return rows | {f"onnxruntime-{kind}": partial(open_onnx, path, threads) for kind, path in files.items()}


# sessions


@dataclass
class Session:
    """Each row's times by round, measured in processes that are new, and the yardstick's between them."""

    rounds: dict[str, list[list[float]]]
    yardstick_ms: list[float]


def measured(rows: Mapping[str, Any], inputs: np.ndarray, seconds: float) -> Session:
    yardstick_ms: list[float] = []

    def track(turns: Iterable[int], *, description: str, total: int | None = None) -> Iterator[int]:
        for turn in turns:
            yardstick_ms.append(yardstick())
            yield turn

    with ExitStack() as stack:
        workers = {name: stack.enter_context(ProcessWorker(name, opener)) for name, opener in rows.items()}
        for worker in workers.values():
            worker.open()
        found = measure_rows(workers, inputs, warmup=10, iterations=50, seconds=seconds, track=track)
    return Session({name: times.wall for name, times in found.items()}, yardstick_ms)


def yardstick() -> float:
    """Return the milliseconds of a fixed piece of work."""
    start = time.perf_counter()
    sum(range(YARDSTICK))
    return (time.perf_counter() - start) * 1000


def quiet(sessions: Mapping[str, list[Session]]) -> dict[str, list[Session]]:
    best = min(median(each.yardstick_ms) for found in sessions.values() for each in found)
    return {
        name: [each for each in found if max(np.percentile(each.yardstick_ms, [50, 90])) < QUIET * best]
        for name, found in sessions.items()
    }


def figures(rounds: Mapping[str, list[list[float]]]) -> Iterator[Figure]:
    found = {name: latency(wall, "wall") for name, wall in rounds.items()}
    base, *others = found
    for name, told in found.items():
        for figure, interval in told.intervals.items():
            yield Figure(f"{name} {figure}", getattr(told, f"{figure}_ms"), interval.low, interval.high)
    for name in others:
        faster = times_faster(found[base], found[name])
        if faster.interval:
            yield Figure(f"{name} ratio", faster.value, faster.interval.low, faster.interval.high)


def agree(one: Figure, other: Figure) -> bool:
    ends = sorted((one, other), key=lambda figure: figure.value)
    apart = ends[1].value - ends[0].value
    return apart <= np.hypot(ends[0].high - ends[0].value, ends[1].value - ends[1].low)


def overlap(one: Figure, other: Figure) -> bool:
    return one.low <= other.high and other.low <= one.high


# cost


def overheads(rows: Mapping[str, Any], inputs: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return each row's p50 in a bare loop, and the share that a worker's p50 lies above it."""
    found = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(ProcessWorker(name, opener)) for name, opener in rows.items()}
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for worker in workers.values():
            worker.open()
            worker.bind(inputs)
            worker.warm_up(10)
        counts = {name: calls_per_round(median(w.times_ms(5)), 1, BARE_SECONDS, 1) for name, w in workers.items()}
        for turn in range(BARE_TURNS):
            for name, worker in workers.items():
                first = median(worker.times_ms(counts[name])) if turn % 2 else 0.0
                bare = worker.kernel_times_ms(counts[name])["p50"]
                pairs[name].append((bare, first or median(worker.times_ms(counts[name]))))
        for name, each in pairs.items():
            found[name] = (median(bare for bare, _ in each), median(told / bare for bare, told in each) - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sessions", type=int, default=10, help="0: only what measuring costs")
    parser.add_argument("--seconds", type=float, default=0.5, help="on the clock for each row of each session")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--raw", type=Path, help="write the rounds of every session as JSON")
    options = parser.parse_args()
    lines = [f"{cpu().name}, {options.threads} threads, {options.sessions} sessions"]
    sessions: dict[str, list[Session]] = {}
    with TemporaryDirectory() as folder:
        cases = {}
        for name in options.models:
            files, inputs = prepare(name, CASES[name], Path(folder))
            cases[name] = openers(name, files, options.threads), inputs
            lines += overhead_lines(name, *cases[name])
        for number in range(options.sessions):
            for name, (rows, inputs) in cases.items():
                sessions.setdefault(name, []).append(measured(rows, inputs, options.seconds))
            print(f"session {number + 1} of {options.sessions}", flush=True)
    if options.raw:
        options.raw.write_text(json.dumps({name: [asdict(each) for each in found] for name, found in sessions.items()}))
    if sessions:
        lines += ["all sessions:", *agreement_lines(sessions)]
        lines += [f"sessions on a quiet machine ({counts(quiet(sessions))}):", *agreement_lines(quiet(sessions))]
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def overhead_lines(name: str, rows: Mapping[str, Any], inputs: np.ndarray) -> list[str]:
    lines = []
    for row, (bare_ms, share) in overheads(rows, inputs).items():
        held = "holds" if share < 0.02 else "does NOT hold"
        bar = f": {held}" if bare_ms > ABOVE_MS else " (too short for the bar)"
        lines.append(f"- overhead {name} {row}: bare p50 {bare_ms:.4f} ms, {share:+.2%}{bar}")
    print("\n".join(lines), flush=True)
    return lines


def counts(sessions: Mapping[str, list[Session]]) -> str:
    return ", ".join(f"{name} {len(found)}" for name, found in sessions.items())


def agreement_lines(sessions: Mapping[str, list[Session]]) -> list[str]:
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for each in sessions.values():
        told = [list(figures(session.rounds)) for session in each]
        for one, other in combinations(told, 2):
            for a, b in zip(one, other, strict=True):
                pairs.setdefault(a.name, []).append((agree(a, b), overlap(a, b)))
    everything = [each for found in pairs.values() for each in found]
    return [
        f"- {name}: {np.mean([a for a, _ in found]):.1%} of {len(found)} pairs agree, "
        f"{np.mean([o for _, o in found]):.1%} overlap"
        for name, found in {**pairs, "together": everything}.items()
        if found
    ]


if __name__ == "__main__":
    from bench_measuring import main as imported_main  # so that workers can import what they open

    imported_main()
