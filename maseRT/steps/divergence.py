"""Where two neighbours of the drift ladder part: the first layer whose output is no longer what it was.

A neighbour is a `Side`: a torch model, an ONNX file or an engine whose layers' outputs can be read by name. Any two can
be compared. Reading a layer of a torch model, or of ONNX Runtime without optimizations, changes nothing: all layers are
read at once and the first one is taken. Where the runtime fuses layers, each output that is read is one that it cannot
fuse over: there, one layer at a time is read, and the first is found by bisection.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from maseRT.bisection import first_bad, restricted
from maseRT.config import DriftLimits
from maseRT.drift import Noise, threshold_db
from maseRT.errors import MaseRTError, MissingError
from maseRT.onnx_export import INPUT
from maseRT.onnx_outputs import Outputs, call_name, layer_outputs, with_outputs
from maseRT.onnxrt.providers import Optimization
from maseRT.plan import OUTPUT, Fold
from maseRT.quant.quantizer import Quantizer
from maseRT.quant.walk import tensors_in
from maseRT.report.schema import Divergence, Rung
from maseRT.runtimes.base import BuildOptions, Compiler, Runtime, Session
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.runtimes.trt.sidecar import sidecar_path
from maseRT.workspace import write_json

Array = NDArray[Any]
Reader = Callable[[Array], dict[str, Array]]
"""A batch -> the outputs of layers by name, and OUTPUT."""

SLICE = 4
"""Samples that are compared at a time: the outputs of all layers have to fit in memory."""

LOOKS = 12
"""How many layers a bisection may read, each with an engine of its own: enough for 2,000 layers."""

_SHARP_DB = 6.0
_CURED_DB = 3.0
_NO_LAYERS = (nn.Identity, nn.Dropout, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Layers:
    """What can be read of a side.

    Attributes:
        names: of the outputs, in the order of execution; see `maseRT.onnx_outputs.call_name`.
        outputs: where they are in a graph; None without one.
    """

    names: tuple[str, ...]
    outputs: Outputs | None = None


class Side(Protocol):
    """One of two neighbours."""

    @property
    def fuses(self) -> bool:
        """Whether reading a layer's output can change what runs, so that few are to be read at once."""

    @property
    def most(self) -> int:
        """The largest batch."""

    def layers(self, example: Array) -> Layers:
        """Return what can be read."""

    def reading(self, names: Collection[str]) -> AbstractContextManager[Reader]:
        """Read the outputs of these layers inside the block."""


@dataclass(frozen=True)
class TorchSide:
    """A torch model.

    Attributes:
        load: makes it; called once, when it is needed.
        folds: of the plan, for the float model: the output of such a layer is compared after its BatchNorm.
        device: that runs it.
    """

    load: Callable[[], nn.Module]
    folds: Sequence[Fold] = ()
    device: str = "cpu"
    fuses: bool = field(default=False, init=False)
    most: int = field(default=SLICE, init=False)

    @cached_property
    def _model(self) -> nn.Module:
        return self.load().eval().to(self.device)

    def layers(self, example: Array) -> Layers:
        """Return every module that runs, and gives floating-point numbers first."""
        with self._hooked(None) as read:
            names = [name for name in read(example) if name != OUTPUT]
        return Layers((*names, OUTPUT))

    def reading(self, names: Collection[str]) -> AbstractContextManager[Reader]:
        """Read outputs through hooks."""
        return self._hooked({*names, OUTPUT})

    @contextmanager
    def _hooked(self, names: Collection[str] | None) -> Iterator[Reader]:
        """Read the outputs of some layers, or of all."""
        taken: dict[str, Array] = {}
        calls: Counter[str] = Counter()

        def keep(name: str, result: Any) -> None:
            call = call_name(name, calls[name])
            calls[name] += 1
            tensors = tensors_in(result)
            if (names is None or call in names) and tensors and tensors[0].is_floating_point():
                taken[call] = tensors[0].detach().float().cpu().clone().numpy()  # what follows may write in place

        def read(inputs: Array) -> dict[str, Array]:
            taken.clear()
            calls.clear()
            with torch.inference_mode():
                self._model(torch.from_numpy(inputs).to(self.device))
            return dict(taken)

        hooks = [
            module.register_forward_hook(lambda _module, _args, result, name=name: keep(name, result))
            for name, module in self._named()
        ]
        try:
            yield read
        finally:
            for hook in hooks:
                hook.remove()

    def _named(self) -> list[tuple[str, nn.Module]]:
        """Return the modules to read by the name of the layer that they end."""
        into = {fold.batchnorm: fold.layer for fold in self.folds}
        modules = {
            name: module
            for name, module in self._model.named_modules()
            if not isinstance(module, (*_NO_LAYERS, Quantizer)) and name not in into.values()
        }
        return [(into.get(name, name) or OUTPUT, module) for name, module in modules.items()]


