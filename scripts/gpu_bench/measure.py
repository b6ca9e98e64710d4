"""One job: its engines, then all its rows, interleaved, in one process."""

from __future__ import annotations

import copy
import functools
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from gpu_bench.jobs import FREE, Job, Options
from gpu_bench.prepare import float_model, open_run
from maseRT.agreement import agreement
from maseRT.blame.compare import blame
from maseRT.energy import VISIT_SECONDS, Energy, Visit, measure_energy
from maseRT.errors import MaseRTError
from maseRT.hardware import cpu, nvidia_driver, nvidia_gpus
from maseRT.measure import wall_times_ms
from maseRT.meters import open_meter
from maseRT.nvml import open_gpu
from maseRT.onnx_export import INPUT, OUTPUT
from maseRT.receipt import Receipt
from maseRT.records import dependency_versions
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import Bound, Session
from maseRT.runtimes.trt import build as build_module
from maseRT.steps.table import STEPS
from maseRT.workers import schedule
from maseRT.workspace import Workspace, read_json, write_json

BLOCK_SECONDS = 0.05
BOOTSTRAPS = 4000
FP32_ENGINE_SECONDS = 150
"""What it takes at most: it is left out when less is left."""


@dataclass
class Row:
    """One runtime, one precision.

    Attributes:
        opens: enters the session into a stack and returns it.
        inputs: makes the fed tensor of the float32 batch.
        benchmark: let cuDNN time its algorithms.
        metered: measure its energy, too.
    """

    name: str
    opens: Callable[[], Session]
    inputs: Callable[[torch.Tensor], Any] = lambda x: x.numpy()
    benchmark: bool = False
    metered: bool = True
    session: Any = None
    bound: Any = None
    count: int = 10
    blocks_ms: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    timed_by: str = ""
    waited: int = 0
    result: dict[str, Any] = field(default_factory=dict)


def measure_job(job: Job, options: Options) -> None:
    """Build, measure, and write the result after each part, so that nothing is lost when time runs out."""
    result: dict[str, Any] = {"job": str(job), "model": job.model, "batch": job.batch, "complete": False}
    result |= {"machine": machine(), "builds": {}, "rows": {}, "ratios": {}}

    def save() -> None:
        write_json(options.part(job), result)

    try:
        engines = build_all(job, options, result, save)
        with ExitStack() as stack:
            rows = open_rows(job, options, engines, result, stack)
            save()
            measure_rows(job, options, rows, result)
            save()
            result["layers"] = layer_times(job, rows)
            result["blame"] = blamed(engines, result["layers"])
            save()
            measure_energies(job, options, rows, result)
        result["complete"] = "tensorrt int8" in result["layers"] and "out of time" not in str(result)
    except Exception:
        result["error"] = traceback.format_exc()[-3000:]
        print(result["error"], flush=True)
    save()


def machine() -> dict[str, Any]:
    driver = nvidia_driver()
    return {
        "gpus": [gpu.name for gpu in nvidia_gpus()],
        "driver": driver.version if driver else None,
        "cpu": cpu().name,
        "threads": cpu().threads,
        "python": platform.python_version(),
        "torch_cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        **dependency_versions(),
    }


# engines


def build_all(job: Job, options: Options, result: dict[str, Any], save: Callable[[], None]) -> dict[str, Workspace]:
    """Build the engines; the INT8 one twice, the second time with a warm timing cache."""
    caches = {path.name: path.stat().st_size for path in options.timing.glob("*.cache")}
    result["timing_caches_before"] = caches
    engines = {}
    for precision in options.precisions:
        if precision == "fp32" and options.deadline - time.time() < FP32_ENGINE_SECONDS:
            result["builds"][precision] = {"error": "left out: out of time"}
            continue
        print(f"{job}: building {precision}", flush=True)
        build: dict[str, Any] = {}
        result["builds"][precision] = build
        try:
            # A cached engine of an earlier call counts as none: the build is timed.
            run = open_run(job, precision, options, force=True)
            with free_types() if precision == FREE else nullcontext():
                outcome = run.single(STEPS["build-engine"])
            build |= {key: outcome.summary[key] for key in ("build_seconds", "bytes", "notes", "version", "precision")}
            build["step_seconds"] = outcome.seconds
            if precision == "int8" and not options.dry_run:
                build["warm_seconds"] = run.single(STEPS["build-engine"]).summary["build_seconds"]
            build["precisions"] = precision_counts(run.workspace)
            engines[precision] = run.workspace
        except Exception as error:
            build["error"] = str(error)[-2000:]
            print(f"{job} {precision}: {error}", flush=True)
        save()
    return engines


