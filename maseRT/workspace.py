"""The output tree: the only module that knows file names, and how a file gets there in one piece."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from maseRT.errors import StepError, UsageError

DEFAULT_OUTPUT = Path("mase_output")
"""Where the output tree grows if nothing else is said."""

_TEMPORARY = ".partial-"
_ONNXRT_FOLDERS = {"static": "static_quantized", "dynamic": "dynamic_quantized", "auto-mixed": "auto_mixed"}
"""Modes of the onnxruntime step whose folder has another name."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` by rename when the block ends well, else it is deleted.

    Raises:
        StepError: the disk is full, read-only, or a parent is a file.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # when the parent is no directory there is nothing to clean
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece, keys in their given order."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, made_by: str) -> dict[str, Any]:
    """Read a JSON file that the step `made_by` wrote.

    Raises:
        StepError: it is missing or damaged; names the command that makes it.
    """
    fix = f"run `masert {made_by} --config ... --force`"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StepError("missing", where=str(path), fix=fix) from None
    except (OSError, ValueError) as error:
        raise StepError(f"damaged: {error}", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise StepError("damaged: not a JSON object", where=str(path), fix=fix)
    return value


def _cannot_write(path: Path, error: OSError) -> StepError:
    return StepError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        fix="free space, or choose a writable folder with --output",
    )


