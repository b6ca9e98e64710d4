"""Why an INT8 engine takes the time it takes against a float engine of the same model, and the rules that make it less.

Pure functions of two receipts with kernel times. What a rule saves is an estimate: a layer is taken to cost in the INT8
engine what it costs in the float one, conversions that only serve it to vanish, and one of mean cost to appear wherever
it hands an INT8 tensor to a layer that stays INT8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from maseRT.errors import UsageError
from maseRT.receipt import Kernel, Receipt

_NOISE = 0.005
"""A rule that saves a smaller share of the engine's time is not proposed: kernel times repeat no better."""

_MOST_REMEDIES = 10
_SHOWN = 5
_OTHER = ""
"""Stands for whatever belongs to no layer of the plan."""


@dataclass(frozen=True)
class SlowerLayer:
    """A layer whose kernels take longer in the INT8 engine."""

    layer: str
    ms: float
    float_ms: float


@dataclass(frozen=True)
class Conversion:
    """A kernel of the INT8 engine that only changes types or memory layouts.

    Attributes:
        kernel: its name.
        before: the layers whose results it converts; empty for the model's input and operations outside of layers.
        after: the layers that read what it writes; likewise.
        reads: types of its inputs.
        writes: types of its outputs.
    """

    kernel: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    ms: float


@dataclass(frozen=True)
class Remedy:
    """Layers that are better left in float, together.

    Attributes:
        layers: their names.
        rules: for [quantize] rules, in TOML, one per layer.
        saves_ms: how much less the kernels are expected to take.
        predicted_ms: what they then take, with the remedies before this one.
    """

    layers: tuple[str, ...]
    rules: tuple[str, ...]
    saves_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class Blame:
    """Where an INT8 engine's time goes.

    Attributes:
        ms: of all its kernels, one after another, which is more than an inference takes.
        float_ms: of the float engine's.
        float_precision: what most layers of that one were asked for.
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
        """What the kernels are expected to take with all remedies."""
        return self.remedies[-1].predicted_ms if self.remedies else self.ms

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules of all remedies."""
        return tuple(chain.from_iterable(remedy.rules for remedy in self.remedies))

    def lines(self) -> list[str]:
        """Return what there is to say, a sentence each; the rules are the last lines."""
        told = [f"the kernels take {self.ms:.4f} ms, those of the float engine {self.float_ms:.4f} ms"]
        if self.slower:
            each = [f"{s.layer} {s.ms:.4f} ms ({s.float_ms:.4f} in float)" for s in self.slower[:_SHOWN]]
            told.append(f"slower than in float: {_listed(each, len(self.slower))}")
        if self.conversions:
            each = [f"{c.ms:.4f} ms {_between(c)}" for c in self.conversions[:_SHOWN]]
            total = sum(c.ms for c in self.conversions)
            told.append(f"type and layout changes take {total:.4f} ms: {_listed(each, len(self.conversions))}")
        if not self.remedies:
            return [*told, "no rule is expected to make it faster"]
        told.append(f"put this first into [quantize] rules, for an expected {self.predicted_ms:.4f} ms:")
        for remedy in self.remedies:
            first, *rest = remedy.rules
            told += [
                f"  {first}  # saves {remedy.saves_ms:.4f} ms",
                *(f"  {rule}  # with the line above" for rule in rest),
            ]
        if self.predicted_ms >= self.float_ms:
            told.append(f'the float engine stays the faster one: set [quantize] precision = "{self.float_precision}"')
        return told

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "predicted_ms": self.predicted_ms, "lines": self.lines()}


def blame(quantized: Receipt, float_: Receipt) -> Blame:
    """Compare an INT8 engine with a float engine of the same model, kernel by kernel.

    Args:
        quantized: the INT8 engine's receipt, with times.
        float_: the float engine's, with times, for the same GPU.

    Raises:
        UsageError: there are no times, the models differ, or the second engine is not a float one.
    """
    _check(quantized, float_)
    ledger = _Ledger(quantized, float_)
    return Blame(
        ms=ledger.mine.total,
        float_ms=ledger.theirs.total,
        float_precision=Counter(layer.asked for layer in float_.layers).most_common(1)[0][0],
        slower=ledger.slower(),
        conversions=ledger.mine.conversions(),
        remedies=ledger.remedies(),
    )


def _check(quantized: Receipt, float_: Receipt) -> None:
    for receipt, which in ((quantized, "INT8"), (float_, "float")):
        if not any(kernel.ms for kernel in receipt.kernels):
            raise UsageError(
                f"the kernels of the {which} engine were not timed", where="blame", fix="run `masert analyze` on a GPU"
            )
    if {layer.name for layer in quantized.layers} != {layer.name for layer in float_.layers}:
        raise UsageError("the two engines are of different models", where="blame", fix="compare two runs of one model")
    if _int8(float_):
        raise UsageError(
            f"the engine to compare with has INT8 layers too: {', '.join(sorted(_int8(float_))[:3])}",
            where="blame",
            fix='make it with [quantize] precision = "fp16"',
        )
    if quantized.target != float_.target:
        raise UsageError(f"the engines are for {quantized.target} and {float_.target}", where="blame")