@dataclass(frozen=True)
class OnnxSide:
    """An ONNX file in ONNX Runtime.

    Attributes:
        path: the file.
        optimization: how far ONNX Runtime rewrites it: as in the row that is compared.
        device: that runs it.
        threads: CPU threads; None: all cores.
    """

    path: Path
    optimization: Optimization = "all"
    device: str = "cpu"
    threads: int | None = None
    most: int = field(default=SLICE, init=False)

    @property
    def fuses(self) -> bool:
        """Whether layers are fused."""
        return self.optimization != "disabled"

    @cached_property
    def graph(self) -> _Graph:
        """The file, read once."""
        return _Graph(self.path)

    def layers(self, example: Array) -> Layers:
        """Return what has nodes of its own in the file."""
        return self.graph.layers

    @contextmanager
    def reading(self, names: Collection[str]) -> Iterator[Reader]:
        """Run the file with further outputs."""
        with self.graph.marked(names) as (path, keys):
            runtime = OnnxRuntime()
            session = runtime.open(path, self.device, threads=self.threads, optimization=self.optimization)
            with session:
                yield _reader(session, keys)


@dataclass(frozen=True)
class EngineSide:
    """An engine.

    Attributes:
        engine: its file, with its sidecar.
        onnx: what it was built from.
        compiler: that built it.
        runtime: that runs it.
        options: that it was built with.
        device: "cuda:N".
    """

    engine: Path
    onnx: Path
    compiler: Compiler
    runtime: Runtime
    options: BuildOptions
    device: str = "cuda:0"
    fuses: bool = field(default=True, init=False)

    @property
    def most(self) -> int:
        """The largest batch that the engine takes."""
        return self._batches[1]

    @cached_property
    def graph(self) -> _Graph:
        """The ONNX file, read once."""
        return _Graph(self.onnx)

    def layers(self, example: Array) -> Layers:
        """Return what has nodes of its own in the ONNX file."""
        return self.graph.layers

    @contextmanager
    def reading(self, names: Collection[str]) -> Iterator[Reader]:
        """Run the engine or, where layers are named, another one that hands their outputs out, too.

        Raises:
            MissingError: engines cannot be built or run here.
        """
        reason = self.runtime.missing(self.device)
        if reason:
            raise MissingError(reason, where=f"{self.runtime.name} on {self.device}")
        with self.graph.marked(names) as (path, keys):
            engine = self._build(path) if names else self.engine
            with self.runtime.open(engine, self.device) as session:
                yield _padded(_reader(session, keys), self._batches[0])

    def _build(self, onnx: Path) -> Path:
        engine = onnx.with_suffix(".trt")
        options = replace(self.options, reproducible=False, strip=False, refit=False)
        info = self.compiler.build(onnx, engine, options)
        write_json(sidecar_path(engine), info.to_json())
        return engine

    @property
    def _batches(self) -> tuple[int, int]:
        for profile in self.options.profiles:
            if INPUT in profile:
                return profile[INPUT].min[0], profile[INPUT].max[0]
        return self.options.batch.min, self.options.batch.max


