"""Reads the outputs of a model's layers by name: of a torch model, an ONNX file or an engine.

All layers of a torch model, or of an ONNX file without optimizations, can be read at once, as reading changes nothing.
Where the runtime fuses layers, a tensor that is read cannot be fused away: reading it changes what runs.
"""

from __future__ import annotations

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

from maseRT.errors import MissingError
from maseRT.onnx_export import INPUT
from maseRT.onnx_outputs import Outputs, call_name, layer_outputs, with_outputs
from maseRT.onnxrt.providers import Optimization
from maseRT.plan import OUTPUT, Fold
from maseRT.quant.quantizer import Quantizer
from maseRT.quant.walk import tensors_in
from maseRT.runtimes.base import BuildOptions, Compiler, Runtime, Session
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.runtimes.trt.sidecar import sidecar_path
from maseRT.workspace import write_json

Array = NDArray[Any]
Read = Callable[[Array], dict[str, Array]]
"""Runs a batch [N, ...]; returns layer -> output, and OUTPUT -> the model's output."""

MAX_BATCH = 4
"""Samples that are run at a time: the outputs of all layers have to fit in memory together."""

_NO_LAYERS = (nn.Identity, nn.Dropout, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Layers:
    """What can be read of a model.

    Attributes:
        names: of the outputs, in the order of execution; see `maseRT.onnx_outputs.call_name`.
        outputs: their tensors and edges in the ONNX graph; None for a torch model.
    """

    names: tuple[str, ...]
    outputs: Outputs | None = None


class LayerReader(Protocol):
    """A model whose layers' outputs can be read."""

    @property
    def fuses(self) -> bool:
        """Whether layers are fused, so that reading an output can change what runs."""

    @property
    def max_batch(self) -> int:
        """The most samples that are run at a time."""

    def layers(self, example: Array) -> Layers:
        """Return what can be read; `example` is one sample [1, ...]."""

    def reading(self, names: Collection[str]) -> AbstractContextManager[Read]:
        """Open the model for reading the outputs of these layers, and its own output."""


@dataclass(frozen=True)
class TorchReader:
    """A torch model, read through forward hooks.

    Attributes:
        load: returns the model; called once, at the first use.
        folds: the plan's, for the float model: the output of a folded layer is then read behind its BatchNorm.
        device: on which it runs.
    """

    load: Callable[[], nn.Module]
    folds: Sequence[Fold] = ()
    device: str = "cpu"
    fuses: bool = field(default=False, init=False)
    max_batch: int = field(default=MAX_BATCH, init=False)

    @cached_property
    def _model(self) -> nn.Module:
        return self.load().eval().to(self.device)

    def layers(self, example: Array) -> Layers:
        """Return every call of a module whose first output tensor is floating-point."""
        with self._hooked(None) as read:
            names = [name for name in read(example) if name != OUTPUT]
        return Layers((*names, OUTPUT))

    def reading(self, names: Collection[str]) -> AbstractContextManager[Read]:
        """Hook these layers."""
        return self._hooked({*names, OUTPUT})

    @contextmanager
    def _hooked(self, names: Collection[str] | None) -> Iterator[Read]:
        """Hook some layers, or all of them for None."""
        taken: dict[str, Array] = {}
        calls: Counter[str] = Counter()

        def keep(name: str, result: Any) -> None:
            call = call_name(name, calls[name])
            calls[name] += 1
            tensors = tensors_in(result)
            if (names is None or call in names) and tensors and tensors[0].is_floating_point():
                taken[call] = tensors[0].detach().float().cpu().clone().numpy()  # later layers may write in place

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
        """Return (layer, module to hook); for a folded layer the module is its BatchNorm."""
        folded_into = {fold.batchnorm: fold.layer for fold in self.folds}
        modules = {
            name: module
            for name, module in self._model.named_modules()
            if not isinstance(module, (*_NO_LAYERS, Quantizer)) and name not in folded_into.values()
        }
        return [(folded_into.get(name, name) or OUTPUT, module) for name, module in modules.items()]


@dataclass(frozen=True)
class OnnxReader:
    """An ONNX file in ONNX Runtime.

    Attributes:
        path: the file.
        optimization: how far ONNX Runtime rewrites the graph.
        device: on which it runs.
        threads: CPU threads; None for all cores.
    """

    path: Path
    optimization: Optimization = "all"
    device: str = "cpu"
    threads: int | None = None
    max_batch: int = field(default=MAX_BATCH, init=False)

    @property
    def fuses(self) -> bool:
        """Whether ONNX Runtime's optimizations fuse layers."""
        return self.optimization != "disabled"

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph(self.path)

    def layers(self, example: Array) -> Layers:
        """Return the layers that have nodes of their own in the file."""
        return self._graph.layers

    @contextmanager
    def reading(self, names: Collection[str]) -> Iterator[Read]:
        """Run a copy of the file in which the outputs of these layers are outputs of the graph."""
        with self._graph.marked(names) as (path, tensors):
            session = OnnxRuntime().open(path, self.device, threads=self.threads, optimization=self.optimization)
            with session:
                yield _read_of(session, tensors)


@dataclass(frozen=True)
class EngineReader:
    """An engine; reading a layer takes another engine, built with the layer's output marked.

    Attributes:
        engine: its file, with its sidecar.
        onnx: the ONNX file that it was built from.
        compiler: builds the other engines.
        runtime: runs them.
        options: with which the engine was built.
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
    def max_batch(self) -> int:
        """The largest batch that the engine takes."""
        return self._batches[1]

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph(self.onnx)

    def layers(self, example: Array) -> Layers:
        """Return the layers that have nodes of their own in the ONNX file."""
        return self._graph.layers

    @contextmanager
    def reading(self, names: Collection[str]) -> Iterator[Read]:
        """Run the engine itself or, where layers are named, one built with their outputs marked.

        Raises:
            MissingError: engines cannot be built or run here.
        """
        reason = self.runtime.missing(self.device)
        if reason:
            raise MissingError(reason, where=f"{self.runtime.name} on {self.device}")
        with self._graph.marked(names) as (path, tensors):
            engine = self._build(path) if names else self.engine
            with self.runtime.open(engine, self.device) as session:
                yield _padded(_read_of(session, tensors), self._batches[0])

    def _build(self, onnx: Path) -> Path:
        engine = onnx.with_suffix(".trt")
        options = replace(self.options, reproducible=False, strip=False, refit=False)
        info = self.compiler.build(onnx, engine, options)
        write_json(sidecar_path(engine), info.to_json())
        return engine

    @property
    def _batches(self) -> tuple[int, int]:
        """The smallest and the largest batch of the first profile."""
        for profile in self.options.profiles:
            if INPUT in profile:
                return profile[INPUT].min[0], profile[INPUT].max[0]
        return self.options.batch.min, self.options.batch.max


class _Graph:
    """An ONNX file, and copies of it with further outputs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model = onnx.load(path)
        outputs = layer_outputs(self._model)
        self.layers = Layers(tuple(outputs.tensors), outputs)
        self._tensors = outputs.tensors

    @contextmanager
    def marked(self, names: Collection[str]) -> Iterator[tuple[Path, dict[str, str]]]:
        """Yield a file in which the outputs of layers are outputs of the graph, and layer -> name of the output."""
        model, tensors = with_outputs(self._model, {name: self._tensors[name] for name in (*names, OUTPUT)})
        if not names:
            yield self._path, tensors
            return
        with TemporaryDirectory(prefix="masert-divergence-") as folder:
            path = Path(folder) / self._path.name
            onnx.save(model, path)
            yield path, tensors


def _read_of(session: Session, tensors: Mapping[str, str]) -> Read:
    """Return what runs a session; tensors: layer -> name of the session's output."""

    def read(inputs: Array) -> dict[str, Array]:
        outputs = session.infer({INPUT: inputs})
        return {layer: outputs[tensor] for layer, tensor in tensors.items()}

    return read


def _padded(read: Read, min_batch: int) -> Read:
    """Repeat samples up to the smallest batch that an engine takes, and drop their outputs again."""

    def padded(inputs: Array) -> dict[str, Array]:
        count = len(inputs)
        if count >= min_batch:
            return read(inputs)
        repeated = np.resize(inputs, (min_batch, *inputs.shape[1:]))
        return {layer: values[:count] for layer, values in read(repeated).items()}

    return padded
