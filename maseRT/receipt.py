"""The precision receipt: what each layer was asked to run in, what the ONNX file says, and what the engine executes.

Pure functions of a plan, an exported file's facts and an engine's layers; torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from maseRT.errors import StepError
from maseRT.layer_rules import rule_line
from maseRT.onnx_graph import ExportedLayer
from maseRT.plan import NO_BF16_FORM, OUTPUT, LayerPlan, Plan
from maseRT.precision import Precision
from maseRT.runtimes.base import EngineInfo, EngineLayer
from maseRT.runtimes.trt.layers import NOT_OBSERVED, executed, is_opaque

SCHEMA = 1

_DATA = frozenset(("fp32", "fp16", "bf16", "fp8", "int8"))
_WIDTH = {"int8": 0, "fp16": 1, "bf16": 1, "fp32": 2}


class Verdict(StrEnum):
    """What a layer's receipt comes to. Only DIFFERS is a mismatch.

    SAME_VALUES: a float layer without weights runs in integers. With no scales but those of the Q/DQ pairs, a compiler
    can only have moved the quantization from behind the layer to its front, as it may across a max pool or a reshape.
    Or the INT8 table of an embedding is kept in float: its rows are the same.
    """

    AS_ASKED = "as asked"
    SAME_VALUES = "same values"
    DIFFERS = "differs"
    FUSED = "fused"
    NOT_OBSERVED = "not observed"
    NOTHING = "nothing to run"


@dataclass(frozen=True)
class Kernel:
    """An engine layer.

    Attributes:
        name: the engine's name for it.
        layer: the plan's layer that it belongs to, that with the product where it fuses several; "" where untold, or
            where it hides several.
        type: the engine's word for its kind.
        tactic: the kernel, where known.
        precision: what it computes in; "" where its tensors do not tell.
        reads: types of its inputs, without constants.
        writes: types of its outputs.
        converts: it changes types or memory layouts and computes nothing.
        ms: mean time of one inference; None where it was not measured.
        inputs: names of the tensors it reads, as `reads`.
        outputs: names of the tensors it writes, as `writes`.
        hides: the plan's layers that are all compiled into this one, of which no types are told.
    """

    name: str
    layer: str
    type: str
    tactic: str
    precision: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    converts: bool
    ms: float | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReceipt:
    """One layer of the plan.

    Attributes:
        name: of the layer.
        type: its class.
        asked: the plan's precision.
        exported: that of its nodes in the ONNX file, "folded into <layer>", "no nodes", or "" where there is no file.
        executed: that of its kernels, "fused into <layers>", "not observed", or "" where there is nothing to run.
        verdict: what that comes to.
    """

    name: str
    type: str
    asked: str
    exported: str
    executed: str
    verdict: Verdict

    def describe(self) -> str:
        """Return the layer's fate in one line."""
        then = f", exported as {self.exported}" if self.exported != self.asked else ""
        return f"{self.name} ({self.type}): asked {self.asked}{then}, runs in {self.executed or 'nothing'}"


