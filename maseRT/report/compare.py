"""Runs side by side: what changed, by how much, and whether that is significant or noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from maseRT.errors import UsageError
from maseRT.report import estimates
from maseRT.report.estimates import Estimate
from maseRT.report.schema import Energy, Interval, Report, Row, Timing
from maseRT.report.wording import change_interval, metric_change, metric_value, significant

Kind = Literal["ratio", "difference"]
Verdict = Literal["significant", "noise", "exact", "same", "not judged"]

_PROPORTIONS = ("accuracy", "top5")
_SAMPLE_FIELDS = ("data", "split", "evaluated", "sha256")

FLAG = "--allow-different-methods"


@dataclass(frozen=True)
class Change:
    """A figure of a row in the first run and in another.

    Attributes:
        run: the other run.
        figure: such as "p50 at batch 64".
        unit: of `before` and `after`; "" for shares and losses.
        kind: what `change` is: "ratio", after / before, or "difference", after - before.
        low, high: 95 % interval of `change`; None where there is none.
        verdict: "significant" where the interval leaves out no change, else "noise"; "exact" where a figure is not
            measured but counted, "same" where nothing changed, "not judged" where there is no interval.
        better: whether the change is for the better; None where nothing changed, or better means nothing.
        by: how the interval was made.
        samples: evaluated; they say how many decimals a metric is worth.
        headline: among the figures that `Comparison.lines` tells.
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
        """Return both values in words, with as many digits as it takes to tell them apart, up to six."""
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
        """Return the change and its interval in words, such as "11 % less (9.1 to 13 %)"; "" where nothing changed."""
        if self.verdict == "same":
            return ""
        found = Interval(low=self.low, high=self.high) if self.low is not None and self.high is not None else None
        if self.kind == "difference":
            ends = f" ({change_interval(self.figure, found, self.samples)})" if found else ""
            return f"{metric_change(self.figure, self.change, self.samples)}{ends}"
        word, sign = ("less", -1) if self.change < 1 else ("more", 1)
        text = f"{significant(100 * sign * (self.change - 1), 2)} % {word}"
        if found is None:
            return text
        low, high = sorted((100 * sign * (found.low - 1), 100 * sign * (found.high - 1)))
        return f"{text} ({significant(low, 2)} to {significant(high, 2)} %)"

    def judged(self) -> str:
        """Return the verdict in words."""
        return f"{self.verdict}{', better' if self.better else ', worse'}" if self._matters else self.verdict

    @property
    def _matters(self) -> bool:
        return self.better is not None and self.verdict in ("significant", "exact")

    def line(self) -> str:
        """Return the change in a sentence."""
        before, after = self.values()
        unit = f" {self.unit}" if self.unit else ""
        told = f" {self.told()}," if self.told() else ""
        return f"{self.row}: {self.figure} {before} -> {after}{unit},{told} {self.judged()}"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is the base.

    Attributes:
        runs: their names.
        changes: by row, figure and run.
        differences: in what their methods or samples differ, where that was allowed.
        notes: what could not be compared, and how to read the verdicts.
    """

    runs: tuple[str, ...]
    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    def table(self) -> list[tuple[str, ...]]:
        """Return the figures as text, first the header: a line per row and figure, three columns per further run."""
        header = ["row", "figure", self.runs[0]]
        for run in self.runs[1:]:
            header += [run, "change (95 %)", "verdict"]
        lines: dict[tuple[str, str], dict[str, Change]] = {}
        for change in self.changes:
            lines.setdefault((change.row, change.figure), {})[change.run] = change
        return [tuple(header), *(self._line(row, figure, by_run) for (row, figure), by_run in lines.items())]

    def _line(self, row: str, figure: str, by_run: Mapping[str, Change]) -> tuple[str, ...]:
        first = next(iter(by_run.values()))
        cells = [row, f"{figure}, {first.unit}" if first.unit else figure, first.values()[0]]
        for run in self.runs[1:]:
            change = by_run.get(run)
            cells += [change.values()[1], change.told(), change.judged()] if change else ["", "", ""]
        return tuple(cells)

    def lines(self) -> list[str]:
        """Return what to know in sentences: how methods differ, the headline figures, and the notes."""
        found = [f"different: {difference}" for difference in self.differences]
        for run in self.runs[1:]:
            prefix = f"{run}: " if len(self.runs) > 2 else ""
            shown = [change for change in self.changes if change.headline and change.run == run]
            found += [f"{prefix}{change.line()}" for change in shown if change.verdict != "same"]
            found += [f"{prefix}the same: {text}" for text in _unchanged(shown)]
        return [*found, *self.notes]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "base": self.runs[0],
            "runs": list(self.runs),
            "changes": [asdict(change) for change in self.changes],
            "differences": list(self.differences),
            "notes": list(self.notes),
        }


def _unchanged(changes: Sequence[Change]) -> Iterator[str]:
    """Yield "FIGURE of ROWS" for each figure that stayed the same."""
    rows: dict[str, list[str]] = {}
    for change in changes:
        if change.verdict == "same":
            rows.setdefault(change.figure, []).append(change.row)
    for figure, names in rows.items():
        yield f"{figure} of {', '.join(names)}"


def compare(reports: Mapping[str, Report], *, allow_different_methods: bool) -> Comparison:
    """Put runs side by side; the first is the base of all comparisons.

    Ratios of times, energies and sizes come with the interval of a ratio of independent estimates, differences of
    accuracies with that of a difference: see `maseRT.report.estimates`. Where both runs hold the same baseline and were
    shown the same samples, the difference of the primary metric is taken between their paired differences to that
    baseline, which is much sharper; it takes the two for no less than uncorrelated.

    Args:
        reports: by name.
        allow_different_methods: compare what was measured by different methods or, but for the metrics, on different
            samples, and say so.

    Raises:
        UsageError: fewer than two runs, no row in common, or different methods without leave.
    """
    if len(reports) < 2:
        raise UsageError("there is nothing to compare one run with", where="compare", fix="give two runs or more")
    (base_name, base), *others = reports.items()
    differences: list[str] = []
    changes: list[Change] = []
    notes: list[str] = []
    for name, other in others:
        if not any(_both(base, other)):
            rows = [", ".join(row.name for row in report.ran()) or "none" for report in (base, other)]
            raise UsageError(
                f"no row ran in both {base_name} ({rows[0]}) and {name} ({rows[1]})",
                where="compare",
                fix="run analyze in both, with a runtime in common",
            )
        differences += _different_samples(base_name, base, name, other)
        differences += _different_methods(base_name, base, name, other)
        changes += [change for one, two in _both(base, other) for change in _changes(base, one, other, two, run=name)]
        notes += _alone(base_name, base, name, other)
        if _differ_in_samples(base, other):
            notes.append(f"the metrics of {name} are of other samples or another task: they are not compared")
    if differences and not allow_different_methods:
        raise UsageError(
            "\n".join(["the runs were not measured alike", *(f"  {line}" for line in differences)]),
            where="compare",
            fix=f"measure them alike, or compare them all the same with {FLAG}",
        )
    order = {row.name: index for index, row in enumerate(base.rows)}
    changes.sort(key=lambda change: order[change.row])
    return Comparison(tuple(reports), tuple(changes), tuple(differences), (*notes, *_reading(changes)))


def _both(base: Report, other: Report) -> Iterator[tuple[Row, Row]]:
    """Yield the rows that ran in both runs."""
    for row in base.ran():
        twin = other.row(row.name)
        if twin is not None and twin.metrics is not None:
            yield row, twin


def _alone(base_name: str, base: Report, name: str, other: Report) -> Iterator[str]:
    both = {row.name for row, _ in _both(base, other)}
    for run, report in ((base_name, base), (name, other)):
        alone = [row.name for row in report.ran() if row.name not in both]
        if alone:
            yield f"only in {run}: {', '.join(alone)}"


def _reading(changes: Sequence[Change]) -> Iterator[str]:
    judged = [change for change in changes if change.verdict in ("significant", "noise")]
    if judged:
        significant = sum(change.verdict == "significant" for change in judged)
        yield (
            f"{significant} of {len(judged)} figures with an interval changed significantly (95 %);"
            f" of {len(judged)} that did not change, {0.05 * len(judged):.1f} would seem to by chance"
        )


def _different_samples(base_name: str, base: Report, name: str, other: Report) -> Iterator[str]:
    """Yield in what tasks and samples differ."""
    for what, one, two in (
        ("task", base.task.name, other.task.name),
        ("primary metric", base.task.primary, other.task.primary),
        *((field, getattr(base.samples, field), getattr(other.samples, field)) for field in _SAMPLE_FIELDS),
    ):
        if one != two:
            label = {"sha256": "samples (sha256)", "evaluated": "number of samples"}.get(what, what)
            yield f"{label}: {_short(one)} in {base_name}, {_short(two)} in {name}"


def _differ_in_samples(base: Report, other: Report) -> bool:
    return any(_different_samples("", base, "", other))


def _different_methods(base_name: str, base: Report, name: str, other: Report) -> Iterator[str]:
    """Yield in what the measurements of rows differ, rows with the same difference together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for one, two in _both(base, other):
        mine, theirs = _method(one), _method(two)
        for field in (field for field in mine if field in theirs):
            values = _short(mine[field]), _short(theirs[field])
            if mine[field] != theirs[field]:
                found.setdefault((field, *values), []).append(one.name)
    for (field, before, after), rows in found.items():
        yield f"{field}: {before} in {base_name}, {after} in {name} ({', '.join(rows)})"


