"""The shortest rules that select some layers and change no other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase

from maseRT.layer_rules import rule_line


def shortest_rules(
    layers: Collection[str], types: Mapping[str, str], precisions: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """Return [quantize] rules, in TOML, that give layers their precisions: by type or pattern where that is shorter.

    Each comes with those of the layers that it is there for.

    Args:
        layers: what the rules are for.
        types: layer -> class, of every layer of the model.
        precisions: layer -> precision that it is to have with the rules, of every layer.
    """
    rules: dict[str, frozenset[str]] = {}
    left = list(layers)
    while left:
        found = (
            (len(chosen.intersection(left)), -len(rule), rule, chosen.intersection(left))
            for rule, chosen in _candidates(left[0], types, precisions)
        )
        _, _, rule, chosen = max(found, key=lambda candidate: candidate[:3])
        rules[rule] = chosen
        left = [name for name in left if name not in chosen]
    return rules


def _candidates(
    layer: str, types: Mapping[str, str], precisions: Mapping[str, str]
) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield rules for a layer with what they select: nothing that has another precision.

    Patterns come with the type: without one they would also select operations between the layers.
    """
    kind, precision = types[layer], precisions[layer]
    yield rule_line(precision, name=layer), frozenset({layer})
    same = [name for name in types if types[name] == kind]
    for pattern in _patterns(layer):
        chosen = frozenset(name for name in same if fnmatchcase(name, pattern))
        if all(precisions[name] == precision for name in chosen):
            yield rule_line(precision, name=None if pattern == "*" else pattern, type=kind), chosen


def _patterns(layer: str) -> Iterator[str]:
    """Yield what a user would write: any name, the name with its end left open, a number of it, or both."""
    parts = layer.split(".")
    ends = [(*parts[:end], "*") for end in range(len(parts))]
    for open_ended in (*ends, tuple(parts)):
        yield ".".join(open_ended)
        for place, part in enumerate(open_ended[:-1]):
            if part.isdecimal():
                yield ".".join((*open_ended[:place], "*", *open_ended[place + 1 :]))