@dataclass(frozen=True)
class Receipt:
    """An engine's receipt.

    Attributes:
        runtime: that built it; "" without an engine.
        version: of the runtime.
        target: compute capability that it was built for.
        onnx_sha256: of the ONNX file.
        observed_from: "inspector", "build log", or "" where the engine's layers could not be observed.
        layers: of the plan, in its order.
        kernels: the engine's layers that handle data, in the order of execution.
    """

    runtime: str
    version: str
    target: str
    onnx_sha256: str
    observed_from: str
    layers: tuple[LayerReceipt, ...]
    kernels: tuple[Kernel, ...]

    @property
    def mismatches(self) -> tuple[LayerReceipt, ...]:
        """The layers that do not run as asked."""
        return tuple(layer for layer in self.layers if layer.verdict is Verdict.DIFFERS)

    @property
    def counts(self) -> dict[str, int]:
        """How many layers there are of each verdict."""
        return {str(verdict): sum(layer.verdict is verdict for layer in self.layers) for verdict in Verdict}

    @property
    def converting(self) -> tuple[Kernel, ...]:
        """The kernels that only change types or layouts."""
        return tuple(kernel for kernel in self.kernels if kernel.converts)

    @property
    def converting_share(self) -> float | None:
        """The share of the engine's time that goes to them, 0 to 1; None where the time is not known."""
        total = _time(self.kernels)
        return _time(self.converting) / total if total else None

    def kernels_of(self, layer: str) -> tuple[Kernel, ...]:
        """Return the kernels that belong to a layer of the plan, and those that hide it."""
        return tuple(kernel for kernel in self.kernels if layer == kernel.layer or layer in kernel.hides)

    def ms_of(self, layer: str) -> float | None:
        """Return the time of a layer's own kernels; None where it is not known."""
        return _time(kernel for kernel in self.kernels if kernel.layer == layer) or None

    def with_times(self, times_ms: Mapping[str, float]) -> Receipt:
        """Return the receipt with the times of kernels, by name."""
        return replace(self, kernels=tuple(replace(each, ms=times_ms.get(each.name)) for each in self.kernels))

    def summary(self) -> str:
        """Return the counts in one sentence."""
        told = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items() if count)
        return f"{told} ({f'from the {self.observed_from}' if self.observed_from else 'the engine tells no layers'})"

    def conversions(self) -> str:
        """Return what type and layout changes cost, in one sentence; "" where the engine's layers are not known."""
        if not self.kernels:
            return ""
        share = self.converting_share
        time = f", {share:.1%} of the time" if share is not None else ""
        return f"{len(self.converting)} of {len(self.kernels)} kernels only change types or layouts{time}"

    def hiding(self) -> str:
        """Return what the engine keeps to itself, in one sentence; "" where that is nothing."""
        hiding = [kernel for kernel in self.kernels if kernel.hides]
        if not hiding:
            return ""
        hidden = len({layer for kernel in hiding for layer in kernel.hides})
        total = _time(self.kernels)
        time = f", {_time(hiding) / total:.1%} of the time" if total else ""
        into = "one kernel that tells" if len(hiding) == 1 else f"{len(hiding)} kernels that tell"
        return f"{hidden} layers are compiled into {into} no types inside{time}"

    def overview(self) -> dict[str, Any]:
        """Return plain values for reports: the engine, how many layers each verdict has, and what converting costs."""
        return {
            "runtime": self.runtime,
            "version": self.version,
            "target": self.target,
            "observed_from": self.observed_from,
            "counts": self.counts,
            "differ": [layer.name for layer in self.mismatches],
            "converting": {
                "kernels": len(self.converting),
                "of": len(self.kernels),
                "time_share": self.converting_share,
            },
        }

    def rules(self, plan: Plan) -> list[str]:
        """Return [quantize] rules, in TOML, that end the mismatches.

        A layer that runs in a wider type than asked for may as well be asked for that type. One that runs in a narrower
        float has its casts too close: compilers take Cast, Conv, Cast for a convolution in the outer type, but leave
        one alone whose readers share its type. A layer that is exported wrongly has no rule.
        """
        rules: dict[str, str] = {}
        for layer in self.mismatches:
            if layer.exported != layer.asked or layer.executed not in _WIDTH:
                continue
            narrowed = _WIDTH[layer.executed] < _WIDTH[layer.asked]
            readers = [reader for reader in plan.readers_of(layer.name) if reader != OUTPUT]
            names, precision = (readers, layer.asked) if narrowed and readers else ([layer.name], layer.executed)
            rules |= {name: rule_line(precision, name=name) for name in names}
        return list(rules.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], *, where: str) -> Receipt:
        """Return what `to_json` gave.

        Raises:
            StepError: it is no receipt of this version.
        """
        try:
            fields = {key: value for key, value in raw.items() if key != "schema"}
            layers = tuple(LayerReceipt(**{**each, "verdict": Verdict(each["verdict"])}) for each in raw["layers"])
            kernels = tuple(Kernel(**_with_tuples(each)) for each in raw["kernels"])
            return cls(**{**fields, "layers": layers, "kernels": kernels})
        except (KeyError, TypeError, ValueError) as error:
            raise StepError(
                f"not a precision receipt: {error!r}", where=where, fix="run `masert build-engine` again with --force"
            ) from error


def _with_tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def names_in(plan: Plan) -> list[str]:
    """Return every name that a layer of a plan goes by: those under which an exported file may hold it."""
    return [name for layer in plan.layers for name in (layer.name, *layer.aliases)]


def receipt_from(
    plan: Plan, exported: Mapping[str, ExportedLayer] | None, info: EngineInfo | None, *, onnx_sha256: str
) -> Receipt:
    """Compare a plan with what was made of it.

    Args:
        plan: what was asked.
        exported: name -> how the ONNX file holds the layer, see `maseRT.onnx_graph.layer_precisions`; None where there
            is no file yet.
        info: the engine; None where there is none.
        onnx_sha256: of the ONNX file.
    """
    if exported is None:
        layers = tuple(
            LayerReceipt(layer.name, layer.type, str(layer.precision), "", "", Verdict.NOT_OBSERVED)
            for layer in plan.layers
        )
        return Receipt("", "", "", onnx_sha256, "", layers, ())
    found = {
        layer.name: _merged([exported[name] for name in (layer.name, *layer.aliases) if name in exported])
        for layer in plan.layers
    }
    hosts = {fold.batchnorm: fold.layer for fold in plan.folds}
    engine = info.layers if info is not None and info.layers is not None else ()
    return Receipt(
        runtime=info.runtime if info is not None else "",
        version=info.version if info is not None else "",
        target=info.target if info is not None else "",
        onnx_sha256=onnx_sha256,
        observed_from=info.layers_from if info is not None else "",
        layers=tuple(_layer(layer, found[layer.name], hosts.get(layer.name), engine) for layer in plan.layers),
        kernels=tuple(_kernel(layer, found) for layer in engine if _handles_data(layer)),
    )


