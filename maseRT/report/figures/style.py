"""The common look of all figures: axes, layout, and how precisions and rows are told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross", "hexagon", "triangle-down", "x", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LEVELS = ("int8", "fp8", "fp16", "bf16", "fp32", "mixed", "unknown")
"""Precisions that have a colour, each in a CSS variable of its own name: "var(--int8)"."""

_WIDE = 200
"""Ratio of the ends of a logarithmic axis from which on powers of ten are ticks enough."""

_MOST = 300
"""A power of ten that a float can hold."""


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis of a layout; `more` are further settings of Plotly's."""
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 8},
        "gridcolor": "var(--line)",
        "linecolor": "var(--line-strong)",
        "zerolinecolor": "var(--line)",
        "tickcolor": "var(--line-strong)",
        "automargin": True,
        "fixedrange": False,
        **more,
    }


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis for positive values whose ticks are labelled in full.

    Plotly labels those between the powers of ten by their first digit: 0.02 and 0.2 are both "2".
    """
    low, high = min(values, default=1.0), max(values, default=1.0)
    digits = (1, 2, 5) if high < _WIDE * low else (1,)
    powers = range(max(math.floor(math.log10(low)) - 1, -_MOST), min(math.ceil(math.log10(high)) + 2, _MOST))
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return axis(title, type="log", tickvals=ticks, ticktext=[_short(tick) for tick in ticks])


def _short(tick: float) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tick >= 0.99 * factor:
            return f"{tick / factor:g}{unit}"
    return f"{tick:g}"


def layout(**more: Any) -> dict[str, Any]:
    """Return a figure's layout; `more` are further settings of Plotly's, such as the axes."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": "var(--ink)", "family": "system-ui, -apple-system, 'Segoe UI', sans-serif"},
        "margin": {"l": 12, "r": 12, "t": 18, "b": 12},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line-strong)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        "dragmode": False,
        **more,
    }


def escaped(text: str) -> str:
    """Return text for Plotly, which interprets some HTML tags in names, ticks and hover texts."""
    return escape(text, quote=False)


def level_of(precision: str) -> str:
    """Return the entry of LEVELS for a precision in a report: "fp16+int8" is "mixed", anything else "unknown"."""
    if precision in LEVELS:
        return precision
    parts = precision.split("+")
    return "mixed" if len(parts) > 1 and all(part in LEVELS for part in parts) else "unknown"


def line_colour(precision: str) -> str:
    """Return the colour of a precision for thin lines; the pale colour of FP32 only suits areas."""
    level = level_of(precision)
    return "var(--muted)" if level in ("fp32", "unknown") else f"var(--{level})"
