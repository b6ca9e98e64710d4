"""Numbers as people read them: the digits that they are worth, units, intervals. Figures are rounded nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime

from maseRT.report.schema import Interval, Metrics, Row, Timing

_SHARES = frozenset(
    ("accuracy", "precision", "recall", "f1", "specificity", "auroc", "jaccard", "iou", "map", "dice", "exact", "match")
)
"""Words in the names of metrics between 0 and 1, such as "mean_iou" or "exact_match"."""

_NO_SHARES = frozenset(("error", "loss", "distance", "count"))
"""Words that say otherwise."""

_NAMES = {
    "f1": "F1",
    "r2": "R²",
    "mse": "MSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "top5": "top-5",
    "auroc": "AUROC",
    "iou": "IoU",
    "map": "mAP",
}
_RUNTIMES = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
_TOP = re.compile(r"top[-_]?\d+")
_MANY = 1000
_NOISE = 1e-4


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits; whole numbers keep all of theirs, in groups of three."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{'−' if value < 0 else ''}{abs(value):.{digits - 1}e}"
    decimals = max(digits - 1 - size, 0)
    rounded = round(value, decimals)
    if math.floor(math.log10(abs(rounded))) > size:  # 9.996 became 10.00
        decimals = max(decimals - 1, 0)
    return f"{rounded:,.{decimals}f}".replace("-", "−")


def with_digits(value: float, interval: Interval | None) -> tuple[str, str]:
    """Return a value and the ends of its interval as "1.20–1.27", "" without one.

    Three digits each, four where the interval is too narrow for three.
    """
    if interval is None:
        return significant(value), ""
    low, high = significant(interval.low), significant(interval.high)
    if low != high:
        return significant(value), f"{low}–{high}"
    return significant(value, 4), f"{significant(interval.low, 4)}–{significant(interval.high, 4)}"


def measured(value: float, interval: Interval | None, unit: str = "") -> str:
    """Return a value with its interval, such as "1.23 (1.20–1.27) ms"."""
    text, ends = with_digits(value, interval)
    return f"{text}{f' ({ends})' if ends else ''}{f' {unit}' if unit else ''}"


def is_share(metric: str) -> bool:
    """Tell whether a metric is a share between 0 and 1, which people read in percent."""
    words = set(metric.lower().replace("-", "_").split("_"))
    return bool(words & _SHARES and not words & _NO_SHARES) or _TOP.fullmatch(metric) is not None


def metric_name(metric: str) -> str:
    """Return a metric's name as people write it."""
    return _NAMES.get(metric.lower(), metric.replace("_", " "))


def metric_value(metric: str, value: float, samples: int) -> str:
    """Return a metric: shares in percent, with the decimals that so many samples resolve."""
    if is_share(metric) and math.isfinite(value):
        return f"{100 * value:.{_decimals(samples)}f} %"
    return significant(value, 4)


def metric_change(metric: str, value: float, samples: int) -> str:
    """Return a change of a metric with its sign: shares in points."""
    if is_share(metric) and math.isfinite(value):
        return f"{_signed(100 * value, _decimals(samples))} points"
    return _with_sign(value)


def change_interval(metric: str, interval: Interval, samples: int) -> str:
    """Return the ends of a change's interval with their signs, such as "−1.5 to +0.4"."""
    if is_share(metric):
        decimals = _decimals(samples)
        return f"{_signed(100 * interval.low, decimals)} to {_signed(100 * interval.high, decimals)}"
    return f"{_with_sign(interval.low)} to {_with_sign(interval.high)}"


def difference(row: Row) -> tuple[str, str]:
    """Return a row's difference from the baseline and the ends of its interval; "" where there is none."""
    found = row.difference
    if found is None:
        return "", ""
    samples = row.metrics.samples if row.metrics else 0
    ends = change_interval(found.metric, found.interval, samples) if found.interval else ""
    return metric_change(found.metric, found.value, samples), ends


def percent(share: float, decimals: int = 1) -> str:
    """Return a share of 0 to 1 in percent; only the whole is 100 %, and only nothing is 0 %."""
    rounded = round(100 * share, decimals)
    if rounded == 0 and share > 0:
        return f"under {10**-decimals:g} %"
    shown = 100 - 10**-decimals if rounded == 100 and share < 1 else rounded
    return f"{shown:.{decimals}f} %"


def decibels(sqnr_db: float | None) -> str:
    """Return a signal to quantization noise ratio; None is that of equal outputs."""
    return "equal" if sqnr_db is None else f"{significant(sqnr_db)} dB"


def megabytes(count: int) -> str:
    """Return bytes in 10^6 bytes, without the unit."""
    return significant(count / 1e6)


def size(count: int) -> str:
    """Return bytes with the unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{significant(count / factor)} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Return a while in hours, minutes and seconds."""
    if seconds < 60:
        return f"{significant(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(time: str) -> str:
    """Return an ISO 8601 time as "2026-01-31 18:25 UTC"; a text that is none as it is."""
    try:
        return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return time


def ratio(timing: Timing) -> tuple[str, str]:
    """Return how many times faster than the baseline, and the ends of the interval."""
    if timing.ratio is None:
        return "", ""
    text, ends = with_digits(timing.ratio, timing.ratio_interval)
    return f"{text}x", ends


def names(items: Iterable[str], *, most: int = 3) -> str:
    """Return names joined as in a sentence, the last ones as a number when there are many."""
    known = list(items)
    if len(known) > most:
        known = [*known[: most - 1], f"{len(known) - most + 1} more"]
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])} and {known[-1]}" if known else ""


def capitalized(text: str) -> str:
    """Return text with a capital letter first, the rest as it is: "AUROC" stays."""
    return f"{text[:1].upper()}{text[1:]}"


def count(number: int, noun: str) -> str:
    """Return "1 layer", "3 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def runtime_name(runtime: str) -> str:
    """Return a runtime as its makers write it."""
    return _RUNTIMES.get(runtime, runtime)


def row_title(row: Row, rows: Iterable[Row]) -> str:
    """Return a row in words, such as "TensorRT INT8"; with its artifact where rows would share the words."""
    words = f"{runtime_name(row.runtime)} {row.precision.upper()}"
    twins = [other for other in rows if (other.runtime, other.precision) == (row.runtime, row.precision)]
    plain = row.artifact == row.precision or len(twins) < 2
    return words if plain else f"{words} ({row.artifact})"


def metric_of(metrics: Metrics, name: str) -> float | None:
    """Return a metric by name, the loss too."""
    return metrics.loss if name == "loss" else metrics.values.get(name)


def _decimals(samples: int) -> int:
    return 2 if samples > _MANY else 1


def _signed(value: float, decimals: int) -> str:
    """Return a number with its sign; one too small for its decimals gets more of them, unless it is float noise."""
    if float(f"{value:.{decimals}f}") == 0:
        return f"{float(f'{value:.1g}'):+g}".replace("-", "−") if abs(value) > _NOISE else "0"
    return f"{value:+.{decimals}f}".replace("-", "−")


def _with_sign(value: float) -> str:
    text = significant(value, 2) if abs(value) < 1 else significant(value)
    return f"+{text}" if value > 0 and math.isfinite(value) else text
