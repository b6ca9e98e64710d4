"""The change of one figure of a row between two runs, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maseRT.report.schema import interval_of
from maseRT.report.wording import change_interval, metric_change, metric_value, significant

Kind = Literal["ratio", "difference"]
Verdict = Literal["significant", "noise", "exact", "same", "not judged"]


@dataclass(frozen=True)
class Change:
    """A figure of a row in the base run and in another run.

    Attributes:
        run: the other run.
        figure: such as "p50 at batch 64".
        unit: of `before` and `after`; "" for metrics.
        kind: whether `change` is the "ratio" after / before or the "difference" after - before.
        low, high: 95 % interval of `change`; None where it has none.
        verdict: "significant" or "noise", by whether the interval excludes or includes "no change"; "same" for equal
            values; without an interval "exact" for a figure that is counted rather than measured, else "not judged".
        better: whether the change is for the better; None for equal values, and for metrics of unknown direction.
        by: how the interval was computed; "" without one.
        samples: on which a metric was evaluated: they determine its decimals; 0 for other figures.
        headline: whether `Comparison.lines` mentions it.
    """

    row: str
    run: str
    figure: str
    unit: str
    before: float
    after: float
    kind: Kind
    change: float
    low: float | None
    high: float | None
    verdict: Verdict
    better: bool | None
    by: str
    samples: int
    headline: bool

    def values(self) -> tuple[str, str]:
        """Return both values as text, with up to six significant digits if it takes so many to tell them apart."""
        if self.kind == "difference":
            before, after = (metric_value(self.figure, value, self.samples) for value in (self.before, self.after))
            if before != after or self.verdict == "same":
                return before, after
        for digits in (4, 5, 6):
            before, after = significant(self.before, digits), significant(self.after, digits)
            if before != after or self.verdict == "same":
                break
        return before, after

    def told(self) -> str:
        """Return the change with its interval, such as "11 % less (9.1 to 13 %)" or "7 % less (2 % more to
        16 % less)"; "" for equal values."""
        if self.verdict == "same":
            return ""
        interval = interval_of(self.low, self.high)
        if self.kind == "difference":
            ends = f" ({change_interval(self.figure, interval, self.samples)})" if interval else ""
            return f"{metric_change(self.figure, self.change, self.samples)}{ends}"
        word, sign = ("less", -1) if self.change < 1 else ("more", 1)
        text = f"{significant(100 * sign * (self.change - 1), 2)} % {word}"
        if interval is None:
            return text
        low, high = sorted((100 * sign * (interval.low - 1), 100 * sign * (interval.high - 1)))
        if low < 0 < high:
            other = "more" if word == "less" else "less"
            return f"{text} ({significant(-low, 2)} % {other} to {significant(high, 2)} % {word})"
        return f"{text} ({significant(low, 2)} to {significant(high, 2)} %)"

    def judged(self) -> str:
        """Return the verdict, such as "significant, better"."""
        if self.better is None or self.verdict not in ("significant", "exact"):
            return self.verdict
        return f"{self.verdict}, {'better' if self.better else 'worse'}"

    def line(self) -> str:
        """Return the whole change on one line."""
        before, after = self.values()
        unit = f" {self.unit}" if self.unit else ""
        told = f" {self.told()}," if self.told() else ""
        return f"{self.row}: {self.figure} {before} -> {after}{unit},{told} {self.judged()}"
