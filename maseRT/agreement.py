"""How close two runs of one model are: the same inputs through two implementations."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Agreement:
    """An output compared with its reference.

    Attributes:
        samples: how many samples were compared.
        max_error: largest absolute difference.
        relative_error: the same in units of the output's scale, the largest absolute reference value.
        sqnr_db: 10 log10(sum reference^2 / sum difference^2); None when the outputs are equal.
        label_agreement: share of samples whose largest logit is the same one; None where outputs are no classes.
    """

    samples: int
    max_error: float
    relative_error: float
    sqnr_db: float | None
    label_agreement: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Return it in words, such as "99.6% same labels, SQNR 31 dB"."""
        sqnr = "equal" if self.sqnr_db is None else f"SQNR {self.sqnr_db:.0f} dB"
        return sqnr if self.label_agreement is None else f"{self.label_agreement:.1%} same labels, {sqnr}"


def agreement(reference: Array, output: Array, *, classes: bool = True) -> Agreement:
    """Compare outputs [N, ...] with reference outputs; they are logits [N, classes] where they stand for `classes`."""
    reference, output = reference.astype(np.float64), output.astype(np.float64)
    difference = np.abs(output - reference)
    scale = float(np.abs(reference).max())
    noise = float((difference**2).sum())
    signal = float((reference**2).sum())
    return Agreement(
        samples=len(reference),
        max_error=float(difference.max()),
        relative_error=float(difference.max()) / scale if scale else math.inf,
        sqnr_db=10 * math.log10(signal / noise) if noise and signal else None,
        label_agreement=float((reference.argmax(1) == output.argmax(1)).mean()) if classes else None,
    )
