"""The verdict: one sentence that says what was won and lost, and says no more than the intervals allow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maseRT.report.estimates import times_faster
from maseRT.report.schema import Interval, Report, Row, Task, Timing
from maseRT.report.wording import count, is_share, metric_change, metric_name, names, row_title, significant

_NONE = "no measurable difference"
_FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Speed:
    """How much faster one row is than another.

    Attributes:
        ratio: of the medians, end to end; above 1 is faster.
        interval: its 95 % interval; None where one of the two has none.
    """

    other: Row
    ratio: float
    interval: Interval | None

    @property
    def measurable(self) -> bool:
        """Whether the interval leaves out 1; True without one, which the sentence then says."""
        return self.interval is None or not self.interval.low <= 1 <= self.interval.high


def verdict(report: Report) -> str:
    """Return the report's outcome in one sentence.

    What an interval does not tell apart from nothing is called "no measurable difference".
    """
    result = report.row(report.result)
    if result is None or result.metrics is None:
        sentence = _nothing_ran(report)
    else:
        speed, quality = _speeds(report, result), _quality(result, report.task)
        if _NONE in speed and quality.startswith(f" with {_NONE}"):
            quality = quality.replace(f" with {_NONE}", ", and none", 1)
        sentence = f"{row_title(result, report.rows)} {speed}{quality}"
        sentence += _stayed(report, result) + _missing_engine(report)
    return f"{sentence}{_warnings(report)}."


def speedups(report: Report, result: Row) -> list[Speed]:
    """Return how a row compares with the fastest float row and with the baseline, where they were timed."""
    batch = report.batch()
    timing = report.timing(result.name, batch) if batch is not None else None
    if timing is None or batch is None:
        return []
    baseline, best = report.row(report.baseline), _best_float(report, result, batch)
    found = [_speed(report, timing, best, batch)] if best is not None and best is not baseline else []
    if baseline is not None and timing.ratio is not None and baseline is not result:
        found.append(Speed(baseline, timing.ratio, timing.ratio_interval))
    return [speed for speed in found if speed is not None]


def _best_float(report: Report, result: Row, batch: int) -> Row | None:
    """Return the float row to beat: that of the same runtime before others, the fastest first."""
    timed = [
        (row.runtime != result.runtime, timing.end_to_end.p50_ms, row)
        for row in report.rows
        if row.role == "float" and row is not result and (timing := report.timing(row.name, batch)) is not None
    ]
    return min(timed, key=lambda each: each[:2])[2] if timed else None


def _speed(report: Report, timing: Timing, other: Row, batch: int) -> Speed | None:
    against = report.timing(other.name, batch)
    if against is None or timing.end_to_end.p50_ms <= 0 or against.end_to_end.p50_ms <= 0:
        return None
    found = times_faster(against.end_to_end, timing.end_to_end)
    return Speed(other, found.value, found.interval)


def _speeds(report: Report, result: Row) -> str:
    speeds = speedups(report, result)
    if not speeds:
        return "was not timed; it comes out" if result.difference else "ran but was not timed"
    told = [speed for speed in speeds if speed.measurable]
    same = [row_title(speed.other, report.rows) for speed in speeds if not speed.measurable]
    phrases = []
    for index, speed in enumerate(told):
        faster = speed.ratio >= 1
        times = significant(speed.ratio if faster else 1 / speed.ratio)
        repeated = index > 0 and faster == (told[0].ratio >= 1)
        word = "" if repeated else "faster " if faster else "slower "
        unsure = " (no interval)" if speed.interval is None else ""
        phrases.append(f"{times}x {word}than {row_title(speed.other, report.rows)}{unsure}")
    if not phrases:
        return f"shows {_NONE} in speed from {names(same)}"
    also = f", with {_NONE} in speed from {names(same)}" if same else ""
    return f"is {' and '.join(phrases)}{also}"


def _quality(result: Row, task: Task) -> str:
    found, metrics = result.difference, result.metrics
    if found is None or metrics is None:
        return ""
    metric = metric_name(found.metric)
    if not math.isfinite(found.value):
        return f" but its {metric} is not a number"
    if found.value == 0 and (found.interval is None or found.interval.low == found.interval.high == 0):
        return f" at the same {metric}"
    if found.interval is not None and found.interval.low <= 0 <= found.interval.high:
        return f" with {_NONE} in {metric}"
    change = metric_change(found.metric, found.value, metrics.samples)
    ends = "" if found.interval is not None else " (no interval)"
    if not is_share(found.metric):
        ends = f"{ends}, which is {'better' if (found.value > 0) == task.higher_is_better else 'worse'}"
    return f" at {change} of {metric}{ends}"


def _stayed(report: Report, result: Row) -> str:
    """Return which layers of the engine are not INT8, where the result is the engine that the receipt is of."""
    precision = report.precision
    if precision is None or precision.runtime != result.runtime or not result.runtime.startswith("tensorrt"):
        return ""
    clauses = []
    differ = [layer for layer in precision.layers if layer.verdict == "differs"]
    if any(layer.asked == "int8" for layer in precision.layers):
        for kind in _FLOATS:
            stayed = [each for each in precision.layers if each.executed == kind and each.verdict != "differs"]
            if stayed:
                clauses.append(f"{count(len(stayed), 'layer')} stayed {kind.upper()}")
    if differ:
        verb = "does" if len(differ) == 1 else "do"
        clauses.append(f"{count(len(differ), 'layer')} {verb} not run as asked")
    return f"; {', '.join(clauses)}" if clauses else ""


def _missing_engine(report: Report) -> str:
    engines = [row for row in report.rows if row.runtime.startswith("tensorrt") and row.size_bytes]
    return "; the engine did not run here" if engines and all(row.metrics is None for row in engines) else ""


def _nothing_ran(report: Report) -> str:
    missing = [row for row in report.rows if row.role == "deployed" and row.metrics is None]
    told = f" ({names(f'{row.name}: {row.not_run}' for row in missing)})" if missing else ""
    sentence = f"No deployed model ran here{told}, so there is no speed to judge"
    simulated = next((row for row in reversed(report.ran()) if row.role == "simulated"), None)
    if simulated is not None and simulated.difference is not None:
        sentence += f"; in simulation, {simulated.precision.upper()} comes out{_quality(simulated, report.task)}"
    return sentence


def _warnings(report: Report) -> str:
    errors = sum(finding.severity == "error" for finding in report.findings)
    failed = sum(not gate.passed for gate in report.gates)
    told = [f"{failed} of {count(len(report.gates), 'gate')} failed"] if failed else []
    if errors:
        told.append(f"the self-audit found {count(errors, 'error')}, so do not rely on these figures")
    return f"; but {' and '.join(told)}" if told else ""