class _Graph:
    """An ONNX file and copies of it that hand out more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model = onnx.load(path)
        outputs = layer_outputs(self._model)
        self.layers = Layers(tuple(outputs.tensors), outputs)
        self._tensors = outputs.tensors

    @contextmanager
    def marked(self, names: Collection[str]) -> Iterator[tuple[Path, dict[str, str]]]:
        """Give a file that hands out the outputs of layers, and what these are called in it."""
        model, keys = with_outputs(self._model, {name: self._tensors[name] for name in (*names, OUTPUT)})
        if not names:
            yield self._path, keys
            return
        with TemporaryDirectory(prefix="masert-divergence-") as folder:
            path = Path(folder) / self._path.name
            onnx.save(model, path)
            yield path, keys


def explain(rungs: Sequence[Rung], sides: Mapping[str, Side], sample: Array, limits: DriftLimits) -> list[Rung]:
    """Return the rungs; those that do not hold with their first diverging layer. Nothing is loaded when all hold.

    Args:
        rungs: of the ladder.
        sides: row name -> how its layers can be read.
        sample: inputs [N, ...]; a batch is enough.
        limits: of the ladder.
    """
    return [rung if rung.holds else _explained(rung, sides, sample, limits) for rung in rungs]


def _explained(rung: Rung, sides: Mapping[str, Side], sample: Array, limits: DriftLimits) -> Rung:
    source, target = sides.get(rung.source), sides.get(rung.target)
    if source is None or target is None:
        found = _unknown(f"the layers of {rung.source if source is None else rung.target} cannot be read")
    else:
        try:
            found = _search(source, target, sample, threshold_db(rung, limits))
        except MaseRTError as error:
            found = _unknown(f"not searched: {error}")
    return rung.model_copy(update={"divergence": found})


def _search(source: Side, target: Side, sample: Array, threshold: float) -> Divergence:
    """Take ONNX Runtime's optimizations into account: of a reference off, of what is judged off, then on."""
    if isinstance(source, OnnxSide):
        source = replace(source, optimization="disabled")
    if not isinstance(target, OnnxSide) or not target.fuses:
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
    source: Side, target: Side, sample: Array, *, threshold_db: float, looks: int = LOOKS
) -> Divergence:
    """Return the first layer whose output differs by more than a threshold.

    Where a side fuses, layers are read one at a time: what has diverged is expected to stay so. The layers right before
    the one found are checked.

    Args:
        source: the reference.
        target: what is judged.
        sample: inputs [N, ...].
        threshold_db: SQNR of a layer's output over the sample below which it diverges.
        looks: how many layers may be read one at a time.

    Raises:
        MaseRTError: one of the two cannot run here.
    """
    search = _Search(source, target, sample, threshold_db)
    return search.bisected(looks) if source.fuses or target.fuses else search.scanned()


class _Cured(Exception):  # noqa: N818
    """The outputs are right as soon as these layers are read."""

    def __init__(self, names: Sequence[str], outputs_db: float) -> None:
        super().__init__(names)
        self.names = names
        self.outputs_db = outputs_db