class FreeTypes:
    """Lets a weakly typed builder choose FP16 for whatever is not INT8."""

    def __init__(self, trt: Any, network: Any, config: Any, onnx: Any) -> None:
        self.notes: list[str] = []
        for flag in (trt.BuilderFlag.INT8, trt.BuilderFlag.FP16):
            config.set_flag(flag)

    def relax(self, heard: Any) -> bool:
        """There is nothing to give up."""
        return False


@contextmanager
def free_types() -> Any:
    told = build_module.WeakTypes
    build_module.WeakTypes = FreeTypes
    try:
        yield
    finally:
        build_module.WeakTypes = told


def precision_counts(workspace: Workspace) -> dict[str, int]:
    """Count engine layers by what they compute in, and those that only convert."""
    layers = read_json(workspace.sidecar, made_by="build-engine")["layers"] or []
    counts: dict[str, int] = {}
    for layer in layers:
        kind = "conversions" if layer["converts_only"] else layer["precision"] or "unknown"
        counts[kind] = counts.get(kind, 0) + 1
    return counts


# rows


def make_rows(job: Job, options: Options, engines: dict[str, Workspace]) -> list[Row]:
    device = "cpu" if options.dry_run else "cuda:0"
    model = float_model(job)
    model.load_state_dict(load_file(options.checkpoint(job)))

    def eager(dtype: str, *, channels_last: bool = False, compiled: bool = False) -> Callable[[], Session]:
        def opens() -> Session:
            module = copy.deepcopy(model).to(getattr(torch, dtype))
            if channels_last:
                module.to(memory_format=torch.channels_last)
            if compiled:
                module.to(device)
                module = torch.compile(module, mode="reduce-overhead")
            return get_runtime("torch").open(module, device, dtype=dtype)

        return opens

    def onnx(precision: str) -> Callable[[], Session]:
        workspace = open_run(job, precision, options).workspace
        return lambda: get_runtime("onnxruntime").open(workspace.onnx, device)

    def engine(precision: str, **kwargs: Any) -> Callable[[], Session]:
        def opens() -> Session:
            if precision not in engines:
                raise RuntimeError("no engine")
            return get_runtime(options.runtime).open(engines[precision].engine, "cuda:0", **kwargs)

        return opens

    images = len(job.shape) == 3
    half_last = to_half_channels_last if images else to_half
    rows = [
        Row("torch fp32 eager", eager("float32"), as_is),
        Row("torch fp32 eager, cudnn.benchmark", eager("float32"), as_is, benchmark=True, metered=False),
        Row("torch fp16 eager", eager("float16"), to_half, metered=not images),
    ]
    if images:
        rows.append(Row("torch fp16 eager, channels_last", eager("float16", channels_last=True), half_last))
    rows += [
        Row("torch fp16 compile", eager("float16", channels_last=images, compiled=True), half_last),
        Row("onnxruntime fp32", onnx("fp32")),
        Row("onnxruntime fp16", onnx("fp16")),
        *(Row(f"tensorrt {precision}", engine(precision)) for precision in ("fp32", "fp16", "int8")),
        Row("tensorrt int8, no CUDA graph", engine("int8", cuda_graph=False), metered=False),
        *([Row("tensorrt int8, types left to it", engine(FREE), metered=False)] if options.free else []),
    ]
    return rows


def as_is(x: torch.Tensor) -> torch.Tensor:
    return x


def to_half(x: torch.Tensor) -> torch.Tensor:
    return x.half()


def to_half_channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.half().contiguous(memory_format=torch.channels_last)


def open_rows(
    job: Job, options: Options, engines: dict[str, Workspace], result: dict[str, Any], stack: ExitStack
) -> list[Row]:
    """Open every row, compare its output with torch's exact FP32, and find how many inferences fill a block."""
    x = torch.from_numpy(np.load(options.data(job))["x_test"][: job.batch])
    reference = exact(job, options, x)
    torch.set_float32_matmul_precision("high")  # TF32 for matrix products; for convolutions it is the default
    rows = []
    for row in make_rows(job, options, engines):
        try:
            start = time.perf_counter()
            row.session = stack.enter_context(row.opens())
            with cudnn_benchmark(row.benchmark):
                output = row.session.infer({INPUT: row.inputs(x)})[OUTPUT]
                row.bound = row.session.bind({INPUT: row.inputs(x)})
                row.bound.repeat(5)
                row.count = per_block(row.bound)
            row.result["first_seconds"] = time.perf_counter() - start
            row.result["error"] = compared(reference, output)
        except Exception as error:
            row.result["not_run"] = f"{type(error).__name__}: {error}"[-800:]
            print(f"{job} {row.name}: {row.result['not_run']}", flush=True)
        else:
            rows.append(row)
        result["rows"][row.name] = row.result
    return rows


