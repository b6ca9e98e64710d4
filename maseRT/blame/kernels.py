"""The kernels of an engine as a graph: they are connected by the tensors that they read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from maseRT.blame.findings import Conversion
from maseRT.receipt import Kernel, Receipt

NO_LAYER = ""
"""Stands for the model's ends, and for kernels that belong to no layer of the plan."""


def timed_together(*receipts: Receipt) -> dict[str, tuple[str, ...]]:
    """Return the layers that some engine hides in one kernel, under a common name, in the order of the plan.

    No engine tells their times apart, or one does and the other does not: they can only be compared together.
    """
    groups: list[set[str]] = []
    for hidden in (set(kernel.hides) for receipt in receipts for kernel in receipt.kernels if kernel.hides):
        joined = [group for group in groups if group & hidden]
        groups = [*(group for group in groups if not group & hidden), hidden.union(*joined)]
    ordered = [tuple(layer.name for layer in receipts[0].layers if layer.name in group) for group in groups]
    return {f"{names[0]} ... {names[-1]} ({len(names)} layers in one)": names for names in ordered}


class KernelGraph:
    """The kernels of one engine.

    Attributes:
        kernels: in the order of execution; one that belongs to layers that are timed together bears their common name.
        total_ms: the sum of their times.
    """

    def __init__(self, receipt: Receipt, together: Mapping[str, Iterable[str]]) -> None:
        common = {layer: name for name, layers in together.items() for layer in layers}
        owners = [next(iter(kernel.hides), kernel.layer) for kernel in receipt.kernels]
        self.kernels = tuple(
            replace(kernel, layer=common.get(owner, owner))
            for kernel, owner in zip(receipt.kernels, owners, strict=True)
        )
        self.total_ms = sum(kernel.ms or 0.0 for kernel in self.kernels)
        self._writers: dict[str, list[Kernel]] = {}
        self._readers: dict[str, list[Kernel]] = {}
        for kernel in self.kernels:
            for tensor in kernel.outputs:
                self._writers.setdefault(tensor, []).append(kernel)
            for tensor in kernel.inputs:
                self._readers.setdefault(tensor, []).append(kernel)

    def before(self, kernel: Kernel) -> frozenset[str]:
        """Return the layers whose results a kernel reads, directly or through conversions."""
        return _layers_at(kernel.inputs, self._writers, lambda writer: writer.inputs)

    def after(self, kernel: Kernel) -> frozenset[str]:
        """Return the layers that read what a kernel writes, directly or through conversions."""
        return _layers_at(kernel.outputs, self._readers, lambda reader: reader.outputs)

    def around(self, kernel: Kernel) -> frozenset[str]:
        """Return the layers before and after a kernel, and its own."""
        return self.before(kernel) | self.after(kernel) | {kernel.layer}

    def readers(self, tensor: str) -> Sequence[Kernel]:
        """Return the kernels that read a tensor."""
        return self._readers.get(tensor, ())

    def neighbours(self) -> dict[str, frozenset[str]]:
        """Return the layers around each layer, itself included."""
        found: dict[str, frozenset[str]] = {}
        for kernel in self.kernels:
            if kernel.layer and not kernel.converts:
                found[kernel.layer] = found.get(kernel.layer, frozenset()) | self.around(kernel)
        return found

    def ms_of(self, layer: str) -> float:
        """Return the time of a layer's own kernels, without conversions."""
        return sum(each.ms or 0.0 for each in self.kernels if each.layer == layer and not each.converts)

    def conversions(self) -> tuple[Conversion, ...]:
        """Return the kernels that only convert, the most expensive first."""
        found = [
            Conversion(
                kernel=kernel.name,
                before=tuple(sorted(self.before(kernel) - {NO_LAYER})),
                after=tuple(sorted(self.after(kernel) - {NO_LAYER})),
                reads=kernel.reads,
                writes=kernel.writes,
                ms=kernel.ms,
            )
            for kernel in self.kernels
            if kernel.converts and kernel.ms
        ]
        return tuple(sorted(found, key=lambda conversion: -conversion.ms))


def _layers_at(
    tensors: Iterable[str], at: Mapping[str, Sequence[Kernel]], further: Callable[[Kernel], Iterable[str]]
) -> frozenset[str]:
    """Return the layers of the kernels at some tensors; a conversion is replaced by the kernels beyond it.

    Args:
        tensors: to start from.
        at: tensor -> kernels.
        further: returns the tensors on the other side of a conversion.
    """
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
