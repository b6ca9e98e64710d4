"""What a check says, and how numbers are held against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Literal, NamedTuple

from maseRT.report.schema import Report, Row

Severity = Literal["error", "warning"]

FLOAT32 = 1e-5
"""How far apart two metrics may be that torchmetrics computed in float32, by sums over some thousand classes."""

ROUNDED = 1e-3
"""Relative: figures that somebody wrote with four digits still count as equal."""


class Told(NamedTuple):
    """Something that a check found.

    Attributes:
        row: whose; "" for the report as a whole.
    """

    severity: Severity
    message: str
    row: str = ""


def error(message: str, row: str = "") -> Told:
    """Say that numbers contradict each other, or that what was asked was not done."""
    return Told("error", message, row)


def warning(message: str, row: str = "") -> Told:
    """Say that numbers are less sure than they look."""
    return Told("warning", message, row)


def near(one: float, other: float, *, relative: float = ROUNDED, absolute: float = 0.0) -> bool:
    """Return whether two figures can be the same one."""
    return math.isclose(one, other, rel_tol=relative, abs_tol=absolute)


def decimals(value: float) -> int:
    """Return how many decimals a figure shows; a measured one that nobody rounded has some 15."""
    return -int(Decimal(repr(value)).as_tuple().exponent)


def rounded(value: float) -> bool:
    """Return whether a figure was rounded, so that two may be equal by chance."""
    return decimals(value) <= 6


def pairs(report: Report) -> Iterator[tuple[Row, Row]]:
    """Yield every two rows that ran."""
    rows = report.ran()
    for index, row in enumerate(rows):
        for other in rows[:index]:
            yield other, row
