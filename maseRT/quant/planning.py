"""model + [quantize] -> Plan: rules give precisions, the recorded dataflow gives placement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from maseRT.config import PrecisionRule, QuantizeSection
from maseRT.errors import UsageError, shortened
from maseRT.layer_rules import first_matches
from maseRT.plan import NO_BF16_FORM, Fold, LayerPlan, OperationPlan, Plan
from maseRT.precision import Precision
from maseRT.quant.backends import get_backend
from maseRT.quant.bfloat16 import layer_in_bf16, operation_in_bf16
from maseRT.quant.cast_up import cast_up
from maseRT.quant.computed_weights import computed_weights, with_stored_weights
from maseRT.quant.foldable import find_folds, folds_in_sequentials, nodes_of_folded
from maseRT.quant.in_fp32 import layers_in_fp32, operation_in_fp32
from maseRT.quant.inventory import calls_of, layers_of, operations_of
from maseRT.quant.layers import LAYERS, default_specs, refusal
from maseRT.quant.nonnegative import nonnegative_nodes
from maseRT.quant.overflow import keep_in_fp32, weights_beyond_half
from maseRT.quant.own_code import ALL_PRODUCTS, computes_weights
from maseRT.quant.placement import (
    RECURRENT,
    Placement,
    Placer,
    amax_names_of,
    flow_of,
    is_depthwise,
    is_global_pool,
    read_name,
    residual_adds,
    tiny_macs,
)
from maseRT.quant.pooling import POOLS, without_kernel
from maseRT.quant.trace import Graph, Kind, Node, record_stable, training_differences

_HALVES = frozenset((Precision.FP16, Precision.BF16))
_OPERATIONS_TO_QUANTIZE = frozenset(("add", "cat"))


def make_plan(model: nn.Module, example: Tensor, section: QuantizeSection, *, model_name: str) -> Plan:
    """Decide every layer's and operation's precision, and where Q/DQ pairs go. The model is not changed.

    Args:
        model: float, in eval mode.
        example: a batch of its input.
        section: the rules and settings.
        model_name: for the plan and messages.

    Raises:
        UsageError: a rule matches nothing, contradicts another one about a shared layer, or asks for INT8 where there
            is none; or weights overflow in half precision and the section says "error".
    """
    computed = computed_weights(model)
    model = with_stored_weights(model)
    graph, untraced = record_stable(model, example)
    planner = _Planner(model, graph, section, example)
    notes = [f"placed layer by layer: {untraced}; {_LOST}"] if graph is None else []
    if computed:
        notes.append(f"{shortened(computed)}: computed in each forward until here; {_PLAIN}")
    plan = planner.plan(model_name, example, notes)
    return keep_in_fp32(plan, weights_beyond_half(model, plan), overflow=section.overflow)


def _unlisted_batchnorms(unfolded: Mapping[str, str]) -> list[str]:
    """Say which BatchNorms stay, and why, although no layer of the plan shows them."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(unfolded.items()):
        by_reason.setdefault(reason, []).append(name or "the model")
    return [
        f"BatchNorm is not folded in {shortened(names)}: {reason}; it stays float, which makes INT8 slower"
        for reason, names in by_reason.items()
    ]


_MERGING = ("reparameterize", "switch_to_deploy", "fuse")
"""Methods by which libraries of models turn parallel branches, as trained, into the one convolution they come to."""


def _unmerged(model: nn.Module, unfolded: Iterable[str]) -> list[str]:
    """Say which modules with BatchNorms that stay could be merged into single convolutions before anything else."""
    staying = list(unfolded)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        method = next((each for each in _MERGING if callable(getattr(module, each, None))), None)
        if name and method and any(batchnorm.startswith(f"{name}.") for batchnorm in staying):
            found.setdefault(method, []).append(name)
    return [
        f"{shortened(names)}: the model's own {method}() merges here what stays apart (BatchNorms, parallel branches): "
        "call it on the trained model, in a package.module:factory"
        for method, names in found.items()
    ]


def _told_of_computed_weights(layers: Iterable[nn.Module]) -> list[str]:
    """Say which INT8 layers compute their weights: what is stored, and trained, is what they computed."""
    counts = Counter(type(layer).__name__ for layer in layers if computes_weights(layer))
    return [
        f"{count} {name}: the weights that they compute become plain ones, which fine-tuning trains as they are"
        for name, count in counts.items()
    ]


