"""What runtimes have in common: tensors' names and shapes, build options, and the roles Session, Runtime and Compiler.

Neither torch nor a vendor package is needed to import this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from maseRT.errors import UsageError
from maseRT.runtimes.device_times import DeviceTimes


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Attributes:
        dtype: numpy's name, such as "float32".
        shape: None for a dynamic dimension; None altogether where the runtime does not know.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes an engine takes: smallest, fastest, largest.

    Raises:
        UsageError: 1 <= min <= opt <= max does not hold.
    """

    min: int = 1
    opt: int = 64
    max: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"1 <= min <= opt <= max does not hold: {self.min}, {self.opt}, {self.max}", where="batch profile"
            )


@dataclass(frozen=True)
class ShapeRange:
    """The shapes one input takes in one optimization profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, ShapeRange]
"""Input name -> shapes."""


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built. Precision is not among them: it is in the ONNX file.

    Attributes:
        batch: sizes of the first dimension, where it is dynamic.
        profiles: one or more profiles in full, for other dynamic dimensions; `batch` is then not used.
        compute_capability: the target GPU such as "8.9", for a compiler that builds ahead of time; None: this GPU.
        device: the GPU that a compiler without ahead-of-time builds works on.
        workspace_mb: memory in MiB that tactics may use.
        optimization_level: 0 to 5; None: the compiler's default.
        tf32: let FP32 layers use TF32.
        timing_caches: a folder with one timing cache per GPU and version, which is read where it fits and written
            afterwards; ahead-of-time builds time nothing.
        reproducible: take tactics from the timing cache alone once there is one, so that a rebuild gives the same
            engine; a library that cannot promise it says so in the notes.
        tactic_sources: names of `TacticSource` that may be used; None: all that need no further library at run time.
        version_compatible: an engine that later versions of the same runtime load too.
        hardware_compatible: an engine that also runs on newer GPUs (Ampere and later).
        refit: an engine whose weights can be replaced.
        strip: an engine without weights, to be refitted.
        max_threads: CPU threads of the builder.
    """

    batch: BatchRange = field(default_factory=BatchRange)
    profiles: tuple[Profile, ...] = ()
    compute_capability: str | None = None
    device: str = "cuda:0"
    workspace_mb: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    timing_caches: Path | None = None
    reproducible: bool = False
    tactic_sources: tuple[str, ...] | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    strip: bool = False
    max_threads: int | None = None


@dataclass(frozen=True)
class EngineTensor:
    """What flows into or out of an engine layer.

    Attributes:
        dtype: fp32, fp16, bf16, fp8, int8, int32, ... ; "" where it is not told.
        format: the memory layout in the vendor's words.
        shape: -1 for a dynamic dimension.
    """

    name: str
    dtype: str
    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineLayer:
    """A layer as the engine executes it.

    Attributes:
        constants: weights, scales and biases.
        tactic: the kernel, where known.
        precision: what it computes in: fp32, bf16, fp16, fp8 or int8; "" where its tensors do not tell.
        nodes: the ONNX nodes that it computes, or computes a part of.
        onnx_layers: the torch layers those nodes come from, casts and Q/DQ pairs left aside.
        owners: the torch layers whose convolution, matrix product or recurrence is among them.
        converts_only: it changes types or memory layouts and computes nothing.
    """

    name: str
    type: str
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    constants: tuple[EngineTensor, ...] = ()
    tactic: str = ""
    precision: str = ""
    nodes: tuple[str, ...] = ()
    onnx_layers: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    converts_only: bool = False


@dataclass(frozen=True)
class EngineInfo:
    """An engine: what it was built from, for what, and what is in it. Its JSON form is the engine's sidecar.

    Attributes:
        version: of the runtime that built it.
        target: compute capability of the GPU it is for.
        gpu: the GPU it was built on; None when it was built without one.
        profiles: input name -> shapes, per optimization profile; empty for fixed shapes.
        seconds: wall time of the build call alone.
        layers: None where they could not be observed.
        layers_from: "inspector", "build log", or "" when not observed.
        notes: what the user should know about the build.
        version_compatible: later versions of the runtime load it too.
        hardware_compatible: it runs on every GPU since Ampere.
        stripped: it has no weights, and cannot run until it is refitted.
    """

    runtime: str
    version: str
    target: str
    gpu: str | None
    profiles: tuple[Profile, ...]
    onnx_sha256: str
    engine_sha256: str
    seconds: float
    bytes: int
    layers: tuple[EngineLayer, ...] | None
    layers_from: str
    notes: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    stripped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a sidecar file."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> EngineInfo:
        """Return what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: the mapping is not one that `to_json` gave.
        """
        layers = raw["layers"]
        return cls(
            **{
                **raw,
                "profiles": tuple(_profile_from_json(profile) for profile in raw["profiles"]),
                "layers": None if layers is None else tuple(_layer_from_json(layer) for layer in layers),
                "notes": tuple(raw["notes"]),
            }
        )


