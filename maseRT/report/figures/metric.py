"""The task's primary metric on an axis: metrics between 0 and 1 are shown in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maseRT.report.figures.style import axis
from maseRT.report.schema import Task
from maseRT.report.wording import capitalized, is_share, metric_name


def scaled(value: float, task: Task) -> float:
    """Return a value of the primary metric in the axis's unit."""
    return 100 * value if is_share(task.primary) else value


def metric_heading(task: Task) -> str:
    """Return the primary metric's name with a capital, to begin a figure's title."""
    return capitalized(metric_name(task.primary))


def axis_title(task: Task) -> str:
    """Return the primary metric's name with its unit."""
    return f"{metric_name(task.primary)}, %" if is_share(task.primary) else metric_name(task.primary)


def metric_axis(task: Task, values: Sequence[float]) -> dict[str, Any]:
    """Return an axis for scaled values of the primary metric."""
    return axis(axis_title(task), range=padded_range(values, percentage=is_share(task.primary)))


def padded_range(values: Sequence[float], *, percentage: bool) -> list[float]:
    """Return an axis range around finite values, wide enough that small differences look small."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max(0.35 * (high - low), 0.5 if percentage else 0.02 * max(abs(low), abs(high)), 1e-9)
    if not percentage:
        return [low - room, high + room]
    beyond = max(0.4, 0.04 * (high - low))  # for markers at the ends of what a share can be
    return [max(low - room, -beyond), min(high + room, 100 + beyond)]