class _Search:
    def __init__(self, source: Side, target: Side, sample: Array, threshold: float) -> None:
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
            for side, other in ((reference, judged), (judged, reference))
            if side.outputs is None and other.outputs is not None
            for name in side.names
            if name not in self._names
        ]
        self._unlike: set[str] = set()
        self._measured: dict[str, float] = {}

    def scanned(self) -> Divergence:
        """Read all layers at once."""
        self._measured = self._compare(self._names)
        order = [name for name in self._names if name in self._measured]
        first = next((name for name in order if self._diverges(name)), None)
        if first is None:
            return self._nothing()
        return self._found(first, order[: order.index(first)])

    def bisected(self, looks: int) -> Divergence:
        """Read one layer at a time."""
        assert self._graph is not None  # what fuses is made from a graph
        self._measured = self._compare(())
        if not self._diverges(OUTPUT):
            return self._nothing()
        one_each: dict[str, str] = {}
        for name in self._names:
            one_each.setdefault(self._graph.tensors[name], name)
        last = one_each[self._graph.tensors[OUTPUT]]
        self._measured[last] = self._measured.pop(OUTPUT)
        before = restricted(self._graph.before, list(one_each.values()))
        title = "each in a build of its own with its output marked, which can change what is fused"
        try:
            found = first_bad(last, before, self._look, looks=looks)
        except _Cured as cured:
            return Divergence(
                layer=_shown(cured.names[0]),
                sqnr_db=_number(self._measured.get(cured.names[0], math.inf)),
                compared=len(self._measured),
                note=f"with the output of {', '.join(map(_shown, cured.names))} marked, the result is right "
                f"({cured.outputs_db:.1f} dB): the fault is in what is fused across it",
            )
        left = f"; {len(found.suspects)} layers before it were not read" if found.suspects else ""
        above = [name for name in before if name in self._measured and not self._diverges(name)]
        order = list(before)
        earlier = [name for name in above if order.index(name) < order.index(found.first)]
        return self._found(found.first, earlier, note=f"found by reading {found.looks} layers, {title}{left}")

    def _look(self, names: Sequence[str]) -> dict[str, bool]:
        measured = self._compare(names)
        self._measured |= {name: db for name, db in measured.items() if name != OUTPUT}
        if measured[OUTPUT] >= self._threshold + _CURED_DB:
            raise _Cured(names, measured[OUTPUT])
        return {name: self._diverges(name) for name in names}

    def _compare(self, names: Collection[str]) -> dict[str, float]:
        """Return the SQNR of layers' outputs, and of OUTPUT, over the sample."""
        noise = Noise()
        size = min(SLICE, self._source.most, self._target.most)
        with self._source.reading(names) as reference, self._target.reading(names) as judged:
            for start in range(0, len(self._sample), size):
                inputs = self._sample[start : start + size]
                ours, theirs = reference(inputs), judged(inputs)
                for name in {*names, OUTPUT}:
                    if ours[name].shape == theirs[name].shape:
                        noise.add(name, ours[name], theirs[name])
                    else:
                        self._unlike.add(name)
        return noise.sqnr_db()

    def _diverges(self, name: str) -> bool:
        return self._measured.get(name, math.inf) < self._threshold

    def _found(self, first: str, earlier: Sequence[str], *, note: str = "") -> Divergence:
        sqnr, before = self._measured[first], earlier[-1] if earlier else ""
        drop = self._measured[before] - sqnr if before else math.inf
        gradual = (
            f"only {drop:.1f} dB below {_shown(before)}: the noise grows from layer to layer, no single one stands out"
            if drop < _SHARP_DB
            else ""
        )
        infinite = "" if math.isfinite(sqnr) else "its output is not finite"
        return Divergence(
            layer=_shown(first),
            sqnr_db=_number(sqnr),
            before=_shown(before),
            compared=len(self._measured),
            note=_joined(infinite, gradual, note, self._left_out()),
        )

    def _nothing(self) -> Divergence:
        outputs_db = self._measured.get(OUTPUT, math.inf)
        told = f"{outputs_db:.1f} dB at the outputs" if math.isfinite(outputs_db) else "equal outputs"
        return Divergence(
            layer="",
            sqnr_db=_number(outputs_db),
            compared=len(self._measured),
            note=_joined(
                f"no layer is below {self._threshold:.1f} dB on these {len(self._sample)} samples ({told})",
                self._left_out(),
            ),
        )

    def _left_out(self) -> str:
        names = [*self._unmatched, *sorted(self._unlike)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"not compared: {', '.join(map(_shown, names[:3]))}{more}" if names else ""


def _common(source: Sequence[str], target: Sequence[str]) -> list[str]:
    """Return the outputs that both sides have, in the target's order: of layers that both call equally often."""
    first, second = _calls(source), _calls(target)
    return [name for name in target if first[_layer(name)] == second[_layer(name)]]


def _calls(names: Sequence[str]) -> Counter[str]:
    return Counter(_layer(name) for name in names)


def _layer(name: str) -> str:
    return name.partition(" (call ")[0]


def _shown(name: str) -> str:
    return "output" if name == OUTPUT else name


def _reader(session: Session, keys: Mapping[str, str]) -> Reader:
    """Read a session's outputs; keys: layer -> the output's name."""

    def read(inputs: Array) -> dict[str, Array]:
        found = session.infer({INPUT: inputs})
        return {key: found[name] for key, name in keys.items()}

    return read


def _padded(read: Reader, least: int) -> Reader:
    """Repeat samples where an engine takes no batch as small."""

    def padded(inputs: Array) -> dict[str, Array]:
        count = len(inputs)
        if count >= least:
            return read(inputs)
        repeated = np.resize(inputs, (least, *inputs.shape[1:]))
        return {key: values[:count] for key, values in read(repeated).items()}

    return padded


def _unknown(why: str) -> Divergence:
    return Divergence(layer="", sqnr_db=None, note=why)


def _number(sqnr_db: float) -> float | None:
    return sqnr_db if math.isfinite(sqnr_db) else None


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
