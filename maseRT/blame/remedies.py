"""Which INT8 layers would be faster in float, by estimates from two engines' kernel times.

A layer in float is assumed to take as long in the INT8 engine as in the float engine. Conversions that only its INT8
precision needs disappear. Where it writes an INT8 tensor for a layer that stays INT8, one of mean cost appears.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass
from itertools import chain

from maseRT.blame.findings import Remedy
from maseRT.blame.kernels import KernelGraph, timed_together
from maseRT.receipt import Receipt

NOISE = 0.005
"""Share of the engine's time below which a gain is ignored: kernel times do not repeat more exactly."""

_MOST_REMEDIES = 10


def int8_layers(receipt: Receipt) -> frozenset[str]:
    """Return the layers that were asked for INT8."""
    return frozenset(layer.name for layer in receipt.layers if layer.asked == "int8")


def find_remedies(quantized: Receipt, float_: Receipt) -> tuple[Remedy, ...]:
    """Return groups of layers to keep in float: greedily the group that saves most, as long as one is worth it."""
    savings = _Savings(quantized, float_)
    names = [layer.name for layer in quantized.layers]
    float_precision = {layer.name: layer.asked for layer in float_.layers}
    taken: set[str] = set()
    predicted_ms = savings.total_ms
    found: list[Remedy] = []
    while len(found) < _MOST_REMEDIES:
        group, saved_ms = savings.best_group(taken)
        if saved_ms < savings.noise_ms:
            break
        taken |= group
        predicted_ms -= saved_ms
        freed = savings.freed_by(group)
        layers = tuple(name for name in names if name in freed)
        rules = tuple(f'{{ name = "{name}", precision = "{float_precision[name]}" }},' for name in layers)
        found.append(Remedy(layers, rules, saved_ms, predicted_ms))
    return tuple(found)


@dataclass(frozen=True)
class _Saving:
    """Time that is saved once all of some INT8 layers are float; negative where float is slower."""

    layers: frozenset[str]
    ms: float


@dataclass(frozen=True)
class _Edge:
    """An INT8 tensor that needs no conversion: the layer that writes it, and those that read it directly."""

    writer: str
    readers: frozenset[str]

    def is_converted(self, floats: Set[str]) -> bool:
        """Whether a kernel has to quantize the tensor once some layers are float."""
        return self.writer in floats and not self.readers <= floats


class _Savings:
    """What sets of INT8 layers save in float.

    Attributes:
        total_ms: the time of all kernels of the INT8 engine.
        noise_ms: gains below this are ignored.
    """

    def __init__(self, quantized: Receipt, float_: Receipt) -> None:
        self._together = timed_together(quantized, float_)
        self._mine, self._theirs = KernelGraph(quantized, self._together), KernelGraph(float_, self._together)
        self._all_int8 = int8_layers(quantized)
        self._int8 = self._names(self._all_int8)
        self.total_ms = self._mine.total_ms
        self.noise_ms = NOISE * self.total_ms
        converting = [kernel.ms for kernel in quantized.converting if kernel.ms]
        times = [kernel.ms for kernel in quantized.kernels if kernel.ms]
        self._conversion_ms = sum(converting) / len(converting) if converting else min(times)
        self._savings: dict[str, list[_Saving]] = {}
        self._edges: dict[str, list[_Edge]] = {}
        for saving in self._all_savings():
            for layer in saving.layers:
                self._savings.setdefault(layer, []).append(saving)
        for edge in self._all_edges():
            for layer in {edge.writer, *edge.readers}:
                self._edges.setdefault(layer, []).append(edge)

    def freed_by(self, group: Set[str]) -> frozenset[str]:
        """Return the INT8 layers that a group stands for: some of its names are those of layers timed together."""
        members = (self._together.get(name, (name,)) for name in group)
        return self._all_int8.intersection(chain.from_iterable(members))

    def _names(self, layers: Set[str]) -> frozenset[str]:
        """Return the names that layers are timed under."""
        common = {name for name, members in self._together.items() if not layers.isdisjoint(members)}
        return frozenset(common | (layers - {*chain.from_iterable(self._together.values())}))

    def best_group(self, taken: Set[str]) -> tuple[set[str], float]:
        """Return the group of further layers that saves most, the smallest of equal ones, and what it saves in ms.

        Args:
            taken: layers that are float already.
        """
        left = self._int8 - taken
        groups = [*(self._grown(name, taken) for name in sorted(left)), set(left)]
        saved_ms, _, names = max(
            ((self._saved(group, taken), -len(group), sorted(group)) for group in groups if group),
            default=(0.0, 0, []),
        )
        return set(names), saved_ms

    def _grown(self, seed: str, taken: Set[str]) -> set[str]:
        """Return a layer together with the INT8 layers around it that save more along with it."""
        group = {seed}
        while True:
            around = {name for layer in group for name in self._connected(layer)} - group - taken
            gains = [(self._saved({name}, taken | group), name) for name in sorted(around)]
            gain_ms, name = max(gains, default=(0.0, ""))
            if gain_ms <= self.noise_ms:
                return group
            group.add(name)

    def _connected(self, layer: str) -> set[str]:
        """Return the INT8 layers on which depends what a layer saves."""
        savings = (saving.layers for saving in self._savings.get(layer, []))
        edges = ({edge.writer, *edge.readers} for edge in self._edges.get(layer, []))
        return set(chain.from_iterable((*savings, *edges))) & self._int8

    def _saved(self, added: Collection[str], taken: Set[str]) -> float:
        """Return what further layers save in ms, when those taken are float already."""
        floats = taken | set(added)
        # By identity: two kernels may save the same time for the same layers.
        savings = {id(saving): saving for layer in added for saving in self._savings.get(layer, [])}.values()
        edges = {id(edge): edge for layer in added for edge in self._edges.get(layer, [])}.values()
        saved_ms = sum(saving.ms for saving in savings if saving.layers <= floats)
        new_conversions = sum(edge.is_converted(floats) - edge.is_converted(taken) for edge in edges)
        return saved_ms - new_conversions * self._conversion_ms

    def _all_savings(self) -> Iterator[_Saving]:
        """Yield each difference between the engines, with the INT8 layers that cause it."""
        for name in self._int8:
            yield _Saving(frozenset({name}), self._slower_by(name))
        mine, theirs = self._mine.neighbours(), self._theirs.neighbours()
        for name in {**mine, **theirs}:
            around = mine.get(name, frozenset()) | theirs.get(name, frozenset())
            if name not in self._int8 and around & self._int8:
                yield _Saving(around & self._int8, self._slower_by(name))
        for engine, sign in ((self._mine, 1), (self._theirs, -1)):
            for kernel in engine.kernels:
                if kernel.converts and kernel.ms and (touched := engine.around(kernel) & self._int8):
                    yield _Saving(touched, sign * kernel.ms)

    def _slower_by(self, layer: str) -> float:
        return self._mine.ms_of(layer) - self._theirs.ms_of(layer)

    def _all_edges(self) -> Iterator[_Edge]:
        for kernel in self._mine.kernels:
            if kernel.converts or kernel.layer not in self._int8:
                continue
            for tensor, kind in zip(kernel.outputs, kernel.writes, strict=False):
                readers = self._mine.direct_readers(tensor)
                if kind == "int8" and readers:
                    yield _Edge(kernel.layer, readers)