def _int8(receipt: Receipt) -> frozenset[str]:
    return frozenset(layer.name for layer in receipt.layers if layer.asked == "int8")


class _Engine:
    """The kernels of one engine and which tensors connect them."""

    def __init__(self, receipt: Receipt) -> None:
        self.kernels = receipt.kernels
        self.total = sum(kernel.ms or 0.0 for kernel in self.kernels)
        self._makers: dict[str, list[Kernel]] = {}
        self._readers: dict[str, list[Kernel]] = {}
        for kernel in self.kernels:
            for tensor in kernel.outputs:
                self._makers.setdefault(tensor, []).append(kernel)
            for tensor in kernel.inputs:
                self._readers.setdefault(tensor, []).append(kernel)

    def before(self, kernel: Kernel) -> frozenset[str]:
        """Return the layers whose results a kernel reads, behind conversions too."""
        return _ends(kernel.inputs, self._makers, lambda maker: maker.inputs)

    def after(self, kernel: Kernel) -> frozenset[str]:
        """Return the layers that read what a kernel writes, behind conversions too."""
        return _ends(kernel.outputs, self._readers, lambda reader: reader.outputs)

    def reading(self, tensor: str) -> frozenset[str]:
        """Return the layers that read a tensor as it is."""
        return frozenset(reader.layer for reader in self._readers.get(tensor, []) if not reader.converts)

    def around(self, kernel: Kernel) -> frozenset[str]:
        """Return the layers beside a kernel, that which it belongs to included."""
        return self.before(kernel) | self.after(kernel) | {kernel.layer}

    def ms_of(self, layer: str) -> float:
        """Return the time of a layer's own kernels, conversions left out."""
        return sum(each.ms or 0.0 for each in self.kernels if each.layer == layer and not each.converts)

    def conversions(self) -> tuple[Conversion, ...]:
        found = [
            Conversion(
                kernel=kernel.name,
                before=tuple(sorted(self.before(kernel) - {_OTHER})),
                after=tuple(sorted(self.after(kernel) - {_OTHER})),
                reads=kernel.reads,
                writes=kernel.writes,
                ms=kernel.ms,
            )
            for kernel in self.kernels
            if kernel.converts and kernel.ms
        ]
        return tuple(sorted(found, key=lambda conversion: -conversion.ms))


def _ends(
    tensors: Iterable[str], at: Mapping[str, Sequence[Kernel]], further: Callable[[Kernel], Iterable[str]]
) -> frozenset[str]:
    """Return the layers at tensors, or where conversions lead to from there."""
    found: set[str] = set()
    seen, todo = set(tensors), list(tensors)
    while todo:
        for kernel in at.get(todo.pop(), ()):
            if not kernel.converts:
                found.add(kernel.layer)
                continue
            new = set(further(kernel)) - seen
            seen |= new
            todo += new
    return frozenset(found)


@dataclass(frozen=True)
class _Item:
    """What is saved once all of some INT8 layers are float."""

    layers: frozenset[str]
    ms: float


@dataclass(frozen=True)
class _Edge:
    """An INT8 tensor: its writer, and the layers that read it without a conversion in between."""

    writer: str
    readers: frozenset[str]


