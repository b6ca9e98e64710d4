"""Selects the layers of a model by the rules of a config. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from maseRT.config import LayerRule
from maseRT.errors import UsageError, did_you_mean
from maseRT.plan import LayerPlan, Plan


def rule_line(precision: str, *, name: str | None = None, type: str | None = None) -> str:
    """Return a rule as a line for [quantize] rules in a config."""
    selectors = "".join(f'{key} = "{value}", ' for key, value in (("name", name), ("type", type)) if value is not None)
    return f'{{ {selectors}precision = "{precision}" }},'


def first_matches(
    rules: Sequence[LayerRule], layers: Sequence[LayerPlan], *, where: str, others: Iterable[str] = ()
) -> dict[str, int]:
    """Return, per layer name, the index of the first rule that selects it; layers that no rule selects are left out.

    Args:
        rules: the rules, in the order of the file.
        layers: every layer, in the order of execution.
        where: the config key of the rules, for messages.
        others: names of operations; they are only selected by rules that have no other selector than name and regex.

    Raises:
        UsageError: a rule selects nothing, or rules say different things about two names of one shared layer.
    """
    operations = list(others)
    found: dict[str, int] = {}
    for index, rule in enumerate(rules):
        selected = {layer.name: _selected_names(rule, layer, layers) for layer in layers}
        selected_operations = [name for name in operations if _is_by_name(rule) and _names(rule, name)]
        if not selected_operations and not any(selected.values()):
            raise _no_match(rule, layers, where=f"{where}[{index}]")
        for layer in layers:
            names = selected[layer.name]
            if names and layer.name not in found:
                _refuse_conflict(rules, index, layer, names, layers, where=where)
                found[layer.name] = index
        for name in selected_operations:
            found.setdefault(name, index)
    return found


def matching_layers(plan: Plan, rule: LayerRule, *, where: str) -> list[LayerPlan]:
    """Return the layers of a plan that one rule selects, in the order of execution.

    Raises:
        UsageError: it selects none.
    """
    found = [layer for layer in plan.layers if _selected_names(rule, layer, plan.layers)]
    if not found:
        raise _no_match(rule, plan.layers, where=where)
    return found


def _selected_names(rule: LayerRule, layer: LayerPlan, layers: Sequence[LayerPlan]) -> list[str]:
    """Return the names of a layer by which a rule selects it."""
    return [name for name in (layer.name, *layer.aliases) if _selects(rule, name, layer, layers)]


def _selects(rule: LayerRule, name: str, layer: LayerPlan, layers: Sequence[LayerPlan]) -> bool:
    """Whether a rule selects a layer by one of its names."""
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
    selected: Sequence[str],
    layers: Sequence[LayerPlan],
    *,
    where: str,
) -> None:
    """Raise when a later rule with other settings selects another name of a layer that rule `index` selected."""
    for other in (layer.name, *layer.aliases):
        if other in selected:
            continue
        later = next((rule for rule in rules[index + 1 :] if _selects(rule, other, layer, layers)), None)
        if later is not None and later.settings() != rules[index].settings():
            raise UsageError(
                f"'{selected[0]}' and '{other}' are one shared layer, but the rules {rules[index].describe()} and "
                f"{later.describe()} tell them different things",
                where=where,
                fix="give both names the same",
            )


def _no_match(rule: LayerRule, layers: Sequence[LayerPlan], *, where: str) -> UsageError:
    names = [name for layer in layers for name in (layer.name, *layer.aliases)]
    if rule.type is not None and rule.type not in {layer.type for layer in layers}:
        hint = did_you_mean(rule.type, sorted({layer.type for layer in layers}))
    elif rule.type is not None and rule.name in names:
        hint = f"; that layer is a {next(e.type for e in layers if rule.name in (e.name, *e.aliases))}"
    else:
        inside = [name for name in names if rule.name and name.startswith(f"{rule.name}.")]
        hint = f"; did you mean '{rule.name}.*'?" if inside else did_you_mean(rule.name or rule.regex or "", names)
    return UsageError(
        f"the rule {rule.describe()} matches no layer{hint}", where=where, fix="correct or remove the rule"
    )
