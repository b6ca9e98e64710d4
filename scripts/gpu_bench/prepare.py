"""Checkpoints, data and ONNX files, by maseRT's own steps, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from gpu_bench.jobs import FREE, Job, Options
from maseRT.config import ModelSection
from maseRT.config_file import load_config
from maseRT.models.build import build_model
from maseRT.progress import Silent
from maseRT.steps.pipeline import Run
from maseRT.workspace import Workspace

SAMPLES = {"train": 64, "val": 8, "test": 64}
EDGE_OPSET = 19
"""TensorRT 8.6 does not know opset 20's Gelu."""


def settle(job: Job, options: Options) -> None:
    """Write noise as a data set, and a checkpoint whose BatchNorm statistics fit that noise."""
    if options.checkpoint(job).is_file():
        return
    options.work.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in SAMPLES.items():
        arrays[f"x_{part}"] = random.standard_normal((count, *job.shape), dtype=np.float32)
        arrays[f"y_{part}"] = np.arange(count) % job.classes
    np.savez(options.data(job), **arrays)
    torch.manual_seed(0)
    model = float_model(job)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(torch.from_numpy(arrays["x_train"]))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, options.checkpoint(job))


def float_model(job: Job) -> nn.Module:
    """Build the model with random weights, in eval mode."""
    section = ModelSection(name=job.model, random_weights=True)
    return build_model(section, num_classes=job.classes, input_shape=job.shape)


def prepare(job: Job, precision: str, options: Options) -> None:
    """Quantize, calibrate and export: what a user's `masert transform --until export` does."""
    open_run(job, precision, options).transform(last="export")


def open_run(job: Job, precision: str, options: Options, *, force: bool = False, rules: Sequence[str] = ()) -> Run:
    """Return the pipeline of a model in one precision; the batch size touches only the engine."""
    path = options.work / f"{job.model}-{precision}.toml"
    path.write_text(config_text(job, precision, options, rules))
    name = f"{job.model}-{precision}"
    return Run(load_config(path), path, Workspace(options.work / "runs", name), Silent(), force)


def config_text(job: Job, precision: str, options: Options, rules: Sequence[str] = ()) -> str:
    floats = "fp32" if precision in ("fp32", FREE) else "fp16"
    sources = "tactic_sources = []" if precision == FREE else ""
    return f"""
[run]
device = "cpu"
threads = 2
[model]
name = "{job.model}"
args = {{ num_classes = {job.classes} }}
checkpoint = "{options.checkpoint(job)}"
[data]
name = "npz"
path = "{options.data(job)}"
batch_size = 64
[quantize]
precision = "{precision.partition("-")[0]}"
float = "{floats}"
rules = [{" ".join(rules)}]
[calibrate]
batches = 1
methods = ["max"]
[export]
opset = {EDGE_OPSET}
targets = ["tensorrt"]
[build-engine]
on_mismatch = "warn"
runtime = "{options.runtime}"
batch = {{ min = {job.batch}, opt = {job.batch}, max = {job.batch} }}
timing_caches = "{options.timing}"
{sources}
"""
