"""The drift ladder: what each step from the float model to the engine changes, judged against [analyze] drift.

Neither torch nor a runtime is needed: outputs of the same samples go in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maseRT.agreement import agreement
from maseRT.config import DriftLimits
from maseRT.report.schema import Agreement, Rung

Array = NDArray[Any]

INT8_LAYER_DB = 30.0
"""What one INT8 layer leaves at least, in dB: 8 bits over +-10 standard deviations give 33, and weights halve that.

A step that computes the same numbers elsewhere costs less: export asks 30 dB of a whole file.
"""

_LEAST_STEP_DB = 3.0
_ROUNDING = 1e-9


def ladder(
    outputs: Mapping[str, Array],
    metrics: Mapping[str, float],
    order: Sequence[str],
    limits: DriftLimits,
    *,
    higher_is_better: bool = True,
    classes: bool = True,
    share: bool = True,
) -> list[Rung]:
    """Compare each row with the one before it; a row that did not run is bridged.

    Args:
        outputs: row name -> outputs [N, ...], of the same samples.
        metrics: row name -> the primary metric.
        order: row names from the float model to the engine.
        limits: what every rung must keep.
        higher_is_better: of the metric.
        classes: whether outputs are [N, classes], so that labels can be compared.
        share: whether the metric lies in [0, 1]; of another one, the limit is a share of its value.
    """
    ran = [name for name in order if name in outputs]
    rungs = []
    for source, target in pairwise(ran):
        rung = Rung(
            source=source,
            target=target,
            metric_before=metrics[source],
            metric_after=metrics[target],
            agreement=_agreement(outputs[source], outputs[target], classes=classes),
            holds=True,
        )
        short = shortfalls(rung, limits, higher_is_better=higher_is_better, share=share)
        if not np.isfinite(outputs[target]).all():
            short.append("not all outputs are finite")
        rungs.append(rung.model_copy(update={"holds": not short, "short": short}))
    return rungs


def shortfalls(rung: Rung, limits: DriftLimits, *, higher_is_better: bool = True, share: bool = True) -> list[str]:
    """Say in words where a rung falls below the limits; nothing where it holds."""
    told = []
    before, after = rung.metric_before, rung.metric_after
    drop = (before - after) * (1 if higher_is_better else -1)
    most = limits.accuracy_drop
    if most is not None and not drop <= (most + _ROUNDING) * (1 if share else abs(before)):
        digits = ".4f" if share else ".4g"
        limit = f"{most:g}" if share else f"{100 * most:g} %"
        told.append(f"the metric goes from {before:{digits}} to {after:{digits}}, by more than {limit}")
    same = rung.agreement.label_agreement
    if limits.agreement is not None and same is not None and same < limits.agreement:
        told.append(f"{same:.2%} of the labels are the same, below {limits.agreement:.2%}")
    if _below(rung.agreement.sqnr_db, limits.sqnr_db):
        told.append(f"the SQNR of the outputs is {rung.agreement.sqnr_db:.1f} dB, below {limits.sqnr_db:g}")
    return told


def threshold_db(rung: Rung, limits: DriftLimits) -> float:
    """Return the SQNR below which a layer's output counts as diverged, in dB.

    Where the outputs are below the SQNR limit, that limit. Else it is halfway, in dB, between what one INT8 layer
    leaves and what arrives at the outputs, at least 3 dB above the latter (half of its noise power), so that the
    outputs themselves are always below. A layer that spoils the result lies clearly below that, one that only rounds
    above: a range ten times too small leaves 3 dB of a normal distribution, one that fits leaves 40.
    """
    outputs_db = rung.agreement.sqnr_db
    if limits.sqnr_db is not None and _below(outputs_db, limits.sqnr_db):
        return limits.sqnr_db
    reached = max(outputs_db, 0.0) if outputs_db is not None else 0.0
    return max((INT8_LAYER_DB + reached) / 2, reached + _LEAST_STEP_DB)


class Noise:
    """Sums of squares of tensors and of their differences, over slices of the samples."""

    def __init__(self) -> None:
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def add(self, name: str, reference: Array, output: Array) -> None:
        """Take in a slice of a tensor; the arrays have one shape. Where the reference is not finite, anything goes."""
        reference, output = reference.astype(np.float64), output.astype(np.float64)
        known = np.isfinite(reference)
        if not known.all():
            reference, output = reference[known], output[known]
        difference = output - reference
        self._signal[name] = self._signal.get(name, 0.0) + float(np.vdot(reference, reference))
        self._noise[name] = self._noise.get(name, 0.0) + float(np.vdot(difference, difference))

    def sqnr_db(self) -> dict[str, float]:
        """Return the ratio per tensor: infinite where equal, -infinite where an output is not finite.

        Tensors that are zero throughout the reference are left out: no noise is small against them.
        """
        found = {}
        for name, signal in self._signal.items():
            noise = self._noise[name]
            if not math.isfinite(noise):
                found[name] = -math.inf
            elif noise == 0:
                found[name] = math.inf
            elif signal:
                found[name] = 10 * math.log10(signal / noise)
        return found


def _agreement(reference: Array, output: Array, *, classes: bool) -> Agreement:
    """Compare outputs; numbers that are not finite count as 0, the rung fails for them in any case."""
    found = agreement(_finite(reference), _finite(output), classes=classes).as_dict()
    return Agreement(**{key: value if value is None or math.isfinite(value) else None for key, value in found.items()})


def _finite(outputs: Array) -> Array:
    return np.nan_to_num(outputs, nan=0.0, posinf=0.0, neginf=0.0)


def _below(sqnr_db: float | None, limit: float | None) -> bool:
    """Whether a ratio is below a limit; None is an equal output, or no limit."""
    return sqnr_db is not None and limit is not None and sqnr_db < limit
