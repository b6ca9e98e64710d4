"""The calibrations that are compared on validation, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maseRT.evaluate import Metrics

CHECKPOINT = "checkpoint"
"""The name of the ranges that a checkpoint brought along; they are not calibrated again."""


def corrected_name(method: str) -> str:
    """Return what a method is called whose ranges stand beside corrected biases."""
    return f"{method}, biases corrected"


@dataclass(frozen=True)
class Candidate:
    """The ranges of one calibration method, and how the model does with them.

    Attributes:
        sqnr_db: of every layer's output, as expected from the histograms of its operands.
    """

    name: str
    amax: dict[str, Tensor]
    metrics: Metrics
    sqnr_db: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the SQNR of a layer that loses nothing is null."""
        sqnr_db = {layer: value if math.isfinite(value) else None for layer, value in self.sqnr_db.items()}
        return {"validation": self.metrics.as_dict(), "sqnr_db": sqnr_db}

    def cells(self, *, chosen: bool) -> tuple[str, ...]:
        """Return a row of the console's table."""
        finite = [value for value in self.sqnr_db.values() if math.isfinite(value)]
        worst = min(self.sqnr_db, key=lambda name: self.sqnr_db[name])
        return (
            f"{self.name} *" if chosen else self.name,
            self.metrics.shown,
            f"{self.metrics.loss:.4f}",
            f"{sum(finite) / max(len(finite), 1):.1f} dB",
            f"{worst} {self.sqnr_db[worst]:.1f} dB",
        )


@dataclass(frozen=True)
class Correction:
    """What the correction of biases, with the best candidate's ranges, came to.

    Attributes:
        layers: how many layers' biases were corrected.
        metrics: on validation, with the corrected biases.
        kept: the model has them; otherwise it is as it was.
    """

    layers: int
    metrics: Metrics
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"layers": self.layers, "kept": self.kept, "validation": self.metrics.as_dict()}

    def cells(self, method: str) -> tuple[str, ...]:
        """Return a row of the console's table, for the method whose ranges it has."""
        name = corrected_name(method)
        return f"{name} *" if self.kept else name, self.metrics.shown, f"{self.metrics.loss:.4f}", "", ""


@dataclass(frozen=True)
class Comparison:
    """All candidates, one or more, and what was done with the best of them.

    Attributes:
        float_metrics: of the model with nothing quantized.
        correction: None where no bias was corrected.
    """

    candidates: Sequence[Candidate]
    float_metrics: Metrics
    correction: Correction | None = None

    @property
    def best(self) -> Candidate:
        """The first of those that do best on validation."""
        return max(self.candidates, key=lambda candidate: candidate.metrics.rank)

    @property
    def headline(self) -> str:
        """What was chosen and how it does, in one line."""
        chosen = "the ranges come from the checkpoint" if self.best.name == CHECKPOINT else f"{self.best.name} is best"
        metrics = self.best.metrics
        if self.correction is not None and self.correction.kept:
            chosen, metrics = f"{chosen}, with corrected biases", self.correction.metrics
        return f"{chosen}: validation {metrics.describe()}, float {self.float_metrics.shown}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for calibration.json."""
        told = {
            "best": self.best.name,
            "float": self.float_metrics.as_dict(),
            "methods": {candidate.name: candidate.as_dict() for candidate in self.candidates},
        }
        return told if self.correction is None else told | {"bias_correction": self.correction.as_dict()}

    def summary(self) -> dict[str, Any]:
        """Return plain values for the step's outcome."""
        return {
            "best": self.best.name,
            "float": self.float_metrics.as_dict(),
            "validation": {candidate.name: candidate.metrics.as_dict() for candidate in self.candidates},
            "bias_correction": self.correction.as_dict() if self.correction is not None else None,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Return the console's table, the header first, with a star at what was chosen."""
        best, corrected = self.best, self.correction is not None and self.correction.kept
        rows: list[tuple[str, ...]] = [("method", best.metrics.primary, "loss", "mean SQNR", "worst layer")]
        rows += [each.cells(chosen=each is best and not corrected) for each in self.candidates]
        return rows if self.correction is None else [*rows, self.correction.cells(best.name)]
