"""The precision strip: what every layer was asked for, exported in and executed in, with kernel times below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maseRT.report.figures.figure import Figure, Trace
from maseRT.report.figures.style import LEVELS, axis, escaped, layout, level_of
from maseRT.report.schema import LayerStrip, Precision
from maseRT.report.wording import significant

_STAGES = ("executed", "exported", "asked")
"""The rows of the strip, from the bottom to the top."""

_ABBREVIATIONS = {
    "int8": "8",
    "fp8": "f8",
    "fp16": "16",
    "bf16": "b16",
    "fp32": "32",
    "mixed": "mix",
    "unknown": "?",
}
_MOST_LABELLED = 48
"""Up to this many layers there is room for their names, and for a word in every cell."""


def precision_strip(precision: Precision) -> Figure | None:
    """Return a cell for each layer and stage; None without layers.

    Layers that were folded away or fused into another one are left out, as no kernel of their own runs.
    """
    layers = [layer for layer in precision.layers if layer.verdict not in ("nothing to run", "fused")]
    if not layers:
        return None
    levels = [[level_of(getattr(layer, stage)) for layer in layers] for stage in _STAGES]
    shown = [level for level in LEVELS if any(level in row for row in levels)]
    differing = [position for position, layer in enumerate(layers) if layer.verdict == "differs"]
    labelled = len(layers) <= _MOST_LABELLED
    timed = any(layer.ms is not None for layer in layers)
    traces = [
        _cells(layers, levels, gaps=labelled),
        *([_cell_labels(levels)] if labelled else []),
        *(_legend_entry(level) for level in shown),
        *([_mismatch_marks(differing)] if differing else []),
        *([_kernel_times(layers)] if timed else []),
    ]
    counts = ", ".join(f"{sum(level == each for each in levels[0])} in {level}" for level in shown)
    told = f" They differ for {', '.join(layers[position].name for position in differing)}." if differing else ""
    return Figure(
        key="figure-precision",
        title="Precision of each layer",
        alt=f"{len(layers)} layers; executed: {counts}.{told} The table below has every layer.",
        data=traces,
        layout=_strip_layout(layers, labelled=labelled, timed=timed, marked=bool(differing)),
        height=(420 if timed else 300) + (40 if labelled else 0),
        min_width=max(300, min(24 * len(layers), 900)) if labelled else 640,
    )


def _cells(layers: Sequence[LayerStrip], levels: Sequence[Sequence[str]], *, gaps: bool) -> Trace:
    hover = [
        [
            f"<b>{escaped(layer.name)}</b> ({escaped(layer.type)})<br>"
            f"{stage}: {escaped(getattr(layer, stage) or 'not known')}<br>{layer.verdict}"
            for layer in layers
        ]
        for stage in _STAGES
    ]
    # Each colour stands at both ends of its level's part of the scale: Plotly would blend neighbours otherwise.
    colours = [
        [(position + side) / len(LEVELS), f"var(--{level})"] for position, level in enumerate(LEVELS) for side in (0, 1)
    ]
    return {
        "type": "heatmap",
        "x": list(range(len(layers))),
        "y": list(range(len(_STAGES))),
        "z": [[LEVELS.index(level) for level in row] for row in levels],
        "zmin": -0.5,
        "zmax": len(LEVELS) - 0.5,
        "colorscale": colours,
        "showscale": False,
        "xgap": 2 if gaps else 0,
        "ygap": 4,
        "hoverinfo": "text",
        "hovertext": hover,
    }


def _cell_labels(levels: Sequence[Sequence[str]]) -> Trace:
    """Return the abbreviations in the cells; "var(--on-LEVEL)" is a text colour that is legible on the level's own."""
    cells = [(x, y, level) for y, row in enumerate(levels) for x, level in enumerate(row)]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [x for x, _, _ in cells],
        "y": [y for _, y, _ in cells],
        "text": [_ABBREVIATIONS[level] for _, _, level in cells],
        "textfont": {"color": [f"var(--on-{level})" for _, _, level in cells]},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _legend_entry(level: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "not observed" if level == "unknown" else f"{level.upper()} ({_ABBREVIATIONS[level]})",
        "x": [None],
        "y": [None],
        "marker": {
            "symbol": "square",
            "size": 13,
            "color": f"var(--{level})",
            "line": {"width": 1, "color": "var(--muted)"},
        },
        "hoverinfo": "skip",
    }


def _mismatch_marks(positions: Sequence[int]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "does not run as asked",
        "x": list(positions),
        "y": [2.8] * len(positions),
        "marker": {"symbol": "triangle-down", "size": 11, "color": "var(--bad)"},
        "hoverinfo": "skip",
    }


def _kernel_times(layers: Sequence[LayerStrip]) -> Trace:
    return {
        "type": "bar",
        "x": list(range(len(layers))),
        "y": [layer.ms for layer in layers],
        "yaxis": "y2",
        "marker": {"color": [f"var(--{level_of(layer.executed)})" for layer in layers]},
        "showlegend": False,
        "hoverinfo": "text",
        "hovertext": [
            f"<b>{escaped(layer.name)}</b><br>{significant(layer.ms)} ms" if layer.ms else "" for layer in layers
        ],
    }


def _strip_layout(layers: Sequence[LayerStrip], *, labelled: bool, timed: bool, marked: bool) -> dict[str, Any]:
    """Return the layout: the strip below, the kernel times above it, and room for marks over the cells."""
    names = [escaped(_shortened(layer.name)) for layer in layers]
    ticks = (
        {"tickvals": list(range(len(layers))), "ticktext": names, "tickangle": -60}
        if labelled
        else {"showticklabels": False}
    )
    times = {"yaxis2": axis("ms", domain=[0.64, 1], rangemode="tozero", nticks=4)} if timed else {}
    return layout(
        xaxis=axis("" if labelled else "layers in order", showgrid=False, zeroline=False, anchor="y", **ticks),
        yaxis=axis(
            "",
            domain=[0, 0.54 if timed else 1],
            showgrid=False,
            zeroline=False,
            range=[-0.5, 3.1 if marked else 2.5],
            tickvals=list(range(len(_STAGES))),
            ticktext=list(_STAGES),
        ),
        **times,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0.15,
    )


def _shortened(name: str, most: int = 22) -> str:
    """Return the end of a long name: the beginnings of layer names are often alike."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