def exact(job: Job, options: Options, x: torch.Tensor) -> np.ndarray:
    """Return what the float model gives on the CPU in double precision."""
    model = float_model(job)
    model.load_state_dict(load_file(options.checkpoint(job)))
    with torch.inference_mode():
        return model.double()(x.double()).numpy()


def compared(reference: np.ndarray, output: Any) -> dict[str, Any]:
    array = output.float().cpu().numpy() if isinstance(output, torch.Tensor) else output.astype(np.float32)
    if not np.isfinite(array).all():
        return {"sqnr_db": None, "not_finite": True}
    return agreement(reference, array).as_dict()


def per_block(bound: Bound) -> int:
    start = time.perf_counter()
    bound.repeat(5)
    return int(np.clip(BLOCK_SECONDS / ((time.perf_counter() - start) / 5), 5, 1000))


@contextmanager
def cudnn_benchmark(on: bool) -> Any:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# time


@dataclass(frozen=True)
class BoundTimes:
    """The times of inferences on data that is on the device.

    Attributes:
        ms: of each.
        clock: what measured them.
        waited: see `maseRT.runtimes.device_times.DeviceTimes`.
    """

    ms: list[float]
    clock: str
    waited: int = 0


def bound_times(bound: Bound, iterations: int) -> BoundTimes:
    """Return the times of inferences on data that is on the device.

    The device's own events, one inference queued behind another; where the runtime gives none away, the wall clock
    around inferences that are waited for one by one.
    """
    found = bound.device_times(iterations)
    if found is not None:
        return BoundTimes(found.ms, "device events", found.waited)
    return BoundTimes(wall_times_ms(bound.run, warmup=0, iterations=range(iterations)), "wall clock")


