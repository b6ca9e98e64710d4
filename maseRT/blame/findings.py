"""What a comparison of an INT8 engine with a float engine finds, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

_SHOWN = 5


@dataclass(frozen=True)
class SlowerLayer:
    """A layer, or layers that are timed together, whose kernels take longer than in the float engine."""

    layer: str
    ms: float
    float_ms: float


@dataclass(frozen=True)
class Conversion:
    """A kernel of the INT8 engine that only changes types or memory layouts.

    Attributes:
        kernel: its name.
        before: the layers whose results it converts; empty for the model's input and operations outside of layers.
        after: the layers that read its result; likewise.
        reads: types of its inputs.
        writes: types of its outputs.
    """

    kernel: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    ms: float

    def line(self) -> str:
        """Return the conversion in words."""
        before, after = (", ".join(names) or "outside of layers" for names in (self.before, self.after))
        reads, writes = ("/".join(dict.fromkeys(types)) for types in (self.reads, self.writes))
        return f"{self.ms:.4f} ms from {before} to {after} ({reads} to {writes})"


@dataclass(frozen=True)
class Remedy:
    """INT8 layers that together are faster in float.

    Attributes:
        layers: their names.
        rules: for [quantize] rules, in TOML, one per layer.
        saves_ms: the kernel time that they are expected to save.
        predicted_ms: the engine's kernel time with this remedy and those before it.
    """

    layers: tuple[str, ...]
    rules: tuple[str, ...]
    saves_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class Blame:
    """Where an INT8 engine's time goes.

    Attributes:
        ms: the sum of its kernel times, which is more than an inference takes where kernels overlap.
        float_ms: that of the float engine.
        float_precision: the precision that most layers of the float engine were asked for.
        slower: layers that take longer than in float, the worst first.
        conversions: the most expensive first.
        remedies: the largest gain first.
    """

    ms: float
    float_ms: float
    float_precision: str
    slower: tuple[SlowerLayer, ...]
    conversions: tuple[Conversion, ...]
    remedies: tuple[Remedy, ...]

    @property
    def predicted_ms(self) -> float:
        """The sum of the kernel times that is expected with all remedies."""
        return self.remedies[-1].predicted_ms if self.remedies else self.ms

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules of all remedies."""
        return tuple(chain.from_iterable(remedy.rules for remedy in self.remedies))

    def lines(self) -> list[str]:
        """Return the result in sentences; the proposed rules come last, ready to be pasted into a config."""
        told = [f"the kernels take {self.ms:.4f} ms, those of the float engine {self.float_ms:.4f} ms"]
        if self.slower:
            each = [f"{s.layer} {s.ms:.4f} ms ({s.float_ms:.4f} in float)" for s in self.slower]
            told.append(f"slower than in float: {_listed(each)}")
        if self.conversions:
            total = sum(conversion.ms for conversion in self.conversions)
            each = [conversion.line() for conversion in self.conversions]
            told.append(f"type and layout changes take {total:.4f} ms: {_listed(each)}")
        if not self.remedies:
            return [*told, "no rule is expected to make it faster"]
        told.append(f"put this first into [quantize] rules, for an expected {self.predicted_ms:.4f} ms:")
        for remedy in self.remedies:
            first, *rest = remedy.rules
            told.append(f"  {first}  # saves {remedy.saves_ms:.4f} ms")
            told += [f"  {rule}  # with the line above" for rule in rest]
        if self.predicted_ms >= self.float_ms:
            told.append(f'the float engine stays the faster one: set [quantize] precision = "{self.float_precision}"')
        return told

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "predicted_ms": self.predicted_ms, "lines": self.lines()}


def _listed(told: Sequence[str]) -> str:
    """Return the first entries, and how many there are beyond them."""
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return "; ".join(told[:_SHOWN]) + more
