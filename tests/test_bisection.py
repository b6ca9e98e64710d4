"""Finding the first bad place of a graph with few looks."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from maseRT.bisection import Edges, Found, first_bad, restricted


def graph(**before: str) -> dict[str, frozenset[str]]:
    return {place: frozenset(nearest) for place, nearest in before.items()}


def chain(length: int) -> dict[str, frozenset[str]]:
    return {str(n): frozenset([str(n - 1)] if n else []) for n in range(length)}


def search(before: Edges, bad: set[str], *, looks: int = 100) -> Found:
    return first_bad(list(before)[-1], before, lambda places: {each: each in bad for each in places}, looks=looks)


@given(st.integers(1, 200), st.data())
def test_a_chain_takes_log2_looks(length: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, length - 1))
    found = search(chain(length), {str(n) for n in range(first, length)})
    assert (found.first, found.suspects) == (str(first), ())
    assert found.looks <= math.ceil(math.log2(length)) + 1


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, frozenset[str]]:
    """Places that all lead to the last."""
    before: dict[str, frozenset[str]] = {}
    for number in range(draw(st.integers(1, 25))):
        nearest = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        before[str(number)] = frozenset(str(each) for each in nearest)
    return {**before, "last": frozenset(before)}


def follows(before: Edges, place: str, first: str) -> bool:
    return place == first or any(follows(before, each, first) for each in before[place])


@settings(max_examples=200)
@given(graphs(), st.data())
def test_branches_do_not_mislead(before: dict[str, frozenset[str]], data: st.DataObject) -> None:
    """A branch that is good and runs in between says nothing about the bad one."""
    first = data.draw(st.sampled_from(list(before)))
    found = search(before, {place for place in before if follows(before, place, first)})
    assert (found.first, found.suspects) == (first, ())


def test_what_only_seemed_good_because_a_later_place_was_is_looked_at() -> None:
    """c loses b's damage, g reads it past c."""
    before = graph(a="", b="a", c="b", d="c", e="d", f="e", g="fb")
    assert search(before, {"b", "g"}).first == "b"


def test_looks_run_out() -> None:
    found = search(chain(64), {str(n) for n in range(40, 64)}, looks=3)
    assert found.looks == 3
    assert "40" in (found.first, *found.suspects)
    assert len(found.suspects) <= 8


def test_places_left_out_are_bridged() -> None:
    before = graph(a="", b="a", c="a", d="bc", e="d")
    assert restricted(before, ["a", "c", "e"]) == graph(a="", c="a", e="ac")
