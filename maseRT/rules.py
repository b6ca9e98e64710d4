"""Which rule of a config decides about which layer: first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from maseRT.config import LayerRule
from maseRT.errors import UsageError, did_you_mean
from maseRT.plan import LayerPlan


def first_matches(
    rules: Sequence[LayerRule], layers: Sequence[LayerPlan], *, where: str, others: Iterable[str] = ()
) -> dict[str, int]:
    """Return, per layer name, the index of the first rule that selects it; layers that no rule selects are left out.

    Args:
        rules: the rules, in the order of the file.
        layers: every layer, in the order of execution.
        where: the config key of the rules, for messages.
        others: names that are no layers (operations); a rule with a name or regex alone selects them too.

    Raises:
        UsageError: a rule selects nothing, or two names of a shared layer fall under different rules.
    """
    named = list(others)
    found: dict[str, int] = {}
    for index, rule in enumerate(rules):
        hit = {
            layer.name: [n for n in (layer.name, *layer.aliases) if _selects(rule, n, layer, layers)]
            for layer in layers
        }
        hit_others = [name for name in named if _is_by_name(rule) and _names(rule, name)]
        if not hit_others and not any(hit.values()):
            raise _no_match(rule, layers, where=f"{where}[{index}]")
        for layer in layers:
            names = (layer.name, *layer.aliases)
            if hit[layer.name] and layer.name not in found:
                if len(hit[layer.name]) < len(names):
                    _refuse_conflict(rules, index, layer, hit[layer.name], layers, where=where)
                found[layer.name] = index
        for name in hit_others:
            found.setdefault(name, index)
    return found


def _selects(rule: LayerRule, name: str, layer: LayerPlan, layers: Sequence[LayerPlan]) -> bool:
    if not _names(rule, name) or rule.type not in (None, layer.type):
        return False
    if rule.first is None and rule.last is None:
        return True
    weighted = [entry.name for entry in layers if entry.weighted]
    if rule.first is not None and layer.name not in weighted[: rule.first]:
        return False
    return rule.last is None or layer.name in weighted[-rule.last :]


def _is_by_name(rule: LayerRule) -> bool:
    return rule.type is None and rule.first is None and rule.last is None


def _names(rule: LayerRule, name: str) -> bool:
    if rule.name is not None and not fnmatchcase(name, rule.name):
        return False
    return rule.regex is None or re.fullmatch(rule.regex, name) is not None


def _refuse_conflict(
    rules: Sequence[LayerRule],
    index: int,
    layer: LayerPlan,
    hit: list[str],
    layers: Sequence[LayerPlan],
    *,
    where: str,
) -> None:
    """Raise when another name of a shared layer falls under a rule that says something else."""
    told = rules[index].model_dump(exclude={"name", "regex", "type", "first", "last"})
    for other in {layer.name, *layer.aliases} - set(hit):
        later = next((rule for rule in rules[index + 1 :] if _selects(rule, other, layer, layers)), None)
        if later is not None and later.model_dump(exclude={"name", "regex", "type", "first", "last"}) != told:
            raise UsageError(
                f"'{hit[0]}' and '{other}' are one shared layer, but the rules {rules[index].describe()} and "
                f"{later.describe()} tell them different things",
                where=where,
                fix="give both names the same",
            )


def _no_match(rule: LayerRule, layers: Sequence[LayerPlan], *, where: str) -> UsageError:
    if rule.type is not None and rule.type not in {layer.type for layer in layers}:
        hint = did_you_mean(rule.type, sorted({layer.type for layer in layers}))
    else:
        names = [name for layer in layers for name in (layer.name, *layer.aliases)]
        inside = [name for name in names if rule.name and name.startswith(f"{rule.name}.")]
        hint = f"; did you mean '{rule.name}.*'?" if inside else did_you_mean(rule.name or rule.regex or "", names)
    return UsageError(
        f"the rule {rule.describe()} matches no layer{hint}", where=where, fix="correct or remove the rule"
    )
