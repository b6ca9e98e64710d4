"""What is benchmarked, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRECISIONS = ("int8", "fp16", "fp32")
"""The order in which engines are built: what matters most comes first."""

FREE = "int8-free"
"""An experiment: an FP32 file with Q/DQ pairs, whose floating-point layers TensorRT 8 may run in FP16 as it likes."""

ADVISED = "int8-advised"
"""An experiment: with the rules that the comparison of the job's own INT8 and FP16 engines proposes."""

ADVISED_ROW = "tensorrt int8, as advised"

SHAPES = {
    "vgg7": (3, 32, 32),
    "jsc-toy": (16,),
    "transformer-classifier": (1, 8, 8),
    "conv1d-classifier": (32, 12),
    "lstm-classifier": (32, 12),
}
CLASSES = {"vgg7": 10, "jsc-toy": 5, "transformer-classifier": 10, "conv1d-classifier": 9, "lstm-classifier": 9}


@dataclass(frozen=True)
class Job:
    """A zoo model and a batch size; written "vgg7:64"."""

    model: str
    batch: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return SHAPES.get(self.model, (3, 224, 224))

    @property
    def classes(self) -> int:
        return CLASSES.get(self.model, 1000)

    def __str__(self) -> str:
        return f"{self.model}:{self.batch}"


def job_from_text(text: str) -> Job:
    model, _, batch = text.partition(":")
    return Job(model, int(batch or 64))


JOBS = tuple(
    map(
        job_from_text,
        (
            "vgg7:64",
            "resnet18:64",
            "jsc-toy:64",
            "transformer-classifier:64",
            "resnet50:64",
            "resnet18:1",
            "resnet50:1",
            "mobilenetv3-small:64",
        ),
    )
)
"""In order of importance: time may run out."""


@dataclass(frozen=True)
class Options:
    """Where things are, and how much is measured.

    Attributes:
        deadline: seconds since the epoch after which what is optional is left out.
        free: measure `FREE`, too.
        advised: measure `ADVISED`, too.
    """

    work: Path
    out: Path
    dry_run: bool
    blocks: int
    deadline: float
    free: bool = False
    advised: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        return (*PRECISIONS, FREE) if self.free else PRECISIONS

    @property
    def results(self) -> Path:
        return self.out / "results.json"

    @property
    def parts(self) -> Path:
        """A result per job."""
        return self.work / "results"

    @property
    def timing(self) -> Path:
        return self.out / "timing"

    @property
    def runtime(self) -> str:
        return "tensorrt-rtx" if self.dry_run else "tensorrt"

    def is_done(self, result: dict[str, Any]) -> bool:
        """Whether a job's earlier result has all that is wanted."""
        return bool(result.get("complete")) and ("advised" in result or not self.advised)

    def part(self, job: Job) -> Path:
        return self.parts / f"{job.model}-{job.batch}.json"

    def data(self, job: Job) -> Path:
        return self.work / f"{job.model}.npz"

    def checkpoint(self, job: Job) -> Path:
        return self.work / f"{job.model}.safetensors"