class Workspace:
    """The folders of one run: `<output>/tensorrt/quantization/<run>/`; `<output>/onnxrt/<run>/` for ONNX Runtime."""

    def __init__(self, output: Path, run: str) -> None:
        if not run or run in (".", "..") or "/" in run or "\\" in run:
            raise UsageError(f"'{run}' is not a folder name", where="--run", fix="use a plain name such as digits-int8")
        self.run = run
        self.output = output
        self.root = output / "tensorrt" / "quantization" / run
        self.onnxrt = output / "onnxrt" / run

    def name_of(self, path: Path) -> str:
        """Return a file's path relative to the run's folder, as records hold it; it may lie outside."""
        return os.path.relpath(path, self.root)

    # cache
    @property
    def histograms(self) -> Path:
        return self.root / "cache" / "histograms.safetensors"

    def amax(self, method: str) -> Path:
        """The ranges that one calibration method found."""
        return self.root / "cache" / "amax" / f"{method}.safetensors"

    @property
    def timing_caches(self) -> Path:
        """The folder of TensorRT's timing caches, one per GPU and version."""
        return self.root / "cache" / "timing"

    def unfinished(self, step: str) -> Path:
        """The finished units of a step that is not."""
        return self.root / "cache" / "unfinished" / f"{step}.safetensors"

    @property
    def answers(self) -> Path:
        """The folder of every row's outputs."""
        return self.root / "cache" / "answers"

    def forget(self, step: str) -> None:
        """Delete what a step keeps to do less the next time."""
        self.unfinished(step).unlink(missing_ok=True)
        if step == "analyze":
            shutil.rmtree(self.answers, ignore_errors=True)

    def record(self, step: str) -> Path:
        return self.root / "cache" / "records" / f"{step}.json"

    def log(self, step: str) -> Path:
        return self.root / "cache" / "logs" / f"{step}.log"

    @property
    def owner(self) -> Path:
        """Which config this run belongs to."""
        return self.root / "cache" / "owner.json"

    # checkpoints
    @property
    def float_checkpoint(self) -> Path:
        return self.root / "ckpts" / "float.safetensors"

    @property
    def quantized_checkpoint(self) -> Path:
        return self.root / "ckpts" / "quantized.safetensors"

    @property
    def calibrated_checkpoint(self) -> Path:
        return self.root / "ckpts" / "calibrated.safetensors"

    @property
    def training_state(self) -> Path:
        """Weights and optimizer state of an unfinished training."""
        return self.root / "ckpts" / "float_resume.safetensors"

    @property
    def finetuning(self) -> Path:
        return self.root / "ckpts" / "fine_tuning"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The fake-quantized model after the 1-based fine-tuning `epoch`."""
        return self.finetuning / f"epoch_{epoch:03d}.safetensors"

    @property
    def best_checkpoint(self) -> Path:
        return self.finetuning / "best.safetensors"

    @property
    def resume_state(self) -> Path:
        """Optimizer state of an unfinished fine-tuning."""
        return self.finetuning / "resume.safetensors"

    # descriptions
    def json(self, name: str) -> Path:
        return self.root / "json" / f"{name}.json"

    @property
    def config(self) -> Path:
        """The resolved config of the last run."""
        return self.json("config")

    @property
    def plan(self) -> Path:
        return self.json("plan")

    @property
    def final_plan(self) -> Path:
        """The plan after calibration, which may keep overflowing layers in FP32."""
        return self.json("plan_calibrated")

    @property
    def training(self) -> Path:
        return self.json("training")

    @property
    def calibration(self) -> Path:
        return self.json("calibration")

    @property
    def finetuning_history(self) -> Path:
        return self.json("finetuning")

    @property
    def export(self) -> Path:
        return self.json("export")

    @property
    def receipt(self) -> Path:
        """Per layer: the precision asked for, exported and executed."""
        return self.json("precision_receipt")

    @property
    def kernel_times(self) -> Path:
        """How long each kernel of the engine takes, where one ran."""
        return self.json("kernel_times")

    @property
    def sensitivity(self) -> Path:
        """What quantizing each layer alone costs."""
        return self.json("sensitivity")

    @property
    def report(self) -> Path:
        return self.json("report")

    # results
    @property
    def onnx(self) -> Path:
        return self.root / "onnx" / "model.onnx"

    @property
    def float_onnx(self) -> Path:
        return self.root / "onnx" / "float.onnx"

    def target_onnx(self, target: str) -> Path:
        """The quantized model in the form that a target likes best."""
        return self.onnx if target == "tensorrt" else self.root / "onnx" / f"model.{target}.onnx"

    def onnxrt_model(self, mode: str) -> Path:
        """The model of one mode of the onnxruntime step."""
        folder = _ONNXRT_FOLDERS.get(mode, mode)
        return self.onnxrt / folder / "model.onnx"

    def onnxrt_sidecar(self, mode: str) -> Path:
        """What that model was made from, and what ONNX Runtime makes of it."""
        return self.onnxrt_model(mode).with_suffix(".json")

    @property
    def onnxrt_cache(self) -> Path:
        """Engines and compiled models that execution providers keep."""
        return self.onnxrt / "cache"

    def onnxrt_probe(self, device: str) -> Path:
        """A model that is there only while devices are compared."""
        return self.onnxrt / "cache" / f"probe_{device}.onnx"

    @property
    def onnxruntime(self) -> Path:
        """The device and the models of the onnxruntime step."""
        return self.json("onnxruntime")

    @property
    def engine(self) -> Path:
        return self.root / "trt" / "model.trt"

    @property
    def sidecar(self) -> Path:
        """What the engine was built from and for."""
        return self.root / "trt" / "model.json"

    @property
    def report_markdown(self) -> Path:
        return self.root / "report.md"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone. The lock is the kernel's: it dies with its process.

        Raises:
            UsageError: another process works on this run.
            StepError: the folder cannot be written.
        """
        path = self.root / "cache" / "lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, timeout=0)
            lock.acquire()
        except Timeout:
            raise UsageError(
                "another masert process is working on this run",
                where=str(self.root),
                fix="wait for it, or give this one a name of its own with --run NAME",
            ) from None
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            self._sweep()
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Delete what a killed process left half-written."""
        for folder in (self.root, self.onnxrt):
            for leftover in folder.rglob(f"{_TEMPORARY}*"):
                leftover.unlink(missing_ok=True)

    def claim(self, config: Path, *, takeover: bool) -> None:
        """Note which config this run belongs to, so that two configs never mix.

        Raises:
            UsageError: the run belongs to another config.
        """
        mine = os.path.relpath(config.resolve(), self.root.resolve())
        if self.owner.exists() and not takeover:
            theirs = str(read_json(self.owner, made_by="transform").get("config"))
            if theirs != mine:
                raise UsageError(
                    f"the run '{self.run}' belongs to another config, {(self.root / theirs).resolve()}",
                    where=str(self.root),
                    fix="give this one a name of its own with --run NAME, or take the run over with --force",
                )
        write_json(self.owner, {"config": mine})