def measure_rows(job: Job, options: Options, rows: list[Row], result: dict[str, Any]) -> None:
    """Time all rows block by block, in an order that rotates, and take the ratios of every row to the INT8 engine."""
    states = []
    with ExitStack() as stack:
        gpu = None if options.dry_run else stack.enter_context(open_gpu(nvidia_gpus()[0].uuid))
        for block in range(options.blocks):
            for row in rows[block % len(rows) :] + rows[: block % len(rows)]:
                with cudnn_benchmark(row.benchmark):
                    row.bound.repeat(max(2, row.count // 10))
                    times = bound_times(row.bound, row.count)
                row.timed_by = times.clock
                row.waited += times.waited
                row.times_ms += times.ms
                row.blocks_ms.append(float(np.median(times.ms)))
            states += [gpu.state().as_dict()] if gpu else []
    result["states"] = states[:: max(1, len(states) // 5)]
    x = torch.from_numpy(np.load(options.data(job))["x_test"][: job.batch])
    for row in rows:
        with cudnn_benchmark(row.benchmark):
            wall = wall_times_ms(row.bound.run, warmup=5, iterations=range(30))
            feed = {INPUT: host_array(row.inputs(x))}
            whole = wall_times_ms(functools.partial(row.session.infer, feed), warmup=3, iterations=range(20))
            row.bound = row.session.bind({INPUT: row.inputs(x)})  # a session's buffers now hold another batch
            row.bound.repeat(3)
        p50, p90, p99 = np.percentile(row.times_ms, [50, 90, 99]).tolist()
        row.result |= {
            "median_ms": float(np.median(row.blocks_ms)),
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "cov": float(np.std(row.blocks_ms, ddof=1) / np.mean(row.blocks_ms)),
            "wall_ms": float(np.median(wall)),
            "end_to_end_ms": float(np.median(whole)),
            "timed_by": row.timed_by,
            "timed": len(row.times_ms),
            "waited": row.waited / len(row.times_ms),
        }
    result["ratios"] = ratios({row.name: row.blocks_ms for row in rows})


def host_array(value: Any) -> np.ndarray:
    """Return what comes from the host in an end-to-end measurement."""
    return value.numpy() if isinstance(value, torch.Tensor) else value


def ratios(blocks: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return how many times faster TensorRT's engines are than every other row, with bootstrapped 95 % intervals.

    Blocks are resampled whole: what disturbed a block disturbed all its rows.
    """
    random = np.random.default_rng(0)
    found = {}
    for mine in ("tensorrt int8", "tensorrt fp16"):
        for other, theirs in blocks.items():
            if mine not in blocks or other == mine:
                continue
            a, b = np.array(theirs), np.array(blocks[mine])
            picks = random.integers(0, len(a), (BOOTSTRAPS, len(a)))
            samples = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
            low, high = np.percentile(samples, [2.5, 97.5])
            ratio = float(np.median(a) / np.median(b))
            found[f"{mine} vs {other}"] = {"ratio": ratio, "low": float(low), "high": float(high)}
    return found


def layer_times(job: Job, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return the engines' times per layer, by the library's profiler."""
    found = {}
    for row in rows:
        if row.name in ("tensorrt int8", "tensorrt fp16"):
            try:
                x = np.random.default_rng(1).standard_normal((job.batch, *job.shape), dtype=np.float32)
                found[row.name] = row.session.layer_times_ms({INPUT: x}, iterations=20)
                row.bound = row.session.bind({INPUT: x})
            except MaseRTError as error:
                print(f"{row.name}: no layer times: {error}", flush=True)
    return found


def blamed(engines: dict[str, Workspace], layers: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what in the INT8 engine costs more than in the FP16 one, and the rules that avoid it."""
    times = [layers.get(f"tensorrt {precision}") for precision in ("int8", "fp16")]
    if None in times:
        return {}
    paths = [engines[precision].receipt for precision in ("int8", "fp16")]
    receipts = [Receipt.from_json(read_json(path, made_by="build-engine"), where=str(path)) for path in paths]
    try:
        return blame(*(receipt.with_times(ms) for receipt, ms in zip(receipts, times, strict=True))).as_dict()
    except MaseRTError as error:
        return {"error": str(error)}


# energy


@dataclass(frozen=True)
class Metered:
    """A row that works for its energy."""

    row: Row
    device: str
    batch: int

    def energy(self, *, seconds: float = VISIT_SECONDS) -> Visit | str:
        """Return the power of inferring the bound batch, or why it cannot be measured."""
        with open_meter(self.device) as meter, cudnn_benchmark(self.row.benchmark):
            if isinstance(meter, str):
                return meter
            try:
                return measure_energy(self.row.bound.repeat, meter, batch=self.batch, seconds=seconds)
            except MaseRTError as error:
                return error.what


def measure_energies(job: Job, options: Options, rows: list[Row], result: dict[str, Any]) -> None:
    """Measure the energy of the rows in turns, as the package does; no round of visits begins after the deadline."""
    device = "cpu" if options.dry_run else "cuda:0"
    metered = {row.name: Metered(row, device, job.batch) for row in rows if row.metered}
    if options.deadline < time.time():
        found: dict[str, Energy | str] = dict.fromkeys(metered, "out of time")
    else:
        track = functools.partial(until, options.deadline, len(metered))
        found = schedule.measure_energies(metered, dict.fromkeys(metered, device), track=track)
    for row in rows:
        if row.name in found:
            energy = found[row.name]
            row.result["energy"] = f"not measured: {energy}" if isinstance(energy, str) else energy.as_dict()
    told = [each for each in found.values() if not isinstance(each, str)]
    result["energy"] = (
        {"source": told[0].source, "device": told[0].device, "idle_watts": told[0].idle_watts}
        if told
        else f"not measured: {', '.join(sorted(map(str, {*found.values()})))}"
    )
    result["energy_ratios"] = energy_ratios(rows)


def until(deadline: float, rows: int, turns: Iterable[int], **_: Any) -> Iterator[int]:
    """Yield turns; after the first round of all rows, no round begins after the deadline."""
    for turn in turns:
        if turn and turn % rows == 0 and deadline < time.time():
            return
        yield turn


def energy_ratios(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return how many times less net energy per sample the INT8 engine takes, with intervals from the two rows' own."""
    energies = {row.name: row.result["energy"] for row in rows if isinstance(row.result.get("energy"), dict)}
    mine = energies.get("tensorrt int8")
    if mine is None:
        return {}
    found = {}
    for name, other in energies.items():
        if other is mine or other["net_joules_low"] is None or (mine["net_joules_low"] or 0.0) <= 0:
            continue
        low = other["net_joules_low"] / mine["net_joules_high"]
        high = other["net_joules_high"] / mine["net_joules_low"]
        ratio = other["net_joules_per_sample"] / mine["net_joules_per_sample"]
        gross = other["joules_per_sample"] / mine["joules_per_sample"]
        found[f"tensorrt int8 vs {name}"] = {"ratio": ratio, "low": low, "high": high, "gross_ratio": gross}
    return found