_PLAIN = "the quantized model has plain weights of these values, which fine-tuning trains as they are"
_LOST = (
    "inputs of residual adds and concatenations are not quantized, pools are not placed, no ranges are shared, "
    "BatchNorms outside nn.Sequential are not folded and functional operations are not listed"
)


def _multiplies_with_constant(product: Node) -> bool:
    return any(operand.source is None and len(operand.shape) > 1 for operand in product.operands[:2])


@dataclass(frozen=True)
class _Choice:
    """What a layer gets, and why."""

    precision: Precision
    reason: str
    tiny: bool = False


class _Planner:
    """Holds what every decision looks at."""

    def __init__(self, model: nn.Module, graph: Graph | None, section: QuantizeSection, example: Tensor) -> None:
        self._model = model
        self._graph = graph
        self._section = section
        self._backend = get_backend(section.backend)
        self._region = region_precision(section)
        self._placed = graph is not None and section.placement == "tensorrt"
        self._calls = calls_of(graph)
        self._modules, self._layers = layers_of(model, self._calls, float=self._region)
        self._operations = operations_of(graph, float=self._region, layers=self._modules)
        self._matches = first_matches(
            section.rules, self._layers, where="quantize.rules", others=[o.name for o in self._operations]
        )
        self._check_rules()
        asked = {self._region, section.precision, *(rule.precision for rule in section.rules)}
        self._in_fp32 = self._computing_in_fp32(example) if asked & _HALVES else {}
        self._cast_up = self._casting_up(example) if asked & _HALVES else frozenset()

    def plan(self, model_name: str, example: Tensor, notes: list[str]) -> Plan:
        """Put the decisions together."""
        choices = self._choices()
        folds, unfolded = self._folds(choices)
        for name in choices.keys() & unfolded.keys():
            choices[name] = replace(choices[name], reason=f"{choices[name].reason}; not folded: {unfolded[name]}")
        placement, frozen_note = self._place(choices, folds, example)
        for name, reason in placement.pools.items():
            choices[name] = _Choice(Precision.INT8, reason)
        into = {fold.batchnorm: fold.layer for fold in folds}
        layers = tuple(self._layer_plan(layer, choices, into) for layer in self._layers)
        plan = Plan(
            model=model_name,
            float=self._region,
            placement=self._section.placement if self._placed else "layerwise",
            backend=self._section.backend,
            layers=layers,
            folds=tuple(folds),
            operations=tuple(operation for operation in self._operations if operation.owner not in into),
            sites=tuple(placement.sites),
            ties=tuple(placement.ties),
            notes=(
                *notes,
                *frozen_note,
                *_unlisted_batchnorms({name: unfolded[name] for name in unfolded.keys() - choices.keys()}),
                *_unmerged(self._model, unfolded),
                *_told_of_computed_weights(self._modules[each.name] for each in layers if not each.precision.is_float),
                *self._int8_without_kernel(layers),
                *self._fp32_against_rules(),
                *self._shadowed_rules(),
                *self._products_without_layers(),
                *self._without_int8(layers),
            ),
        )
        return self._with_flow(plan, nodes_of_folded(into))

    def _rule_of(self, name: str) -> tuple[PrecisionRule | None, str]:
        index = self._matches.get(name)
        if index is None:
            return None, "default"
        rule = self._section.rules[index]
        return rule, f"rule {index + 1}: {rule.describe()}"

    def _check_rules(self) -> None:
        """Refuse a rule that asks for a precision that nothing of what it decides about can take."""
        for index, rule in enumerate(self._section.rules):
            chosen = [name for name, match in self._matches.items() if match == index]
            reasons = [self._cannot(name, rule.precision) for name in chosen]
            if chosen and all(reason is not None for reason in reasons):
                can = ", ".join(sorted(known.__name__ for known in LAYERS))
                raise UsageError(
                    f"the rule {rule.describe()} asks for {rule.precision}: {chosen[0]} cannot take it, {reasons[0]}",
                    where=f"quantize.rules[{index}]",
                    fix="use fp32 or fp16" if rule.precision.is_float else f"layers that can: {can}",
                )

    def _cannot(self, name: str, precision: Precision) -> str | None:
        """Say why a layer or an operation cannot have a precision, or None."""
        if precision is Precision.INT8:
            return self._refusal(self._modules[name]) if name in self._modules else _NO_LAYER
        if precision is not Precision.BF16:
            return None
        if name in self._modules:
            return None if layer_in_bf16(self._modules[name]) else NO_BF16_FORM
        nodes = self._graph.nodes if self._graph is not None else ()
        return None if all(operation_in_bf16(node) for node in nodes if node.name == name) else NO_BF16_FORM

    def _computing_in_fp32(self, example: Tensor) -> dict[str, str]:
        """Return the layers and operations that compute in FP32 even where they are given half precision, and why."""
        layers = layers_in_fp32(self._model, self._modules, self._calls, example)
        operations = (n for n in (self._graph.nodes if self._graph is not None else ()) if n.kind is Kind.OPERATION)
        return layers | {n.name: reason for n in operations if (reason := operation_in_fp32(n)) is not None}

    def _casting_up(self, example: Tensor) -> frozenset[str]:
        """Return the layers and operations that the model's code has compute in FP32, unless a rule says otherwise."""
        weighted = {layer.name for layer in self._layers if layer.weighted}
        told = {name for name, index in self._matches.items() if self._section.rules[index].precision.is_float}
        return cast_up(self._model, self._modules, weighted=weighted, example=example) - told

    def _only_fp32(self, name: str, asked: Precision) -> str | None:
        """Say why a layer or operation is FP32 where another float precision is asked for, or None."""
        if asked in _HALVES and name in self._in_fp32:
            return self._in_fp32[name]
        if asked in _HALVES and name in self._cast_up:
            return "the code around it casts to FP32"
        return self._cannot(name, asked)

    def _float_for(self, name: str, asked: Precision) -> Precision:
        """Return a float precision, or FP32 in its place where a layer or operation cannot have it."""
        return asked if self._only_fp32(name, asked) is None else Precision.FP32

    def _shadowed_rules(self) -> list[str]:
        deciding = set(self._matches.values())
        return [
            f"rule {index + 1} ({rule.describe()}) decides nothing: earlier rules match the same layers"
            for index, rule in enumerate(self._section.rules)
            if index not in deciding
        ]

    def _fp32_against_rules(self) -> list[str]:
        """Say what rules ask half precision for that computes in FP32 all the same."""
        names: dict[tuple[Precision, str], list[str]] = {}
        for name, reason in self._in_fp32.items():
            rule, _ = self._rule_of(name)
            if rule is not None and rule.precision in _HALVES:
                names.setdefault((rule.precision, reason), []).append(name)
        return [
            f"{shortened(found)}: fp32, although a rule asks for {asked}: {reason}"
            for (asked, reason), found in names.items()
        ]

    def _without_kernel(self, name: str) -> str | None:
        """Say what comes of it that TensorRT has no INT8 kernel for a pool; None where it has, or for another layer."""
        return without_kernel(self._modules[name], [call.shapes for call in self._calls.get(name, ())])

    def _int8_without_kernel(self, layers: Iterable[LayerPlan]) -> list[str]:
        """Say which INT8 layers, as a rule or a checkpoint asks for, TensorRT has no INT8 kernel for."""
        names: dict[str, list[str]] = {}
        for layer in layers:
            reason = self._without_kernel(layer.name)
            if reason is not None and layer.precision is Precision.INT8:
                names.setdefault(reason, []).append(layer.name)
        return [f"{shortened(found)}: INT8 as asked, but {reason}" for reason, found in names.items()]

    def _products_without_layers(self) -> list[str]:
        """Say which products with weights stay float because no layer of the plan makes them."""
        if self._section.precision is not Precision.INT8 or self._graph is None:
            return []
        listed = {operation.name for operation in self._operations}
        found = {
            node.name: None
            for node in self._graph.nodes
            if node.name in listed and node.op in ALL_PRODUCTS and _multiplies_with_constant(node)
        }
        if not found:
            return []
        return [
            f"{shortened(list(found))}: stays float, since it multiplies with a weight itself; INT8 takes a layer "
            "(nn.Linear, nn.Conv2d, ...) that does"
        ]

    def _without_int8(self, layers: Iterable[LayerPlan]) -> list[str]:
        asked = self._section.precision is Precision.INT8
        if not asked or any(layer.precision is Precision.INT8 for layer in layers):
            return []
        return ["no layer is INT8, although that is the default precision; each layer's reason says why"]

    def _choices(self) -> dict[str, _Choice]:
        choices = {layer.name: self._choice(layer) for layer in self._layers}
        tiny = {name for name, choice in choices.items() if choice.tiny}
        multiplying = [each for each in self._layers if each.weighted and not self._is_table(each.name)]
        if all(layer.name in tiny for layer in multiplying):
            for name in tiny:
                choices[name] = _Choice(Precision.INT8, "default; tiny, but the model has nothing larger")
        return choices

    def _choice(self, layer: LayerPlan) -> _Choice:
        rule, source = self._rule_of(layer.name)
        told = rule.precision if rule is not None else self._section.precision
        if told.is_float:
            if rule is None and not layer.weighted:
                return self._float_choice(layer.name, self._region, "float")
            return self._float_choice(layer.name, told, source)
        obstacle = self._obstacle(layer, rule)
        if obstacle is not None:
            return self._float_choice(layer.name, self._region, obstacle, tiny=obstacle.startswith("tiny"))
        return _Choice(Precision.INT8, source)

    def _float_choice(self, name: str, asked: Precision, reason: str, *, tiny: bool = False) -> _Choice:
        only = self._only_fp32(name, asked)
        if only is None:
            return _Choice(asked, reason, tiny=tiny)
        return _Choice(Precision.FP32, f"{reason}; fp32: {only}", tiny=tiny)

    def _obstacle(self, layer: LayerPlan, rule: PrecisionRule | None) -> str | None:
        """Say why a layer that is to be INT8 stays float, or None."""
        module = self._modules[layer.name]
        reason = self._refusal(module)
        if reason is not None:
            return reason
        by_name = rule is not None and (rule.name or rule.regex or rule.type) is not None
        if isinstance(module, RECURRENT) and not by_name:
            return "INT8 would unroll it over time; a rule that names it or its type asks for that"
        if self._is_table(layer.name) and not by_name:
            return "a table to look up: INT8 makes it smaller, not faster; a rule that names it or its type asks for it"
        kernel = self._without_kernel(layer.name)
        if kernel is not None and not by_name:
            return f"{kernel}; a rule that names it or its type makes it INT8 all the same"
        if self._is_table(layer.name) and self._feeds_recurrent(layer.name):
            return "TensorRT-RTX builds no engine of an INT8 table that a recurrent layer reads"
        if rule is not None:
            return None
        if is_depthwise(module) and not self._section.depthwise:
            return "depth-wise, and depthwise = false"
        if self._graph is not None and layer.name not in self._calls:
            return "the example does not reach it"
        return self._cost(layer, module) if self._placed else None

    def _refusal(self, module: nn.Module) -> str | None:
        if not isinstance(module, tuple(LAYERS)):
            return f"a {type(module).__name__} has no quantized form"
        return refusal(module) or self._backend.refusal(module)

    def _is_table(self, name: str) -> bool:
        return isinstance(self._modules[name], nn.Embedding)

    def _feeds_recurrent(self, name: str) -> bool:
        """Whether a recurrent layer reads what a layer writes, as it is."""
        if self._graph is None:
            return False
        readers = [self._graph.final_readers(call.index, lambda node: node.passes) for call in self._calls[name]]
        return any(isinstance(reader.module, RECURRENT) for found in readers for reader, _ in found)

    def _is_free_pool(self, name: str, module: nn.Module) -> bool:
        if not isinstance(module, POOLS) or (self._refusal(module) or self._without_kernel(name)) is not None:
            return False
        return len(self._calls.get(name, [])) == 1

    def _cost(self, layer: LayerPlan, module: nn.Module) -> str | None:
        """Say why INT8 would only cost, or None."""
        calls = self._calls[layer.name]
        if isinstance(module, POOLS):
            if len(calls) > 1:
                return "pool used at several places, which would share one range"
            return "global pool" if is_global_pool(calls[0]) else "pool with a float layer or a reshape beside it"
        macs = [tiny_macs(node) for node in calls]
        if all(count is not None for count in macs):
            return f"tiny: {max(filter(None, macs), default=0)} multiply-adds per sample, INT8 would only cost"
        return None

    def _folds(self, choices: Mapping[str, _Choice]) -> tuple[list[Fold], dict[str, str]]:
        """Return the BatchNorms to fold, and why the other ones are not."""
        shared = frozenset(layer.name for layer in self._layers if layer.aliases)
        if self._graph is None:
            folds, refused = folds_in_sequentials(self._model)
        else:
            folds, refused = find_folds(self._graph, shared, dict(self._model.named_modules()))
        for fold in folds:
            told = self._told_batchnorm(fold.batchnorm, choices)
            if told not in (None, self._float_of(fold.layer, choices)):
                refused[fold.batchnorm] = f"a rule gives it another precision than {fold.layer} has"
        return [fold for fold in folds if fold.batchnorm not in refused], refused

    def _told_batchnorm(self, name: str, choices: Mapping[str, _Choice]) -> Precision | None:
        """Return the float precision that a rule gives a BatchNorm, listed as a layer or as an operation inside."""
        for each in nodes_of_folded([name]) & self._matches.keys():
            rule, source = self._rule_of(each)
            if each in choices:
                return choices[each].precision
            if rule is not None and rule.precision.is_float:
                return self._float_choice(each, rule.precision, source).precision
        return None

    def _float_of(self, name: str, choices: Mapping[str, _Choice]) -> Precision:
        precision = choices[name].precision
        return precision if precision.is_float else self._float_for(name, self._region)

    def _place(
        self, choices: Mapping[str, _Choice], folds: Iterable[Fold], example: Tensor
    ) -> tuple[Placement, list[str]]:
        if self._graph is None or not self._placed:
            return Placement(), []
        names = self._modules
        arguments = {
            "int8": frozenset(name for name, choice in choices.items() if choice.precision is Precision.INT8),
            "folded": nodes_of_folded(fold.batchnorm for fold in folds),
            "free_pools": frozenset(
                name
                for name, module in names.items()
                if self._matches.get(name) is None and self._is_free_pool(name, module)
                if self._section.precision is Precision.INT8
            ),
        }
        placement = Placer(self._graph, frozen_owners=frozenset(), **arguments).place()
        if not placement.sites:
            return placement, []
        differing, note = training_differences(self._model, example, self._graph)
        if note:
            return placement, [f"fine-tuning may count operations otherwise: the model {note}"]
        owners = sorted({site.owner for site in placement.sites} & differing)
        if not owners:
            return placement, []
        placement = Placer(self._graph, frozen_owners=frozenset(owners), **arguments).place()
        where = ", ".join(owner or "the model" for owner in owners)
        return placement, [f"no operands are quantized in {where}: other operations run there in training"]

    def _layer_plan(self, layer: LayerPlan, choices: Mapping[str, _Choice], into: Mapping[str, str]) -> LayerPlan:
        choice = choices[layer.name]
        if layer.name in into:
            own = self._float_of(into[layer.name], choices)
            return replace(layer, precision=own, float=own, reason=f"folded into {into[layer.name]}")
        if choice.precision.is_float:
            return replace(layer, precision=choice.precision, float=choice.precision, reason=choice.reason)
        module = self._modules[layer.name]
        input_spec, weight_spec = default_specs(module)
        return replace(
            layer,
            precision=Precision.INT8,
            float=self._float_of(layer.name, choices),
            weight=weight_spec,
            input=input_spec,
            reason=choice.reason,
        )

    def _with_flow(self, plan: Plan, gone: frozenset[str]) -> Plan:
        """Add the operations' precisions and what later targets want to know about the dataflow."""
        if self._graph is None:
            return plan
        graph = self._graph
        int8 = frozenset(layer.name for layer in plan.layers if layer.precision is Precision.INT8)
        adds = residual_adds(graph, folded=gone, preferred=int8)
        pools = {read_name(n, 0) or f"{n.name}.0": n for n in graph.nodes if is_global_pool(n)}
        candidates = [
            (node, operand)
            for node in graph.nodes
            if node.kind is Kind.OPERATION
            and (node.op in _OPERATIONS_TO_QUANTIZE or "pool" in node.op or node.op == "mean")
            for operand in range(len(node.operands))
        ]
        return replace(
            plan,
            operations=tuple(self._with_rule(operation) for operation in plan.operations),
            nonnegative=tuple(amax_names_of(graph, nonnegative_nodes(graph), candidates)),
            residual_adds=tuple(adds),
            global_pools=tuple(pools),
            flow=tuple(flow_of(graph, folded=gone, inside=self._name_in_plan)),
        )

    def _with_rule(self, operation: OperationPlan) -> OperationPlan:
        rule, source = self._rule_of(operation.name)
        asked, reason = self._region, operation.reason
        if rule is not None and rule.precision.is_float:
            asked, reason = rule.precision, source
        choice = self._float_choice(operation.name, asked, reason)
        return replace(operation, precision=choice.precision, reason=choice.reason)

    def _name_in_plan(self, node: Node) -> str:
        return node.owner if node.kind is Kind.OPERATION and node.owner in self._modules else node.name


_NO_LAYER = "it is an operation; INT8 operands of operations follow from the layers around them"


def region_precision(section: QuantizeSection) -> Precision:
    """Return the precision of what is not INT8: `float`, or a float `precision` where `float` is not given."""
    if section.precision.is_float and "float" not in section.model_fields_set:
        return section.precision
    return section.float
