"""How a step says how far it is, without knowing about consoles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """Shows progress to a person; never results."""

    def track(
        self, items: Iterable[T], *, description: str, total: int | None = None, unit: str = "", done: int = 0
    ) -> Iterator[T]:
        """Yield the items, showing how many of `total` are done; work inside may be tracked, too.

        Args:
            items: what is worked on, one after the other.
            description: of the work, in a few words.
            total: how many there are, with those that were done before; None where nobody knows.
            unit: what one item is, such as "batch".
            done: how many of `total` were done before, as when work is resumed.
        """
        ...

    def spinner(self, description: str) -> AbstractContextManager[None]:
        """Show that something of unknown length goes on."""
        ...


class Silent:
    """A reporter for pipes, tests and --quiet."""

    def track(
        self, items: Iterable[T], *, description: str, total: int | None = None, unit: str = "", done: int = 0
    ) -> Iterator[T]:
        """Yield the items."""
        yield from items

    @contextmanager
    def spinner(self, description: str) -> Iterator[None]:
        """Do nothing around the block."""
        yield
