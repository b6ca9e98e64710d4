"""What a comparison of an INT8 engine with a float engine finds, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from maseRT.blame.limits import WORTH

_SHOWN = 5

_FEW = 3
"""As many rules at most are told where float is faster all the same."""


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
        rules: for [quantize] rules, in TOML, as few as select them.
        saves_ms: the kernel time that they are expected to save.
        predicted_ms: the engine's kernel time with this remedy and those before it.
        int8_left: how many layers are INT8 with these remedies.
    """

    layers: tuple[str, ...]
    rules: tuple[str, ...]
    saves_ms: float
    predicted_ms: float
    int8_left: int


@dataclass(frozen=True)
class Blame:
    """Where an INT8 engine's time goes.

    Attributes:
        ms: the sum of its kernel times, which is more than an inference takes where kernels overlap.
        float_ms: that of the float engine.
        float_precision: the precision that most layers of the float engine were asked for.
        slower: layers that take longer than in float, the worst first.
        conversions: the most expensive first.
        remedies: the most gain for each layer first.
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
    def prefers_float(self) -> bool:
        """Whether the float engine is clearly faster than the INT8 one, and no rule makes up for more than that."""
        return self.ms > (1 + WORTH) * self.float_ms and self.predicted_ms > (1 - WORTH) * self.float_ms

    @property
    def advised(self) -> tuple[Remedy, ...]:
        """The remedies that are worth telling.

        Where the float engine is the faster one, that is the first one at most, if it is short: for who wants the small
        weights of INT8 all the same.
        """
        if not self.prefers_float:
            return self.remedies
        return tuple(each for each in self.remedies[:1] if each.int8_left and len(each.rules) <= _FEW)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules of these remedies."""
        return tuple(chain.from_iterable(remedy.rules for remedy in self.advised))

    @property
    def advised_ms(self) -> float:
        """The sum of the kernel times that is expected with these rules."""
        return self.advised[-1].predicted_ms if self.advised else self.ms

    def lines(self) -> list[str]:
        """Return the result in sentences; what to do comes last, rules ready to be pasted into a config."""
        told = [f"the kernels take {self.ms:.4f} ms, those of the float engine {self.float_ms:.4f} ms"]
        if self.slower:
            each = [f"{s.layer} {s.ms:.4f} ms ({s.float_ms:.4f} in float)" for s in self.slower]
            told.append(f"slower than in float: {_listed(each)}")
        if self.conversions:
            total = sum(conversion.ms for conversion in self.conversions)
            each = [conversion.line() for conversion in self.conversions]
            told.append(f"type and layout changes take {total:.4f} ms: {_listed(each)}")
        if self.prefers_float:
            told.append(f'the float engine stays the faster one: set [quantize] precision = "{self.float_precision}"')
        elif not self.advised:
            told.append("no rule is expected to make it faster")
        return told + self._rule_lines()

    def _rule_lines(self) -> list[str]:
        if not self.advised:
            return []
        start = "to stay with INT8, put this" if self.prefers_float else "put this"
        told = [f"{start} first into [quantize] rules, for an expected {self.advised_ms:.4f} ms:"]
        for remedy in self.advised:
            first, *rest = remedy.rules
            told.append(f"  {first}  # saves {remedy.saves_ms:.4f} ms")
            told += [f"  {rule}  # with the line above" for rule in rest]
        return told

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            **asdict(self),
            "predicted_ms": self.predicted_ms,
            "prefers_float": self.prefers_float,
            "rules": list(self.rules),
            "advised_ms": self.advised_ms,
            "lines": self.lines(),
        }


def _listed(told: Sequence[str]) -> str:
    """Return the first entries, and how many there are beyond them."""
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return "; ".join(told[:_SHOWN]) + more
