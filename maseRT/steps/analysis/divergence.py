"""Finds the first layer at which two neighbours of the drift ladder diverge, by the SQNR of the layers' outputs.

Where reading a layer changes nothing, all layers are read at once and the first one that diverges is taken. Where the
runtime fuses layers, each one is read in a run of its own, and the first one is found by bisection.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from maseRT.bisection import first_bad, restricted
from maseRT.config import DriftLimits
from maseRT.drift import Noise, threshold_db
from maseRT.errors import MaseRTError, shortened
from maseRT.plan import OUTPUT
from maseRT.report.schema import Divergence, Rung
from maseRT.steps.analysis.layer_readers import MAX_BATCH, Array, LayerReader, OnnxReader

LOOKS = 12
"""How many layers a bisection may read, each of which takes an engine of its own: enough for 2,000 layers."""

_SHARP_DB = 6.0
"""A layer stands out when its SQNR is this much below that of the layer before it: twice the amplitude of noise."""

_CURED_DB = 3.0
"""The model's outputs count as right again when their SQNR is this much above the threshold."""


def explain(
    rungs: Sequence[Rung], readers: Mapping[str, LayerReader], sample: Array, limits: DriftLimits
) -> list[Rung]:
    """Return the rungs, each one that does not hold with the first layer that diverges.

    Args:
        rungs: of the drift ladder.
        readers: by row name; no model is loaded for rungs that hold.
        sample: inputs [N, ...]; a batch is enough.
        limits: of the drift ladder.
    """
    return [rung if rung.holds else _explained(rung, readers, sample, limits) for rung in rungs]


def _explained(rung: Rung, readers: Mapping[str, LayerReader], sample: Array, limits: DriftLimits) -> Rung:
    source, target = readers.get(rung.source), readers.get(rung.target)
    if source is None or target is None:
        found = _unknown(f"the layers of {rung.source if source is None else rung.target} cannot be read")
    else:
        try:
            found = _search(source, target, sample, threshold_db(rung, limits))
        except MaseRTError as error:
            found = _unknown(f"not searched: {error}")
    return rung.model_copy(update={"divergence": found})


def _search(source: LayerReader, target: LayerReader, sample: Array, threshold: float) -> Divergence:
    """Search without ONNX Runtime's optimizations first; with those of the target only if that finds nothing."""
    if isinstance(source, OnnxReader):
        source = replace(source, optimization="disabled")
    if not isinstance(target, OnnxReader) or not target.fuses:
        return first_divergence(source, target, sample, threshold_db=threshold)
    plain = first_divergence(source, replace(target, optimization="disabled"), sample, threshold_db=threshold)
    if plain.layer:
        return plain
    found = first_divergence(source, target, sample, threshold_db=threshold)
    if not found.layer:
        return found
    told = "ONNX Runtime's optimizations are to blame: without them no layer diverges"
    return found.model_copy(update={"note": _joined(told, found.note)})


def first_divergence(
    source: LayerReader, target: LayerReader, sample: Array, *, threshold_db: float, looks: int = LOOKS
) -> Divergence:
    """Return the first layer whose output diverges.

    The bisection expects that all layers after one that diverges do so too; in the end it reads the layers right before
    the one that it found.

    Args:
        source: the reference.
        target: the model that is judged.
        sample: inputs [N, ...].
        threshold_db: a layer diverges when its output's SQNR over the sample is below this.
        looks: how many layers the bisection may read.

    Raises:
        MaseRTError: one of the two cannot run here.
    """
    search = _Search(source, target, sample, threshold_db)
    return search.bisected(looks) if source.fuses or target.fuses else search.scanned()


class _Cured(Exception):  # noqa: N818 - it ends a search, nothing went wrong
    """The target's outputs are right as soon as these layers are read: the fault is in a fusion that this prevents."""

    def __init__(self, names: Sequence[str], outputs_db: float) -> None:
        super().__init__(names)
        self.names = names
        self.outputs_db = outputs_db