def _method(row: Row) -> dict[str, Any]:
    """Return how a row was measured, field by field; nothing of one that was not timed."""
    if not row.timings or row.method is None:
        return {}
    method = row.method.model_dump(exclude={"versions"})
    fields = {key.replace("_", " "): value for key, value in method.items()}
    fields |= {f"version of {package}": version for package, version in row.method.versions.items()}
    if row.gpu is not None and row.gpu.power_limit_w is not None:
        fields["GPU power limit in W"] = row.gpu.power_limit_w
    if row.energy is not None:
        fields["energy by"] = row.energy.source
    return fields


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def _changes(base: Report, one: Row, other: Report, two: Row, *, run: str) -> Iterator[Change]:
    """Yield every figure that both rows have."""
    if not _differ_in_samples(base, other):
        yield from _metric_changes(base, one, other, two, run=run)
    batch = base.batch()
    for mine in one.timings:
        theirs = other.timing(two.name, mine.batch)
        if theirs is not None:
            yield from _time_changes(mine, theirs, row=one.name, run=run, headline=mine.batch == batch)
    if one.energy is not None and two.energy is not None and one.energy.batch == two.energy.batch:
        energies = _millijoules(one.energy), _millijoules(two.energy)
        yield from _ratio(*energies, row=one.name, run=run, figure="energy per sample", unit="mJ", headline=True)
    if one.memory and two.memory:
        for figure, before, after in (
            ("host memory", one.memory.host_mb, two.memory.host_mb),
            ("device memory", one.memory.device_mb, two.memory.device_mb),
        ):
            if before is not None and after is not None:
                values = Estimate(before), Estimate(after)
                yield from _ratio(*values, row=one.name, run=run, figure=figure, unit="MiB", headline=False)
    sizes = Estimate(one.size_bytes / 1e6), Estimate(two.size_bytes / 1e6)
    yield from _ratio(*sizes, row=one.name, run=run, figure="size", unit="MB", headline=True, exact=True)


