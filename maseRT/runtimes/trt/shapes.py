"""Which optimization profile takes a batch, and at which shapes it is then computed."""

from __future__ import annotations

from collections.abc import Sequence

from maseRT.errors import UsageError
from maseRT.runtimes.base import Profile, ShapeRange

Shapes = dict[str, tuple[int, ...]]


def fit(shapes: Shapes, profiles: Sequence[Profile], *, where: str) -> tuple[int, Shapes]:
    """Return the first profile that takes these shapes, and the shapes.

    Where none does, a batch that is too small is filled up to the smallest that one takes.

    Raises:
        UsageError: no profile takes them even so; says what the profiles take.
    """
    for fill in (False, True):
        for index, ranges in enumerate(profiles):
            wanted = {name: _filled(shape, ranges[name]) if fill else shape for name, shape in shapes.items()}
            if all(_within(shape, ranges[name]) for name, shape in wanted.items()):
                return index, wanted
    takes = [f"'{name}' {list(each.min)} to {list(each.max)}" for ranges in profiles for name, each in ranges.items()]
    got = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
    raise UsageError(f"the engine takes {'; '.join(takes)}; got {got}", where=where, fix="rebuild it for these sizes")


def _filled(shape: tuple[int, ...], takes: ShapeRange) -> tuple[int, ...]:
    return (max(shape[0], takes.min[0]), *shape[1:])


def _within(shape: tuple[int, ...], takes: ShapeRange) -> bool:
    return all(low <= size <= high for low, size, high in zip(takes.min, shape, takes.max, strict=True))
