"""What an INT8 engine saves once some of its layers are float, estimated from two engines' kernel times.

A layer in float is assumed to take as long in the INT8 engine as in the float engine. A kernel that only converts to or
from INT8 is there for the INT8 layers that read its result, and vanishes with the last of them. Where a layer writes an
INT8 tensor itself, a kernel that quantizes appears once that layer is float, or one of several readers, but not all of
them. With all layers float the estimate is the float engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from statistics import median

from maseRT.blame.kernels import KernelGraph
from maseRT.receipt import Kernel, Receipt


def int8_layers(receipt: Receipt) -> frozenset[str]:
    """Return the layers that were asked for INT8."""
    return frozenset(layer.name for layer in receipt.layers if layer.asked == "int8")


@dataclass(frozen=True)
class _Saving:
    """Time that is saved once all of some INT8 layers are float; negative where float is slower."""

    layers: frozenset[str]
    ms: float


@dataclass(frozen=True)
class _Edge:
    """An INT8 tensor that needs no conversion: the layer that writes it, and the INT8 layers that read it."""

    writer: str
    readers: frozenset[str]

    def is_converted(self, floats: Set[str]) -> bool:
        """Whether a kernel has to quantize the tensor once some layers are float."""
        return not self.readers <= floats and (self.writer in floats or not self.readers.isdisjoint(floats))


class Savings:
    """What sets of INT8 layers save in float. Layers that are timed together go by their common name.

    Attributes:
        int8: the names of all INT8 layers.
        total_ms: the time of all kernels of the INT8 engine.
    """

    def __init__(
        self,
        quantized: Receipt,
        mine: KernelGraph,
        theirs: KernelGraph,
        together: Mapping[str, Collection[str]],
    ) -> None:
        """Compare two engines.

        Args:
            quantized: the INT8 engine's receipt.
            mine: its kernels.
            theirs: the float engine's.
            together: the layers that are timed together, see `timed_together`.
        """
        self._together = together
        self._mine, self._theirs = mine, theirs
        self._all_int8 = int8_layers(quantized)
        common = {name for name, members in together.items() if not self._all_int8.isdisjoint(members)}
        self.int8 = frozenset(common | (self._all_int8 - {*chain.from_iterable(together.values())}))
        self.total_ms = mine.total_ms
        # The median: the first conversion, of the model's input, is often many times as long as the others.
        timed = [(kernel.ms, kernel.converts) for kernel in mine.kernels if kernel.ms]
        self._conversion_ms = median([ms for ms, converts in timed if converts] or [ms for ms, _ in timed])
        # What each layer has a part in.
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

    def connected(self, layer: str) -> set[str]:
        """Return the INT8 layers on which depends what a layer saves."""
        savings = (saving.layers for saving in self._savings.get(layer, []) if len(saving.layers) < len(self.int8))
        edges = ({edge.writer, *edge.readers} for edge in self._edges.get(layer, []))
        return set(chain.from_iterable((*savings, *edges))) & self.int8

    def saved(self, added: Collection[str], taken: Set[str] = frozenset()) -> float:
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
        mine, theirs = self._mine.neighbours(), self._theirs.neighbours()
        for name in {**mine, **theirs}:
            around = mine.get(name, frozenset()) | theirs.get(name, frozenset())
            causes = {name} & self.int8 or around & self.int8 or self.int8
            yield _Saving(frozenset(causes), self._mine.ms_of(name) - self._theirs.ms_of(name))
        for engine, near, sign in ((self._mine, mine, 1), (self._theirs, theirs, -1)):
            for kernel in engine.kernels:
                if kernel.ms and (kernel.converts or not kernel.layer):
                    yield _Saving(self._causes(kernel, engine, near), sign * kernel.ms)

    def _causes(self, kernel: Kernel, engine: KernelGraph, neighbours: Mapping[str, frozenset[str]]) -> frozenset[str]:
        """Return the INT8 layers that a kernel outside of layers is there for; all where that is not known.

        A change of layout between float layers may be there for the INT8 layers around these.
        """
        after = engine.after(kernel) & self.int8
        if after and "int8" in {*kernel.reads, *kernel.writes}:
            return after
        around = engine.around(kernel)
        further = (neighbours.get(layer, frozenset()) for layer in around - self.int8)
        return self.int8.intersection(around.union(*further)) or self.int8

    def _all_edges(self) -> Iterator[_Edge]:
        for kernel in self._mine.kernels:
            if kernel.converts or kernel.layer not in self.int8:
                continue
            for tensor, kind in zip(kernel.outputs, kernel.writes, strict=False):
                if kind == "int8" and (readers := self._readers(tensor)):
                    yield _Edge(kernel.layer, readers)

    def _readers(self, tensor: str) -> frozenset[str]:
        """Return the INT8 layers that read a tensor, also behind a float layer that hands INT8 on, as pools do."""
        found: set[str] = set()
        for kernel in self._mine.readers(tensor):
            if kernel.layer in self.int8:
                found.add(kernel.layer)
            elif not kernel.converts and "int8" in kernel.reads:
                written = (name for name, kind in zip(kernel.outputs, kernel.writes, strict=False) if kind == "int8")
                found.update(*map(self._readers, written))
        return frozenset(found)
