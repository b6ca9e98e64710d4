"""The steps, in order: what each reads and which section steers it. No torch here: a cached run never needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from maseRT.config import Config, ExportTarget, OnnxRuntimeMode, Section
from maseRT.errors import UsageError, did_you_mean
from maseRT.progress import Reporter
from maseRT.workspace import Workspace


@dataclass(frozen=True)
class Context:
    """What a step is given.

    Attributes:
        key: the step's own key, so that half-finished work can tell whether it is still the same work.
        device: "cpu", "cuda" or "cuda:N", already resolved.
        threads: CPU threads, already resolved.
    """

    config: Config
    workspace: Workspace
    reporter: Reporter
    key: dict[str, str]
    device: str
    threads: int


@dataclass(frozen=True)
class StepResult:
    """What a step leaves.

    Attributes:
        headline: the outcome in one line, for people.
        outputs: the files it wrote.
        summary: the outcome in plain values, for --json.
        table: rows for the console, first row the header; empty when the headline says all.
        remarks: sentences for the console, below the table.
    """

    headline: str
    outputs: Sequence[Path]
    summary: dict[str, Any] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """One step of the pipeline: `run(context, section)` of the module in this package that is named after its section.

    Attributes:
        name: the command.
        section: the config attribute that steers it.
        reads: other sections that change its result.
        inputs: the files of earlier steps that it needs.
        gpus: whether its result depends on which GPUs are here.
    """

    name: str
    section: str
    inputs: Callable[[Config, Workspace], list[Path]]
    reads: tuple[str, ...] = ()
    gpus: bool = False

    @property
    def heading(self) -> str:
        """The section as a config spells it."""
        return self.section.replace("_", "-")

    def options(self, config: Config) -> Section | None:
        """Return the step's section of a config."""
        section: Section | None = getattr(config, self.section)
        return section

    def wanted(self, config: Config) -> bool:
        """Tell whether a config asks for this step."""
        if self.name == "train":
            return trains(config)
        return self.options(config) is not None

    def run(self, context: Context) -> StepResult:
        """Do the work that a config wants; only now are torch and vendor packages loaded."""
        module = import_module(f"maseRT.steps.{self.section}")
        result: StepResult = module.run(context, self.options(context.config))
        return result


def trains(config: Config) -> bool:
    """Tell whether the baseline is trained here; with a checkpoint, [train] only says how that was trained."""
    return config.train is not None and config.model.checkpoint is None


def baseline(config: Config, workspace: Workspace) -> list[Path]:
    """Return the float weights that the run itself made; a user's checkpoint is no step's output."""
    return [workspace.float_checkpoint] if trains(config) else []


def final_checkpoint(config: Config, workspace: Workspace) -> Path:
    """Return the checkpoint that is exported: the last one that the config's steps make."""
    if config.finetune is not None:
        return workspace.best_checkpoint
    if config.calibrate is not None:
        return workspace.calibrated_checkpoint
    return workspace.quantized_checkpoint


def final_plan(config: Config, workspace: Workspace) -> Path:
    """Return the plan that is exported: calibration may keep overflowing layers in FP32."""
    return workspace.final_plan if config.calibrate is not None else workspace.plan


def _analyzed(config: Config, workspace: Workspace) -> list[Path]:
    paths = [*baseline(config, workspace), final_plan(config, workspace), final_checkpoint(config, workspace)]
    if config.calibrate is not None and config.analyze is not None and config.analyze.sensitivity:
        paths += [workspace.histograms]
    if config.export is not None:
        paths += [workspace.onnx, workspace.float_onnx]
        paths += [workspace.target_onnx(target) for target in config.export.targets if target != "tensorrt"]
    if config.build_engine is not None:
        paths += [workspace.engine, workspace.receipt, workspace.sidecar]
    if config.onnxruntime is not None:
        paths += [workspace.onnxruntime, *(workspace.onnxrt_model(mode) for mode in config.onnxruntime.modes)]
    return paths


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step("train", "train", lambda config, workspace: []),
        Step("quantize", "quantize", baseline),
        Step(
            "calibrate",
            "calibrate",
            lambda config, workspace: [workspace.plan, workspace.quantized_checkpoint],
            reads=("quantize",),
        ),
        Step(
            "finetune",
            "finetune",
            lambda config, workspace: [workspace.final_plan, workspace.calibrated_checkpoint],
            reads=("quantize",),
        ),
        Step(
            "export",
            "export",
            lambda config, workspace: [
                *baseline(config, workspace),
                final_plan(config, workspace),
                final_checkpoint(config, workspace),
            ],
            reads=("quantize",),
        ),
        Step(
            "build-engine",
            "build_engine",
            lambda config, workspace: [workspace.onnx, final_plan(config, workspace)],
            gpus=True,
        ),
        Step(
            "onnxruntime",
            "onnxruntime",
            lambda config, workspace: [workspace.onnx, workspace.float_onnx],
            gpus=True,
        ),
        Step("analyze", "analyze", _analyzed, reads=("quantize", "export"), gpus=True),
    )
}


def get_step(name: str) -> Step:
    """Return a step by its command's name.

    Raises:
        UsageError: there is no such step.
    """
    if name not in STEPS:
        raise UsageError(f"no step is called '{name}'{did_you_mean(name, list(STEPS))}", where="step")
    return STEPS[name]


def producers(workspace: Workspace) -> dict[Path, str]:
    """Return which step makes each file that another step reads."""
    return {
        workspace.float_checkpoint: "train",
        workspace.plan: "quantize",
        workspace.quantized_checkpoint: "quantize",
        workspace.final_plan: "calibrate",
        workspace.histograms: "calibrate",
        workspace.calibrated_checkpoint: "calibrate",
        workspace.best_checkpoint: "finetune",
        workspace.onnx: "export",
        workspace.float_onnx: "export",
        **{workspace.target_onnx(target): "export" for target in get_args(ExportTarget)},
        **{workspace.onnxrt_model(mode): "onnxruntime" for mode in get_args(OnnxRuntimeMode)},
        workspace.onnxruntime: "onnxruntime",
        workspace.engine: "build-engine",
        workspace.receipt: "build-engine",
        workspace.sidecar: "build-engine",
    }
