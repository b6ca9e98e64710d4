"""The common look of all figures: axes, layout, and how precisions and rows are told apart."""

from __future__ import annotations

from html import escape
from typing import Any

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross", "hexagon", "triangle-down", "x", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LEVELS = ("int8", "fp8", "fp16", "bf16", "fp32", "mixed", "unknown")
"""Precisions that have a colour, each in a CSS variable of its own name: "var(--int8)"."""


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