def _profile_from_json(raw: Mapping[str, Any]) -> Profile:
    return {name: ShapeRange(*(tuple(shape[key]) for key in ("min", "opt", "max"))) for name, shape in raw.items()}


def _layer_from_json(raw: Mapping[str, Any]) -> EngineLayer:
    tensors = {
        key: tuple(EngineTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in raw[key])
        for key in ("inputs", "outputs", "constants")
    }
    names = {key: tuple(raw[key]) for key in ("nodes", "onnx_layers", "owners")}
    return EngineLayer(**{**raw, **tensors, **names})


Call = Callable[[], Sequence[Any]]
"""Infers one batch; returns the outputs as numpy arrays, in the order of the session's `outputs`."""


@dataclass(frozen=True)
class Bound:
    """Inputs that lie on the device, ready to be inferred again and again: what the device's time is measured on.

    Attributes:
        launch: infers once, without copies between host and device; it may return before that is done.
        wait: returns when all is done that was launched.
        times: returns the time of each of so many inferences by the device's own clock; None where it has none.
    """

    launch: Callable[[], object]
    wait: Callable[[], object] = lambda: None
    times: Callable[[int], DeviceTimes] | None = None

    def run(self) -> None:
        """Infer once; return when it is done."""
        self.repeat(1)

    def repeat(self, iterations: int) -> None:
        """Infer `iterations` times back to back; return when all are done."""
        for _ in range(iterations):
            self.launch()
        self.wait()

    def device_times(self, iterations: int) -> DeviceTimes | None:
        """Return the time of each of `iterations` inferences by the device's own clock; None where it has none.

        They are queued one behind another, so that the device need not wait for the host; where it does, it is told.
        """
        return None if self.times is None else self.times(iterations)


class Session(Protocol):
    """A loaded model on a device. A context manager: it owns its memory there and frees it at the end."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What must be fed."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out."""

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model on one batch and return its outputs by name.

        Args:
            feed: input name -> numpy array; or torch tensor, and the outputs are torch tensors on its device too.

        Raises:
            UsageError: the feed does not fit the inputs.
        """

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """Check one batch, and return what infers it from host memory to host memory, as `infer` does.

        This is what end-to-end latency is measured on: the checks take longer than some models. A call may refuse to
        run after the session has inferred or bound something else.

        Args:
            feed: input name -> numpy array, which must stay as it is.

        Raises:
            UsageError: the feed does not fit the inputs.
        """

    def bind(self, feed: Mapping[str, Any]) -> Bound:
        """Place one batch on the device."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Profiled(Protocol):
    """A session that can tell how long its kernels take."""

    def layer_times_ms(self, feed: Mapping[str, Any], *, iterations: int) -> dict[str, float]:
        """Return the mean time of every engine layer on one batch, by its name."""


class Runtime(Protocol):
    """Opens one kind of artifact."""

    @property
    def name(self) -> str:
        """What configs call it."""

    def missing(self, device: str | None = None) -> str | None:
        """Return why it cannot run here (on "cpu" or "cuda:N"), and what to install; None when it can."""

    def open(self, artifact: Any, device: str) -> Session:
        """Load an artifact.

        Args:
            artifact: what this runtime runs: a file's path, or an nn.Module.
            device: "cpu" or "cuda:N".

        Raises:
            MissingError: this machine cannot run it.
            StepError: the artifact is missing or damaged.
            CheckError: the runtime would silently run something else than asked for.
        """


class Compiler(Protocol):
    """Builds engines from ONNX files."""

    @property
    def name(self) -> str:
        """What configs call it."""

    def missing(self) -> str | None:
        """Return why it cannot build here, and what to install; None when it can."""

    def build(self, onnx: Path, out: Path, options: BuildOptions) -> EngineInfo:
        """Build an engine into the file `out`.

        Raises:
            MissingError: this machine cannot build it.
            UsageError: the options do not fit the ONNX file or the compiler.
            StepError: the ONNX file cannot be parsed or built; names nodes and torch layers.
        """
