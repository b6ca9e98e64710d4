"""The runtime and the compiler of either library. What a build needs beyond the library is imported for a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maseRT.errors import MissingError, StepError
from maseRT.hardware import cuda_index, nvidia_gpus
from maseRT.runtimes.base import BuildOptions, EngineInfo
from maseRT.runtimes.trt.flavour import Flavour, load, why_cannot_build, why_cannot_run
from maseRT.runtimes.trt.sidecar import check_sidecar, check_weights

if TYPE_CHECKING:
    from maseRT.runtimes.trt.session import TrtSession


@dataclass(frozen=True)
class TrtCompiler:
    """Builds engines with TensorRT or TensorRT-RTX."""

    flavour: Flavour

    @property
    def name(self) -> str:
        """What configs call it."""
        return self.flavour.name

    def missing(self) -> str | None:
        """Return why it cannot build here, and what to install; None when it can."""
        return why_cannot_build(self.flavour)

    def build(self, onnx: Path, out: Path, options: BuildOptions | None = None) -> EngineInfo:
        """Build an engine into the file `out`; what it returns is the engine's sidecar.

        Raises:
            MissingError: this machine cannot build it.
            UsageError: the options do not fit the ONNX file or the library.
            StepError: the ONNX file cannot be parsed or built; names nodes and torch layers.
        """
        from maseRT.runtimes.trt.build import build

        return build(self.flavour, onnx, out, options or BuildOptions())


@dataclass(frozen=True)
class TrtRuntime:
    """Runs engines with TensorRT or TensorRT-RTX; needs cuda-python and numpy beside the library."""

    flavour: Flavour

    @property
    def name(self) -> str:
        """What configs call it."""
        return self.flavour.name

    def missing(self, device: str | None = None) -> str | None:
        """Return why it cannot run here (on "cuda:N"), and what to install; None when it can."""
        return why_cannot_run(self.flavour, 0 if device is None else cuda_index(device))

    def open(
        self, artifact: Path, device: str = "cuda:0", *, trust: bool = False, cuda_graph: bool = True
    ) -> TrtSession:
        """Load an engine.

        Args:
            artifact: the engine; its sidecar lies beside it.
            device: "cuda:N".
            trust: load it without a sidecar. An engine is code: it can do whatever it likes on this machine.
            cuda_graph: replay inferences as CUDA graphs where the engine allows it.

        Raises:
            MissingError: this machine cannot run it.
            StepError: the file is missing or does not load.
            CheckError: the sidecar is missing, or speaks of another engine, version or GPU, or of one without weights.
        """
        index = cuda_index(device)
        reason = why_cannot_run(self.flavour, index)
        if reason:
            raise MissingError(reason, where=f"{self.name} on {device}")
        try:
            content = artifact.read_bytes()
        except OSError as error:
            raise StepError(
                f"cannot read: {error.strerror}", where=str(artifact), fix="run `masert build-engine` first"
            ) from error
        trt = load(self.flavour)
        if trust:
            check_weights(artifact)
        else:
            capability = nvidia_gpus()[index].compute_capability
            check_sidecar(artifact, content, runtime=self.name, version=trt.__version__, capability=capability)
        # Not imported above: it needs numpy, and what only builds does not.
        from maseRT.runtimes.trt.session import TrtSession

        return TrtSession(trt, content, device=index, cuda_graph=cuda_graph, where=str(artifact))
