"""The plan: the precision of every layer and operation of a model, where Q/DQ pairs go, and why. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from maseRT.errors import UsageError, did_you_mean
from maseRT.precision import Precision, QuantSpec

INPUT = "@input"
"""Stands for the model's input among the names of layers and operations."""
OUTPUT = "@output"
"""Stands for the model's output, likewise."""

NO_BF16_FORM = "ONNX has no BF16 form of it before opset 22"
"""The end of the reason of a layer or operation for which BF16 was asked, and which is exported in FP32."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: a module that has no other planned modules inside.

    Attributes:
        name: its path in the model; for a shared layer the first one.
        type: its class.
        precision: what it computes in.
        weight: how its weights are quantized; None leaves them float.
        input: how its activations are quantized; None leaves them float.
        reason: which rule, default or placement decision gave it this precision.
        float: the type of its parameters, scales and output, also when it is INT8.
        weighted: whether the selectors `first` and `last` of rules count it.
        aliases: the other paths of a shared layer.
        callers: the modules that multiply with its weight themselves, as in `F.linear(x, self.proj.weight)`.
    """

    name: str
    type: str
    precision: Precision
    weight: QuantSpec | None
    input: QuantSpec | None
    reason: str
    float: Precision = Precision.FP32
    weighted: bool = False
    aliases: tuple[str, ...] = ()
    callers: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperationPlan:
    """A function that a module's forward calls on activations, such as the `a + b` of a residual block.

    Attributes:
        name: `<owner>.<op>`, with `_1`, `_2`, ... from its second call within one forward of the owner on.
        owner: the module whose forward calls it; "" is the model.
        op: the function without underscores: `+`, `+=`, torch.add and Tensor.add_ are all "add".
        index: how many calls of this op precede it within one forward of the owner.
        precision: what it computes in; never INT8 (an INT8 operation is a site: Q/DQ pairs on its operands).
        reason: which rule or default gave it this precision.
    """

    name: str
    owner: str
    op: str
    index: int
    precision: Precision
    reason: str


