"""What a figure is: its Plotly traces and layout, and the words around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Trace = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One entry of a figure's selector.

    Attributes:
        name: as the selector shows it.
        data: replaces the figure's traces.
        layout: overrides the figure's layout, key by key.
    """

    name: str
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        key: the id of its element in the page.
        title: its heading.
        alt: its content in words, for screen readers.
        data: its traces; empty when there are choices.
        layout: its layout, without the height.
        height: in pixels.
        min_width: in pixels; in a narrower page the figure scrolls in a box of its own.
        choices: entries of the selector, the first shown at first; empty for a figure without a selector.
        choose: the selector's label.
    """

    key: str
    title: str
    alt: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 360
    min_width: int = 0
    choices: tuple[Choice, ...] = ()
    choose: str = ""

    def spec(self) -> dict[str, Any]:
        """Return what the page's script draws, as plain values for JSON."""
        first = self.choices[0] if self.choices else Choice("", self.data)
        return {
            "data": first.data,
            "layout": {**self.layout, **first.layout, "height": self.height},
            "choices": [{"data": choice.data, "layout": choice.layout} for choice in self.choices],
        }
