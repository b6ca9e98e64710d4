"""The ONNX Runtime runtime: an ONNX file on the CPU or CUDA execution provider, never silently on another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from maseRT.errors import CheckError, MissingError, StepError
from maseRT.hardware import cuda_index, why_no_gpu
from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.feeds import check_feed, like_feed, to_numpy

Optimization = Literal["all", "extended", "basic", "disabled"]

_LEVELS: dict[Optimization, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DTYPES = {"float": "float32", "double": "float64"}
_ERRORS_ONLY = 3


class OnnxRuntime:
    """Runs ONNX files with onnxruntime."""

    name = "onnxruntime"

    def missing(self, device: str | None = None) -> str | None:
        """Return why onnxruntime cannot run here (on "cpu" or "cuda:N"); None when it can."""
        if not find_spec("onnxruntime"):
            return "onnxruntime is not installed: pip install onnxruntime (for a GPU: onnxruntime-gpu; never both)"
        if device is None or device == "cpu":
            return None
        return why_no_gpu(cuda_index(device)) or _why_no_cuda_provider()

    def open(
        self, artifact: Path, device: str = "cpu", *, threads: int | None = None, optimization: Optimization = "all"
    ) -> OnnxSession:
        """Load an ONNX file.

        Args:
            artifact: the file.
            device: "cpu" or "cuda:N".
            threads: CPU threads of one inference; None: all cores.
            optimization: how far onnxruntime rewrites the graph.

        Raises:
            MissingError: onnxruntime, its CUDA provider or the GPU is missing.
            StepError: the file is missing, or onnxruntime cannot load it.
            CheckError: onnxruntime put another provider in the place of the one asked for.
        """
        reason = self.missing(device)
        if reason:
            raise MissingError(
                reason, where=f"{self.name} on {device}", fix='use device "cpu"' if device != "cpu" else ""
            )
        import onnxruntime as ort

        provider = _CPU if device == "cpu" else _CUDA
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[optimization])
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # Threads that spin after a run slow down whatever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not artifact.is_file():
            raise StepError("no such ONNX file", where=str(artifact), fix="run `masert export` first")
        settings = [{"device_id": cuda_index(device)}, {}] if provider == _CUDA else [{}]
        asked = [provider, _CPU] if provider == _CUDA else [_CPU]
        try:
            session = ort.InferenceSession(
                str(artifact),
                options,
                providers=asked,
                provider_options=settings,
                disabled_optimizers=_harmful_optimizers(artifact),
            )
        except Exception as error:  # its errors share no base class
            raise StepError(
                f"onnxruntime {ort.__version__} cannot load it: {error}",
                where=str(artifact),
                fix="rebuild it with `masert export --force`",
            ) from error
        check_provider(provider, session.get_providers())
        return OnnxSession(session, device=device)


def _harmful_optimizers(path: Path) -> list[str]:
    """Return the optimizations that would change a file's result.

    WeightBiasQuantization divides a bias by its scale in the scale's own type: half overflows to infinity.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    half_scales = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT16}
    quantizes_in_half = any(n.op_type == "DequantizeLinear" and n.input[1] in half_scales for n in graph.node)
    return ["WeightBiasQuantization"] if quantizes_in_half else []


def check_provider(asked: str, got: Sequence[str]) -> None:
    """Check that a session runs on the execution provider it was asked for.

    Raises:
        CheckError: it does not.
    """
    if not got or got[0] != asked:
        raise CheckError(
            f"asked for {asked}, got {', '.join(got) or 'nothing'}",
            where="onnxruntime",
            fix="install the CUDA and cuDNN libraries it was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )


def _why_no_cuda_provider() -> str | None:
    import onnxruntime as ort

    if _CUDA in ort.get_available_providers():
        return None
    return "the installed onnxruntime has no CUDA provider: install onnxruntime-gpu in its place"


class OnnxSession:
    """An ONNX file loaded by onnxruntime."""

    def __init__(self, session: Any, *, device: str) -> None:
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._session = session
        self._device = device

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run this session, first choice first."""
        return tuple(self._live().get_providers())

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model on one batch. Torch tensors pass through host memory.

        Raises:
            UsageError: the feed does not fit.
            StepError: onnxruntime failed.
        """
        check_feed(feed, self.inputs, where=OnnxRuntime.name)
        arrays = {name: to_numpy(value) for name, value in feed.items()}
        names = [spec.name for spec in self.outputs]
        try:
            values = self._live().run(names, arrays)
        except Exception as error:
            raise StepError(f"inference failed: {error}", where=OnnxRuntime.name) from error
        return like_feed(dict(zip(names, values, strict=True)), feed)

    def bind(self, feed: Mapping[str, Any]) -> OnnxBound:
        """Place one batch, and room for the outputs, on the device."""
        import onnxruntime as ort

        check_feed(feed, self.inputs, where=OnnxRuntime.name)
        session = self._live()
        kind, index = ("cpu", 0) if self._device == "cpu" else ("cuda", cuda_index(self._device))
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(to_numpy(value), kind, index))
        for spec in self.outputs:
            binding.bind_output(spec.name, kind, index)
        return OnnxBound(session, binding)

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _live(self) -> Any:
        if self._session is None:
            raise StepError("the session is closed", where=OnnxRuntime.name)
        return self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OnnxBound:
    """One batch on the session's device, by I/O binding."""

    def __init__(self, session: Any, binding: Any) -> None:
        self._session = session
        self._binding = binding

    def run(self) -> None:
        """Infer once and wait for the end."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def device_times_ms(self, iterations: int) -> None:
        """Return None: onnxruntime does not give its CUDA stream's events away."""


def _spec(node: Any) -> TensorSpec:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    dtype = _DTYPES.get(kind, kind)
    return TensorSpec(node.name, dtype, tuple(size if isinstance(size, int) else None for size in node.shape))