@dataclass(frozen=True)
class SitePlan:
    """An operand of an operation that gets a Q/DQ pair.

    Attributes:
        name: its amax name, `<operation>.<operand>`.
        operation: the operation's name.
        owner: the module whose forward calls it; "" is the model.
        op: the function, as in OperationPlan.
        index: how many calls of this op precede it within one forward of the owner.
        operand: which of the operation's tensors, counted in the order of its arguments.
        spec: how it is quantized.
        reason: why it is quantized.
    """

    name: str
    operation: str
    owner: str
    op: str
    index: int
    operand: int
    spec: QuantSpec
    reason: str


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that becomes part of the layer before it."""

    layer: str
    batchnorm: str


@dataclass(frozen=True)
class ResidualAdd:
    """The addition at the end of a residual block.

    Attributes:
        operation: the operation's name.
        layer: the convolution or linear layer whose output it adds directly, so that a compiler fuses the two.
        skip: the index of the other operand, the shortcut.
    """

    operation: str
    layer: str
    skip: int


@dataclass(frozen=True)
class Plan:
    """Everything that `quantize_model` needs beside the model itself.

    Attributes:
        model: the model's name.
        float: the default precision of everything that is not INT8.
        placement: the preset that placed the Q/DQ pairs.
        backend: whose quantizer modules are used.
        layers: every layer, in the order of execution.
        folds: BatchNorms that become part of another layer.
        operations: functional operations, in the order of execution.
        sites: operands of operations that are quantized.
        ties: groups of amax names that share one range.
        nonnegative: amax names of tensors that are never negative, quantized by this plan or not.
        residual_adds: additions of residual blocks, for targets that need both of their operands quantized.
        global_pools: amax names of the inputs of poolings over the whole image.
        flow: (producer, consumer) pairs of layers and operations, from INPUT to OUTPUT. Operations that only reshape
            are left out. Empty when the model could not be traced.
        notes: what was left out, and why.
    """

    model: str
    float: Precision
    placement: str
    backend: str
    layers: tuple[LayerPlan, ...]
    folds: tuple[Fold, ...] = ()
    operations: tuple[OperationPlan, ...] = ()
    sites: tuple[SitePlan, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    nonnegative: tuple[str, ...] = ()
    residual_adds: tuple[ResidualAdd, ...] = ()
    global_pools: tuple[str, ...] = ()
    flow: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, LayerPlan]:
        return {name: layer for layer in self.layers for name in (layer.name, *layer.aliases)}

    @cached_property
    def floats(self) -> dict[str, Precision]:
        """The type in which each layer and operation of the flow computes what is not INT8: its result's before casts.

        INPUT and OUTPUT are FP32.
        """
        floats = {layer.name: layer.float for layer in self.layers}
        floats |= {operation.name: operation.precision for operation in self.operations}
        return {**floats, INPUT: Precision.FP32, OUTPUT: Precision.FP32}

    @cached_property
    def _readers(self) -> dict[str, list[str]]:
        readers: dict[str, list[str]] = {}
        for writer, reader in self.flow:
            readers.setdefault(writer, []).append(reader)
        return readers

    @property
    def has_int8(self) -> bool:
        """Whether any layer is INT8, so that there is something to calibrate and fine-tune."""
        return any(layer.precision is Precision.INT8 for layer in self.layers)

    def of(self, name: str) -> LayerPlan:
        """Return the plan of one layer, by any of its names.

        Raises:
            UsageError: there is no such layer.
        """
        try:
            return self._by_name[name]
        except KeyError:
            near = did_you_mean(name, list(self._by_name))
            raise UsageError(f"no layer '{name}' in the plan of {self.model}{near}", where="plan") from None

    def owner_of(self, amax: str) -> str:
        """Return the layer or operation that an amax name belongs to: `lstm` for `lstm.weight_ih_l0`."""
        names = [*self._by_name, *(operation.name for operation in self.operations)]
        return max((name for name in names if amax.startswith(f"{name}.")), key=len, default=amax)

    def readers_of(self, name: str) -> list[str]:
        """Return the layers and operations that read the result of one, and OUTPUT where it is the model's."""
        return self._readers.get(name, [])

    def output_of(self, name: str) -> Precision:
        """Return the type of the tensor that a layer, an operation or INPUT passes to its readers.

        That is its own type or the plan's `float`, whichever takes fewer casts: each reader with another type casts the
        tensor, and the producer casts its result if the tensor does not have its own type.
        """
        own = self.floats[name]
        readers = [self.floats[reader] for reader in self.readers_of(name)]
        kept = sum(reader is not own for reader in readers)
        cast = 1 + sum(reader is not self.float for reader in readers)
        return own if kept < cast or (kept == cast and own in readers) else self.float

    def with_precision(self, name: str, precision: Precision, reason: str) -> Plan:
        """Return the plan with another float precision for one layer or operation.

        An INT8 layer is not quantized any more. Neither are the operands of the addition that was fused with it, and
        their ranges leave the ties.

        Raises:
            UsageError: no such layer or operation, or the precision is INT8.
        """
        if precision is Precision.INT8:
            raise UsageError("only a new plan can add INT8 layers", where=f"plan, {name}")
        if any(operation.name == name for operation in self.operations):
            changed = [replace(o, precision=precision, reason=reason) if o.name == name else o for o in self.operations]
            return replace(self, operations=tuple(changed))
        layer = self.of(name)
        new = replace(layer, precision=precision, float=precision, weight=None, input=None, reason=reason)
        layers = tuple(new if entry is layer else entry for entry in self.layers)
        if layer.precision is not Precision.INT8:
            return replace(self, layers=layers)
        unfused = {add.operation for add in self.residual_adds if add.layer == layer.name}
        sites = tuple(site for site in self.sites if site.operation not in unfused)
        gone = {site.name for site in self.sites} - {site.name for site in sites}
        ties = tuple(
            kept
            for tie in self.ties
            if len(kept := tuple(t for t in tie if t not in gone and not t.startswith(f"{layer.name}."))) > 1
        )
        return replace(self, layers=layers, sites=sites, ties=ties)

    def with_float(self, name: str, precision: Precision, reason: str) -> Plan:
        """Return the plan with another `float` for one layer or operation; an INT8 layer stays INT8.

        Raises:
            UsageError: no such layer or operation, or the precision is INT8.
        """
        if any(operation.name == name for operation in self.operations) or self.of(name).precision.is_float:
            return self.with_precision(name, precision, reason)
        layer = self.of(name)
        new = replace(layer, float=precision, reason=f"{layer.reason}; {reason}")
        return replace(self, layers=tuple(new if entry is layer else entry for entry in self.layers))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            UsageError: the document is not a plan.
        """
        try:
            fields = dict(document)
            fields["float"] = Precision(fields["float"])
            fields["layers"] = tuple(_layer(entry) for entry in fields["layers"])
            fields["folds"] = tuple(Fold(**entry) for entry in fields["folds"])
            fields["operations"] = tuple(
                OperationPlan(**{**entry, "precision": Precision(entry["precision"])}) for entry in fields["operations"]
            )
            fields["sites"] = tuple(SitePlan(**{**entry, "spec": _spec(entry["spec"])}) for entry in fields["sites"])
            fields["residual_adds"] = tuple(ResidualAdd(**entry) for entry in fields["residual_adds"])
            fields["ties"] = tuple(tuple(tie) for tie in fields["ties"])
            fields["flow"] = tuple((producer, consumer) for producer, consumer in fields["flow"])
            for key in ("nonnegative", "global_pools", "notes"):
                fields[key] = tuple(fields[key])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a plan: {error!r}", where="plan", fix="run `masert quantize` again") from error


def _spec(document: dict[str, Any] | None) -> QuantSpec | None:
    return None if document is None else QuantSpec(**document)


def _layer(document: dict[str, Any]) -> LayerPlan:
    return LayerPlan(
        **{
            **document,
            "precision": Precision(document["precision"]),
            "float": Precision(document["float"]),
            "weight": _spec(document["weight"]),
            "input": _spec(document["input"]),
            "aliases": tuple(document["aliases"]),
            "callers": tuple(document.get("callers", ())),
        }
    )
