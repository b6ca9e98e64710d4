"""Which INT8 layers to keep in float: first the few that save most, then those that save something together."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import accumulate, chain

from maseRT.blame.findings import Remedy
from maseRT.blame.limits import RESOLUTION_MS, WORTH, WORTH_A_RULE
from maseRT.blame.rules import shortest_rules
from maseRT.blame.savings import Savings
from maseRT.receipt import Receipt


def find_remedies(savings: Savings, quantized: Receipt, float_: Receipt) -> tuple[Remedy, ...]:
    """Return groups of layers to keep in float, each of which is worth it; what else saves time is one group, the last.

    Args:
        savings: of the two engines.
        quantized: the INT8 engine's receipt.
        float_: the float engine's.
    """
    worth_ms = WORTH * savings.total_ms
    steps = list(_steps(savings))
    groups = [step.layers for step in steps if step.ms >= worth_ms]
    groups.append(frozenset(chain.from_iterable(step.layers for step in steps if step.ms < worth_ms)))
    told = _Rules(savings, quantized, float_)
    taken: frozenset[str] = frozenset()
    found: list[Remedy] = []
    for group in groups:
        kept, rules = told.worth_it(group, taken)
        saved_ms = savings.saved(kept, taken)
        if saved_ms < worth_ms:
            continue
        taken |= kept
        found.append(
            Remedy(
                layers=told.layers(kept),
                rules=tuple(rules),
                saves_ms=saved_ms,
                predicted_ms=savings.total_ms - savings.saved(taken),
                int8_left=len(told.layers(savings.int8 - taken)),
            )
        )
    return tuple(found)


class _Rules:
    """Puts groups of layers into rules."""

    def __init__(self, savings: Savings, quantized: Receipt, float_: Receipt) -> None:
        self._savings = savings
        self._types = {layer.name: layer.type for layer in quantized.layers}
        self._asked = {layer.name: layer.asked for layer in quantized.layers}
        self._in_float = {layer.name: layer.asked for layer in float_.layers}

    def layers(self, group: Set[str]) -> tuple[str, ...]:
        """Return the INT8 layers of a group, in the order of the plan."""
        freed = self._savings.freed_by(group)
        return tuple(name for name in self._types if name in freed)

    def worth_it(self, group: frozenset[str], taken: frozenset[str]) -> tuple[frozenset[str], list[str]]:
        """Return what is left of a group without the rules that save too little, and its rules.

        Args:
            group: the layers to keep in float.
            taken: those that are float already.
        """
        while group:
            floats = {name: self._in_float[name] for name in self.layers(group | taken)}
            rules = shortest_rules(self.layers(group), self._types, self._asked | floats)
            without = [
                frozenset(name for name in group if not self._savings.freed_by({name}) & chosen)
                for chosen in rules.values()
            ]
            costs_ms, left = min(
                ((self._savings.saved(group - left, taken | left), left) for left in without), key=lambda each: each[0]
            )
            if costs_ms >= WORTH_A_RULE * self._savings.total_ms:
                return group, list(rules)
            group = left
        return group, []


@dataclass(frozen=True)
class _Step:
    """Layers to keep in float next.

    Attributes:
        layers: their names.
        ms: what they save, when those of the steps before are float.
        seen: the layers on which that may depend.
    """

    layers: frozenset[str]
    ms: float
    seen: frozenset[str] = frozenset()

    @property
    def ms_per_layer(self) -> float:
        return self.ms / len(self.layers)


def _steps(savings: Savings) -> Iterator[_Step]:
    """Yield, greedily, the layers that save most for each of them: a user who wants INT8 wants the smallest set."""
    taken: frozenset[str] = frozenset()
    grown: dict[str, _Step] = {}
    while left := savings.int8 - taken:
        grown = {name: step for name, step in grown.items() if name in left and step.seen.isdisjoint(taken)}
        grown |= {name: _best_around(name, taken, savings) for name in sorted(left - grown.keys())}
        rest = _Step(left, savings.saved(left, taken))
        best = max((*grown.values(), rest), key=lambda step: (step.ms_per_layer, -len(step.layers)))
        if best.ms_per_layer < RESOLUTION_MS:
            return
        yield best
        taken |= best.layers


def _best_around(seed: str, taken: Set[str], savings: Savings) -> _Step:
    """Return a layer, along with those of the INT8 layers around it with which each of them saves most."""
    group, seen = [seed], {seed} | savings.connected(seed)
    while around := sorted(seen & savings.int8 - taken - set(group)):
        floats = taken | set(group)
        gain_ms, name = max((savings.saved({name}, floats), name) for name in around)
        if gain_ms < RESOLUTION_MS:
            break
        group.append(name)
        seen |= savings.connected(name)
    parts = (frozenset(part) for part in accumulate([name] for name in group))
    steps = (_Step(part, savings.saved(part, taken), frozenset(seen)) for part in parts)
    return max(steps, key=lambda step: step.ms_per_layer)
