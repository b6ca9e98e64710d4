"""[gate]: what a run must reach, against what its report says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from maseRT.config import GateSection, Speedup
from maseRT.errors import UsageError, did_you_mean
from maseRT.report.estimates import Estimate, millijoules, milliseconds, times_faster
from maseRT.report.schema import Gate, Interval, Report, Row, Timing


def judge(report: Report, gate: GateSection) -> list[Gate]:
    """Return a line for each limit that is set, about one row: [gate] row, or the report's result.

    A figure that is not available does not pass. Limits are held against the figure itself; where its 95 % interval
    reaches over the limit the line says so. Times are of one batch, the first of [analyze] batch_sizes.

    Raises:
        UsageError: [gate] names a row that the report does not have.
    """
    name = gate.row if gate.row is not None else report.result
    row = _named(report, name, key="row") if name else None
    why = _why_nothing(report, row)
    return [
        Gate(name=limit, row=name, asked=asked, got=why, passed=False)
        if row is None or why
        else _judged(report, row, limit, asked, figure)
        for limit, asked, figure in _limits(report, gate)
    ]


def check_rows(names: Sequence[str], gate: GateSection) -> None:
    """Check, before anything is measured, that the rows that [gate] names are among those of the report to come.

    Raises:
        UsageError: one is not.
    """
    if gate.row is not None:
        _check_row(names, gate.row, key="row")
    for speedup in _speedups(gate):
        _check_row(names, speedup.over, key="min_speedup over")


Got = tuple[str, bool]
"""What was got, in words, and whether it passes."""


def _judged(report: Report, row: Row, limit: str, asked: str, figure: Callable[[Report, Row], Got]) -> Gate:
    got, passed = figure(report, row)
    return Gate(name=limit, row=row.name, asked=asked, got=got, passed=passed)


def _limits(report: Report, gate: GateSection) -> Iterator[tuple[str, str, Callable[[Report, Row], Got]]]:
    """Yield (name, what is asked, figure) of the limits that are set."""
    if gate.max_accuracy_drop is not None:
        word = "drop" if report.task.higher_is_better else "rise"
        asked = f"{report.task.primary} {word} of at most {gate.max_accuracy_drop:g}"
        yield "max_accuracy_drop", asked, partial(_drop, limit=gate.max_accuracy_drop)
    for speedup in _speedups(gate):
        over = _named(report, speedup.over, key="min_speedup over")
        yield (
            "min_speedup",
            f"at least {speedup.ratio:g}x {over.name}",
            partial(_speedup, over=over, limit=speedup.ratio),
        )
    if gate.max_latency_ms is not None:
        yield "max_latency_ms", f"at most {gate.max_latency_ms:g} ms", partial(_latency, limit=gate.max_latency_ms)
    if gate.max_size_mb is not None:
        yield "max_size_mb", f"at most {gate.max_size_mb:g} MB", partial(_size, limit=gate.max_size_mb)
    if gate.min_agreement is not None:
        asked = f"at least {gate.min_agreement:.2%} of the labels of {report.baseline}"
        yield "min_agreement", asked, partial(_agreement, limit=gate.min_agreement)
    if gate.max_energy_mj is not None:
        yield (
            "max_energy_mj",
            f"at most {gate.max_energy_mj:g} mJ per sample",
            partial(_energy, limit=gate.max_energy_mj),
        )


def _speedups(gate: GateSection) -> tuple[Speedup, ...]:
    if gate.min_speedup is None:
        return ()
    return gate.min_speedup if isinstance(gate.min_speedup, tuple) else (gate.min_speedup,)


def _named(report: Report, name: str, *, key: str) -> Row:
    _check_row([row.name for row in report.rows], name, key=key)
    return next(row for row in report.rows if row.name == name)


def _check_row(names: Sequence[str], name: str, *, key: str) -> None:
    if name not in names:
        raise UsageError(
            f"the report has no row '{name}'{did_you_mean(name, names)}",
            where=f"[gate] {key}",
            fix=f"choose one of {', '.join(names)}" if names else "",
        )


def _why_nothing(report: Report, row: Row | None) -> str:
    """Return why there is nothing to judge."""
    if row is None:
        reasons = [f"{each.name}: {each.not_run}" for each in report.rows if each.role == "deployed" and each.not_run]
        return f"no row to judge: nothing that can be deployed ran ({'; '.join(reasons) or 'the report has none'})"
    return f"{row.name} did not run: {row.not_run or 'it has no metrics'}" if row.metrics is None else ""


def _drop(report: Report, row: Row, *, limit: float) -> Got:
    """Turn round the difference where less is better: a drop is what got worse."""
    metric, sign = report.task.primary, -1.0 if report.task.higher_is_better else 1.0
    change = _change(report, row)
    if change is None:
        return f"{metric} is not known of both {row.name} and {report.baseline}", False
    drop = sign * change.value + 0.0
    found = change.interval
    worst = None if found is None else (-found.low if sign < 0 else found.high)
    words = _with_interval(drop, None if found is None else _turned(found, sign), "{:.4g}")
    return words + _reaches(drop, worst, limit), _within(drop, limit)


def _change(report: Report, row: Row) -> Estimate | None:
    metric = report.task.primary
    if row.difference is not None and row.difference.metric == metric:
        return Estimate(row.difference.value, row.difference.interval)
    base = report.row(report.baseline)
    values = [each.metrics.values.get(metric) if each and each.metrics else None for each in (base, row)]
    before, after = values
    return Estimate(after - before) if before is not None and after is not None else None


def _turned(interval: Interval, sign: float) -> Interval:
    ends = sorted((sign * interval.low + 0.0, sign * interval.high + 0.0))
    return Interval(low=ends[0], high=ends[1])


def _speedup(report: Report, row: Row, *, over: Row, limit: float) -> Got:
    """Take the ratio that the report has where the other row is the baseline."""
    batch = report.batch()
    mine, theirs = _timing(report, row), _timing(report, over)
    if mine is None or theirs is None:
        untimed = row if mine is None else over
        return _untimed(untimed, batch), False
    if mine.ratio is not None and over.name == report.baseline:
        faster = Estimate(mine.ratio, mine.ratio_interval)
    else:
        faster = times_faster(theirs.end_to_end, mine.end_to_end)
    words = _with_interval(faster.value, faster.interval, "{:.3g}", "x") + f" at batch {batch}"
    return words + _reaches(-faster.value, -faster.interval.low if faster.interval else None, -limit), _within(
        -faster.value, -limit
    )


def _latency(report: Report, row: Row, *, limit: float) -> Got:
    timing, batch = _timing(report, row), report.batch()
    if timing is None:
        return _untimed(row, batch), False
    median = milliseconds(timing.end_to_end)
    words = _with_interval(median.value, median.interval, "{:.4g}", " ms") + f" at batch {batch}"
    return words + _reaches(median.value, median.interval.high if median.interval else None, limit), _within(
        median.value, limit
    )


def _size(report: Report, row: Row, *, limit: float) -> Got:
    size = row.size_bytes / 1e6
    if not size:
        return "its size is not known", False
    return f"{size:.4g} MB", _within(size, limit)


def _agreement(report: Report, row: Row, *, limit: float) -> Got:
    if row.name == report.baseline:
        return "100.00% (it is the float model itself)", True
    if row.agreement is None:
        return f"its outputs were not compared with {report.baseline}", False
    share = row.agreement.label_agreement
    if share is None:
        return "its outputs are no classes: there are no labels to compare", False
    return f"{share:.2%} of {row.agreement.samples} samples", _within(-share, -limit)


def _energy(report: Report, row: Row, *, limit: float) -> Got:
    if row.energy is None:
        return f"no energy was measured: {row.energy_note or 'it does not say why'}", False
    found = millijoules(row.energy)
    words = _with_interval(found.value, found.interval, "{:.4g}", " mJ") + f" at batch {row.energy.batch}"
    return words + _reaches(found.value, found.interval.high if found.interval else None, limit), _within(
        found.value, limit
    )


def _timing(report: Report, row: Row) -> Timing | None:
    batch = report.batch()
    found = report.timing(row.name, batch) if batch is not None else None
    return found if found is not None and found.end_to_end.p50_ms > 0 else None


def _untimed(row: Row, batch: int | None) -> str:
    if row.role == "simulated":
        return f"{row.name} is simulated in float: it is not timed"
    return f"{row.name} was not timed{f' at batch {batch}' if batch is not None else ''}" + (
        f": {row.not_run}" if row.not_run else ""
    )


def _with_interval(value: float, interval: Interval | None, form: str, unit: str = "") -> str:
    ends = f" (95 % {form.format(interval.low)} to {form.format(interval.high)})" if interval else ""
    return f"{form.format(value)}{unit}{ends}"


def _reaches(value: float, worst: float | None, limit: float) -> str:
    """Return a warning where a figure passes and the bad end of its interval does not."""
    return (
        "; the interval reaches over the limit"
        if worst is not None and _within(value, limit) and not _within(worst, limit)
        else ""
    )


def _within(value: float, limit: float) -> bool:
    """Return whether a figure keeps to a limit; one that equals it may miss it by its last bits."""
    return value <= limit + 1e-9 * max(1.0, abs(limit))