class _Search:
    """One search for the first layer that diverges; it remembers the SQNR of every layer that was read."""

    def __init__(self, source: LayerReader, target: LayerReader, sample: Array, threshold: float) -> None:
        self._source = source
        self._target = target
        self._sample = sample
        self._threshold = threshold
        example = sample[:1]
        reference, judged = source.layers(example), target.layers(example)
        self._names = _common(reference.names, judged.names)
        self._graph = judged.outputs or reference.outputs
        self._unmatched = [
            name
            for own, other in ((reference, judged), (judged, reference))
            if own.outputs is None and other.outputs is not None
            for name in own.names
            if name not in self._names
        ]
        self._other_shape: set[str] = set()
        self._sqnr_db: dict[str, float] = {}

    def scanned(self) -> Divergence:
        """Read all layers at once, and return the first one that diverges."""
        self._sqnr_db = self._compare(self._names)
        order = [name for name in self._names if name in self._sqnr_db]
        first = next((name for name in order if self._diverges(name)), None)
        if first is None:
            return self._nothing()
        return self._found(first, order[: order.index(first)])

    def bisected(self, looks: int) -> Divergence:
        """Read one layer at a time, and return the first one that diverges."""
        assert self._graph is not None  # what fuses is made from a graph
        self._sqnr_db = self._compare(())
        if not self._diverges(OUTPUT):
            return self._nothing()
        by_tensor: dict[str, str] = {}
        for name in self._names:
            by_tensor.setdefault(self._graph.tensors[name], name)
        last = by_tensor[self._graph.tensors[OUTPUT]]
        self._sqnr_db[last] = self._sqnr_db.pop(OUTPUT)
        before = restricted(self._graph.before, list(by_tensor.values()))
        try:
            found = first_bad(last, before, self._look, looks=looks)
        except _Cured as cured:
            return self._fusion(cured)
        order = list(before)
        earlier = [
            name for name in order[: order.index(found.first)] if name in self._sqnr_db and not self._diverges(name)
        ]
        left = f"; {len(found.suspects)} layers before it were not read" if found.suspects else ""
        how = "each in a build of its own with its output marked, which can change what is fused"
        return self._found(found.first, earlier, note=f"found by reading {found.looks} layers, {how}{left}")

    def _look(self, names: Sequence[str]) -> dict[str, bool]:
        """Read some layers; return whether each diverges.

        Raises:
            _Cured: the model's outputs do not diverge any more.
        """
        measured = self._compare(names)
        self._sqnr_db |= {name: db for name, db in measured.items() if name != OUTPUT}
        if measured[OUTPUT] >= self._threshold + _CURED_DB:
            raise _Cured(names, measured[OUTPUT])
        return {name: self._diverges(name) for name in names}

    def _compare(self, names: Collection[str]) -> dict[str, float]:
        """Return the SQNR over the sample, in dB, of the outputs of layers and of the model."""
        noise = Noise()
        size = min(MAX_BATCH, self._source.max_batch, self._target.max_batch)
        with self._source.reading(names) as reference, self._target.reading(names) as judged:
            for start in range(0, len(self._sample), size):
                inputs = self._sample[start : start + size]
                ours, theirs = reference(inputs), judged(inputs)
                for name in {*names, OUTPUT}:
                    if ours[name].shape == theirs[name].shape:
                        noise.add(name, ours[name], theirs[name])
                    else:
                        self._other_shape.add(name)
        return noise.sqnr_db()

    def _diverges(self, name: str) -> bool:
        return self._sqnr_db.get(name, math.inf) < self._threshold

    def _found(self, first: str, earlier: Sequence[str], *, note: str = "") -> Divergence:
        """Return a layer that diverges; `earlier` are the layers before it that do not."""
        sqnr, before = self._sqnr_db[first], earlier[-1] if earlier else ""
        drop = self._sqnr_db[before] - sqnr if before else math.inf
        gradual = (
            f"only {drop:.1f} dB below {_shown(before)}: the noise grows from layer to layer, no single one stands out"
            if drop < _SHARP_DB
            else ""
        )
        infinite = "" if math.isfinite(sqnr) else "its output is not finite"
        return Divergence(
            layer=_shown(first),
            sqnr_db=_finite(sqnr),
            before=_shown(before),
            compared=len(self._sqnr_db),
            note=_joined(infinite, gradual, note, self._left_out()),
        )

    def _fusion(self, cured: _Cured) -> Divergence:
        first = cured.names[0]
        return Divergence(
            layer=_shown(first),
            sqnr_db=_finite(self._sqnr_db.get(first, math.inf)),
            compared=len(self._sqnr_db),
            note=f"with the output of {', '.join(map(_shown, cured.names))} marked, the result is right "
            f"({cured.outputs_db:.1f} dB): the fault is in what is fused across it",
        )

    def _nothing(self) -> Divergence:
        outputs_db = self._sqnr_db.get(OUTPUT, math.inf)
        told = f"{outputs_db:.1f} dB at the outputs" if math.isfinite(outputs_db) else "equal outputs"
        nothing = f"no layer is below {self._threshold:.1f} dB on these {len(self._sample)} samples ({told})"
        return Divergence(
            layer="",
            sqnr_db=_finite(outputs_db),
            compared=len(self._sqnr_db),
            note=_joined(nothing, self._left_out()),
        )

    def _left_out(self) -> str:
        """Return the layers that only one model has or that differ in shape, in words; "" if there are none."""
        names = [_shown(name) for name in (*self._unmatched, *sorted(self._other_shape))]
        return f"not compared: {shortened(names, 3)}" if names else ""


def _common(source: Sequence[str], target: Sequence[str]) -> list[str]:
    """Return the outputs of the layers that both models call equally often, in the target's order."""
    first, second = _calls(source), _calls(target)
    return [name for name in target if first[_layer(name)] == second[_layer(name)]]


def _calls(names: Sequence[str]) -> Counter[str]:
    return Counter(_layer(name) for name in names)


def _layer(name: str) -> str:
    return name.partition(" (call ")[0]


def _shown(name: str) -> str:
    return "output" if name == OUTPUT else name


def _unknown(why: str) -> Divergence:
    return Divergence(layer="", sqnr_db=None, note=why)


def _finite(sqnr_db: float) -> float | None:
    return sqnr_db if math.isfinite(sqnr_db) else None


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
