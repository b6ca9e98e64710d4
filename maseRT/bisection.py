"""Finds the first bad place of a graph with few looks, as `git bisect` finds the first bad commit of a history."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

Edges = Mapping[str, frozenset[str]]
"""Place -> the places right before it, in an order in which every place follows those."""


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        first: the first bad place.
        suspects: places before it that nobody looked at because the looks had run out; one of them may be the first.
        looks: how many times somebody looked.
    """

    first: str
    suspects: tuple[str, ...]
    looks: int


def first_bad(last: str, before: Edges, is_bad: Callable[[Sequence[str]], Mapping[str, bool]], *, looks: int) -> Found:
    """Return the first bad place on the way to one that is known to be bad.

    What is bad stays bad: where a place is good, all that leads to it is taken for good. That is checked at the end,
    for the places right before the one found that nobody looked at.

    Args:
        last: known to be bad.
        before: the graph.
        is_bad: looks at places; the answer names each of them.
        looks: how many times `is_bad` may be asked.
    """
    ancestors = _ancestors(before)
    bad, asked = last, 0
    good: set[str] = set()
    trusted: set[str] = set()
    suspects = set(ancestors[last])
    while asked < looks:
        checking = not suspects
        places = _in_order(before[bad] - good, before) if checking else [_middle(suspects, ancestors)]
        if not places:
            break
        answer = is_bad(places)
        asked += 1
        fine = {place for place in places if not answer[place]}
        good |= fine
        trusted = (trusted | fine).union(*(ancestors[place] for place in fine))
        worse = next((place for place in places if answer[place]), None)
        if worse is not None:
            bad = worse
            if checking:  # it leads to a good place: what is bad did not stay bad
                trusted = set(good)
            suspects = set(ancestors[bad])
        suspects -= trusted
    return Found(bad, tuple(_in_order(suspects, before)), asked)


def restricted(before: Edges, kept: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the graph of some of its places: a place that is left out is bridged."""
    seen: dict[str, frozenset[str]] = {}
    for place, nearest in before.items():
        seen[place] = frozenset[str]().union(*({each} if each in kept else seen[each] for each in nearest))
    return {place: seen[place] for place in before if place in kept}


def _ancestors(before: Edges) -> dict[str, frozenset[str]]:
    ancestors: dict[str, frozenset[str]] = {}
    for place, nearest in before.items():
        ancestors[place] = nearest.union(*(ancestors[each] for each in nearest))
    return ancestors


def _middle(suspects: set[str], ancestors: Edges) -> str:
    """Return the suspect whose answer leaves the fewest, whatever it is."""

    def kept(place: str) -> int:
        above = len(suspects & ancestors[place]) + 1
        return min(above, len(suspects) - above)

    return max(_in_order(suspects, ancestors), key=kept)


def _in_order(places: Collection[str], order: Mapping[str, object]) -> list[str]:
    return [place for place in order if place in places]