class _Ledger:
    """What each set of layers would save in float."""

    def __init__(self, quantized: Receipt, float_: Receipt) -> None:
        self.mine, self.theirs = _Engine(quantized), _Engine(float_)
        self._names = [layer.name for layer in quantized.layers]
        self._int8 = _int8(quantized)
        self._float_of = {layer.name: layer.asked for layer in float_.layers}
        converting = [kernel.ms for kernel in quantized.converting if kernel.ms]
        times = [kernel.ms for kernel in quantized.kernels if kernel.ms]
        self._conversion_ms = sum(converting) / len(converting) if converting else min(times)
        self._items: dict[str, list[_Item]] = {}
        self._edges: dict[str, list[_Edge]] = {}
        for item in self._all_items():
            for layer in item.layers:
                self._items.setdefault(layer, []).append(item)
        for edge in self._all_edges():
            for layer in {edge.writer, *edge.readers}:
                self._edges.setdefault(layer, []).append(edge)

    def slower(self) -> tuple[SlowerLayer, ...]:
        found = [SlowerLayer(name, self.mine.ms_of(name), self.theirs.ms_of(name)) for name in self._names]
        worse = [each for each in found if each.ms - each.float_ms > _NOISE * each.ms]
        return tuple(sorted(worse, key=lambda each: each.float_ms - each.ms))

    def remedies(self) -> tuple[Remedy, ...]:
        """Take the group of layers that saves most, then the next, while it is worth it."""
        taken: set[str] = set()
        predicted = self.mine.total
        found: list[Remedy] = []
        while len(found) < _MOST_REMEDIES:
            groups = [*(self._grown(name, taken) for name in sorted(self._int8 - taken)), set(self._int8 - taken)]
            saved, _, group = max(
                ((self._saved(group, taken), -len(group), sorted(group)) for group in groups if group),
                default=(0.0, 0, []),
            )
            if saved < _NOISE * self.mine.total:
                break
            taken |= set(group)
            predicted -= saved
            layers = tuple(name for name in self._names if name in group)
            rules = tuple(f'{{ name = "{name}", precision = "{self._float_of[name]}" }},' for name in layers)
            found.append(Remedy(layers, rules, saved, predicted))
        return tuple(found)

    def _grown(self, seed: str, taken: set[str]) -> set[str]:
        """Return a layer with those INT8 layers beside it that save more along with it."""
        group = {seed}
        while True:
            beside = {name for layer in group for name in self._beside(layer)} - group - taken
            gains = [(self._saved({name}, taken | group), name) for name in sorted(beside)]
            gain, name = max(gains, default=(0.0, ""))
            if gain <= _NOISE * self.mine.total:
                return group
            group.add(name)

    def _beside(self, layer: str) -> set[str]:
        items = (item.layers for item in self._items.get(layer, []))
        edges = ({edge.writer, *edge.readers} for edge in self._edges.get(layer, []))
        return set(chain.from_iterable((*items, *edges))) & self._int8

    def _saved(self, added: Iterable[str], taken: set[str]) -> float:
        """Return what further layers in float save once others are."""
        added = set(added)
        items = {id(item): item for layer in added for item in self._items.get(layer, [])}.values()
        edges = {id(edge): edge for layer in added for edge in self._edges.get(layer, [])}.values()
        gone = sum(item.ms for item in items if item.layers <= taken | added)
        new = sum(_converted(edge, taken | added) - _converted(edge, taken) for edge in edges)
        return gone - new * self._conversion_ms

    def _all_items(self) -> Iterable[_Item]:
        """Yield what differs between the engines, and the INT8 layers that it depends on."""
        for name in self._int8:
            yield _Item(frozenset({name}), self.mine.ms_of(name) - self.theirs.ms_of(name))
        beside = _merged(_neighbours(self.mine), _neighbours(self.theirs))
        for name, around in beside.items():
            touched = around & self._int8
            if touched and name not in self._int8:
                yield _Item(touched, self.mine.ms_of(name) - self.theirs.ms_of(name))
        for engine, sign in ((self.mine, 1), (self.theirs, -1)):
            for kernel in engine.kernels:
                touched = engine.around(kernel) & self._int8
                if kernel.converts and kernel.ms and touched:
                    yield _Item(touched, sign * kernel.ms)

    def _all_edges(self) -> Iterable[_Edge]:
        for kernel in self.mine.kernels:
            if kernel.converts or kernel.layer not in self._int8:
                continue
            for tensor, kind in zip(kernel.outputs, kernel.writes, strict=False):
                readers = self.mine.reading(tensor)
                if kind == "int8" and readers:
                    yield _Edge(kernel.layer, readers)


def _neighbours(engine: _Engine) -> dict[str, frozenset[str]]:
    """Return the layers beside each layer, that itself included."""
    found: dict[str, frozenset[str]] = {}
    for kernel in engine.kernels:
        if kernel.layer and not kernel.converts:
            found[kernel.layer] = found.get(kernel.layer, frozenset()) | engine.around(kernel)
    return found


def _merged(one: Mapping[str, frozenset[str]], other: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    names = {**one, **other}
    return {name: one.get(name, frozenset()) | other.get(name, frozenset()) for name in names}


def _converted(edge: _Edge, floats: set[str]) -> int:
    """Tell whether a tensor has to be quantized by a kernel of its own once some layers are float."""
    return int(edge.writer in floats and not edge.readers <= floats)


def _between(conversion: Conversion) -> str:
    before, after = (", ".join(names) for names in (conversion.before, conversion.after))
    types = f"{'/'.join(dict.fromkeys(conversion.reads))} to {'/'.join(dict.fromkeys(conversion.writes))}"
    return f"from {before or 'outside of layers'} to {after or 'outside of layers'} ({types})"


def _listed(told: list[str], count: int) -> str:
    return "; ".join(told) + (f"; and {count - len(told)} more" if count > len(told) else "")