def _time_changes(mine: Timing, theirs: Timing, *, row: str, run: str, headline: bool) -> Iterator[Change]:
    kinds = [("", mine.end_to_end, theirs.end_to_end)]
    if mine.device is not None and theirs.device is not None:
        kinds.append((" on the device", mine.device, theirs.device))
    for where, one, two in kinds:
        for name in ("p50", "p99"):
            times = [Estimate(getattr(each, f"{name}_ms"), each.intervals.get(name)) for each in (one, two)]
            figure = f"{name}{where} at batch {mine.batch}"
            first = headline and name == "p50" and not where
            yield from _ratio(times[0], times[1], row=row, run=run, figure=figure, unit="ms", headline=first)


def _millijoules(energy: Energy) -> Estimate:
    """Return millijoules per sample; the interval is that of the power, which the time scales."""
    value = energy.joules_per_sample * 1e3
    if energy.watts_low is None or energy.watts_high is None or energy.watts <= 0:
        return Estimate(value)
    low, high = (value * watts / energy.watts for watts in (energy.watts_low, energy.watts_high))
    return Estimate(value, Interval(low=low, high=high))


def _metric_changes(base: Report, one: Row, other: Report, two: Row, *, run: str) -> Iterator[Change]:
    if one.metrics is None or two.metrics is None:
        return
    primary = base.task.primary
    shared = [name for name in one.metrics.values if name in two.metrics.values]
    for name in sorted(shared, key=lambda name: name != primary):
        values = one.metrics.values[name], two.metrics.values[name]
        change, by = Estimate(values[1] - values[0]), ""
        paired = _through_baseline(base, one, other, two) if name == primary else None
        if paired is not None:
            change, by = paired, "the paired differences to the baseline that both have"
        elif name in _PROPORTIONS and base.task.name == "classification":
            shares = [estimates.share(value, base.samples.evaluated) for value in values]
            change, by = estimates.difference(*shares), "Newcombe's interval of two independent proportions"
        better = _better(change.value, base.task.higher_is_better if name == primary else _more_is_better(base, name))
        yield _change(
            change, values, row=one.name, run=run, figure=name, kind="difference", by=by, better=better, no_change=0.0,
            headline=name == primary, samples=base.samples.evaluated,
        )  # fmt: skip
    values = one.metrics.loss, two.metrics.loss
    change = Estimate(values[1] - values[0])
    better = _better(change.value, higher_is_better=False)
    yield _change(
        change, values, row=one.name, run=run, figure="loss", kind="difference", by="", better=better, no_change=0.0,
        headline=False, samples=base.samples.evaluated,
    )  # fmt: skip


