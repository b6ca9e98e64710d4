"""A job's rows: a session for each runtime and precision, its output compared with torch's exact one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from gpu_bench.jobs import ADVISED, ADVISED_ROW, FREE, Job, Options
from gpu_bench.prepare import float_model, open_run
from maseRT.agreement import agreement
from maseRT.onnx_export import INPUT, OUTPUT
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import Bound, Session
from maseRT.workspace import Workspace

BLOCK_SECONDS = 0.05


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
        *([Row(ADVISED_ROW, engine(ADVISED), metered=False)] if ADVISED in engines else []),
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