def _merged(parts: Sequence[ExportedLayer]) -> ExportedLayer | None:
    """Join what a shared layer is exported as at its places."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return ExportedLayer(
        precision=_joined(part.precision for part in parts),
        float=_joined(part.float for part in parts),
        nodes=tuple(node for part in parts for node in part.nodes),
        products=tuple(node for part in parts for node in part.products),
        looks_up=all(part.looks_up for part in parts),
    )


def _joined(precisions: Iterable[str]) -> str:
    return "+".join(sorted({each for precision in precisions for each in precision.split("+")}))


def _layer(
    layer: LayerPlan, exported: ExportedLayer | None, host: str | None, engine: Sequence[EngineLayer]
) -> LayerReceipt:
    asked = str(layer.precision)
    if exported is None:
        lost = layer.precision is Precision.INT8 and host is None
        text = f"folded into {host}" if host is not None else "no nodes"
        verdict = Verdict.DIFFERS if lost else Verdict.NOTHING
        return LayerReceipt(layer.name, layer.type, asked, text, "", verdict)
    runs_in = executed(engine, layer.name, exported.products)
    wanted = {asked, "bf16"} if layer.reason.endswith(NO_BF16_FORM) else {asked}
    verdict = _verdict(asked, wanted, exported, runs_in)
    return LayerReceipt(layer.name, layer.type, asked, exported.precision, runs_in, verdict)


def _verdict(asked: str, wanted: set[str], exported: ExportedLayer, runs_in: str) -> Verdict:
    """Judge one layer. Of one without weights it is enough that a part of it shows the type that was asked for.

    Args:
        asked: the plan's precision.
        wanted: what it may be executed in.
        exported: its form in the ONNX file.
        runs_in: what `executed` says.
    """
    if exported.precision != asked:
        return Verdict.DIFFERS
    if runs_in == NOT_OBSERVED:
        return Verdict.NOT_OBSERVED
    shown = set(runs_in.split("+"))
    if not _DATA.issuperset(shown):
        return Verdict.FUSED
    if shown <= wanted or (shown & wanted and not exported.products):
        return Verdict.AS_ASKED
    moved = shown == {"int8"} and not exported.products
    return Verdict.SAME_VALUES if moved or (asked == "int8" and exported.looks_up) else Verdict.DIFFERS


def _kernel(layer: EngineLayer, exported: Mapping[str, ExportedLayer | None]) -> Kernel:
    layers = _layers_of(layer, exported)
    hides = tuple(layers) if is_opaque(layer) and len(layers) > 1 else ()
    return Kernel(
        name=layer.name,
        layer="" if hides else _home(layer, layers),
        type=layer.type,
        tactic=layer.tactic,
        precision=layer.precision,
        reads=tuple(tensor.dtype for tensor in layer.inputs),
        writes=tuple(tensor.dtype for tensor in layer.outputs),
        converts=layer.converts_only,
        inputs=tuple(tensor.name for tensor in layer.inputs),
        outputs=tuple(tensor.name for tensor in layer.outputs),
        hides=hides,
    )


def _layers_of(layer: EngineLayer, exported: Mapping[str, ExportedLayer | None]) -> dict[str, ExportedLayer]:
    """Return the plan's layers of which an engine layer computes something."""
    nodes = set(layer.nodes)
    return {name: each for name, each in exported.items() if each is not None and nodes.intersection(each.nodes)}


def _home(layer: EngineLayer, parts: Mapping[str, ExportedLayer]) -> str:
    """Return the plan's layer that an engine layer belongs to, of those it computes something of."""
    owner = next((name for name, each in parts.items() if not set(each.products).isdisjoint(layer.nodes)), None)
    return owner or next(iter(parts), "")


def _handles_data(layer: EngineLayer) -> bool:
    """Leave out what computes shapes and loop counters."""
    return any(tensor.dtype in _DATA or not tensor.dtype for tensor in (*layer.inputs, *layer.outputs))


def _time(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.ms or 0.0 for kernel in kernels)