def _more_is_better(report: Report, name: str) -> bool | None:
    """Return whether more of a metric is better; None where that is not known."""
    if report.task.name == "classification":
        return True
    return (
        {"mse": False, "rmse": False, "mae": False, "r2": True}.get(name) if report.task.name == "regression" else None
    )


def _through_baseline(base: Report, one: Row, other: Report, two: Row) -> Estimate | None:
    """Return the difference of two paired differences, where they are to one and the same baseline."""
    models = base.row(base.baseline), other.row(other.baseline)
    if models[0] is None or models[1] is None or not models[0].sha256 or models[0].sha256 != models[1].sha256:
        return None
    if models[0].metrics is None or models[0].metrics != models[1].metrics:
        return None
    stated = one.difference, two.difference
    if stated[0] is None or stated[1] is None or {each.metric for each in stated if each} != {base.task.primary}:
        return None
    before, after = (Estimate(each.value, each.interval) for each in stated if each)
    found = estimates.difference(before, after)
    return found if found.interval is not None else None


def _ratio(
    before: Estimate,
    after: Estimate,
    *,
    row: str,
    run: str,
    figure: str,
    unit: str,
    headline: bool,
    exact: bool = False,
) -> Iterator[Change]:
    """Yield the change of a figure of which less is better, if both are positive."""
    values = before.value, after.value
    if min(values) <= 0:
        return
    yield _change(
        estimates.ratio(before, after), values, row=row, run=run, figure=figure, unit=unit, kind="ratio", exact=exact,
        by="the ratio of independent estimates, by their logarithms (MOVER)", no_change=1.0, headline=headline,
        better=_better(values[1] - values[0], higher_is_better=False),
    )  # fmt: skip


def _change(
    change: Estimate,
    values: tuple[float, float],
    *,
    row: str,
    run: str,
    figure: str,
    kind: Kind,
    by: str,
    better: bool | None,
    no_change: float,
    headline: bool,
    samples: int = 0,
    unit: str = "",
    exact: bool = False,
) -> Change:
    found = change.interval
    verdict: Verdict
    if values[0] == values[1]:
        verdict = "same"
    elif found is not None:
        verdict = "noise" if found.low <= no_change <= found.high else "significant"
    else:
        verdict = "exact" if exact else "not judged"
    return Change(
        row=row,
        run=run,
        figure=figure,
        unit=unit,
        before=values[0],
        after=values[1],
        kind=kind,
        change=change.value,
        low=found.low if found else None,
        high=found.high if found else None,
        verdict=verdict,
        better=better,
        by=by if found else "",
        samples=samples,
        headline=headline,
    )


def _better(change: float, higher_is_better: bool | None) -> bool | None:
    return None if change == 0 or higher_is_better is None else (change > 0) == higher_is_better
