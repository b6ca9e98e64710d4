"""The ONNX Runtime runtime: an ONNX file on the execution provider of a device, never silently on another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maseRT.closing import Closing
from maseRT.errors import CheckError, MissingError, StepError
from maseRT.onnxrt.providers import (
    CPU,
    Optimization,
    Provider,
    SessionSettings,
    built_in,
    node_counts,
    parse_device,
    plugin_devices,
    provider_options,
    saturating_products,
    why_unavailable,
)
from maseRT.runtimes.base import Bound, Call, TensorSpec
from maseRT.runtimes.feeds import arrays_fit, check_feed, like_feed, to_numpy, with_ids_as_taken

if TYPE_CHECKING:
    from maseRT.runtimes.trt.cuda import Resources

log = logging.getLogger(__name__)

_LEVELS: dict[Optimization, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}
_DTYPES = {"float": "float32", "double": "float64"}
_ERRORS_ONLY = 3


class OnnxRuntime:
    """Runs ONNX files with onnxruntime."""

    name = "onnxruntime"

    def missing(self, device: str | None = None) -> str | None:
        """Return why onnxruntime cannot run here, on a device of `maseRT.onnxrt.providers`; None when it can."""
        return why_unavailable(device or "cpu")

    def open(
        self,
        artifact: Path,
        device: str = "cpu",
        *,
        threads: int | None = None,
        optimization: Optimization = "all",
        settings: SessionSettings | None = None,
    ) -> OnnxSession:
        """Load an ONNX file.

        Args:
            artifact: the file.
            device: "cpu", "cuda", "openvino", ..., with ":N" for the Nth of them.
            threads: CPU threads of one inference; None: all cores.
            optimization: how far onnxruntime rewrites the graph.
            settings: all settings at once, in place of the two above.

        Raises:
            MissingError: onnxruntime, the device's provider or the device is missing.
            StepError: the file is missing, or onnxruntime cannot load it.
            CheckError: onnxruntime put another provider in the place of the one asked for.
        """
        reason = self.missing(device)
        if reason:
            raise MissingError(
                reason, where=f"{self.name} on {device}", fix='use device "cpu"' if device != "cpu" else ""
            )
        if not artifact.is_file():
            raise StepError("no such ONNX file", where=str(artifact), fix="run `masert export` first")
        settings = settings or SessionSettings(threads=threads, optimization=optimization)
        provider, index = parse_device(device)
        with ExitStack() as guard:
            memory = _own_stream(index) if provider.device == "cuda" else None
            if memory is not None:
                guard.enter_context(memory)
            session = create_session(artifact, device, settings, stream=memory.stream if memory is not None else None)
            if not settings.allow_fallback:
                check_provider(provider.name, session.get_providers())
                if provider.name != CPU:
                    check_assignment(provider.name, node_counts(session), where=str(artifact))
            guard.pop_all()
        return OnnxSession(session, device=device, memory=memory)


def _own_stream(index: int) -> Resources | None:
    """Return a stream for a session on a GPU, so that its inferences can be timed; None where none can be made."""
    from maseRT.runtimes.trt.cuda import Resources, set_device

    try:
        set_device(index)
        return Resources()
    except (MissingError, StepError) as error:
        why = "; ".join(filter(None, (error.what, error.fix)))
        log.warning("%s cannot be timed by the device: %s", OnnxRuntime.name, why)
        return None


def create_session(
    artifact: Path,
    device: str,
    settings: SessionSettings,
    *,
    optimized: Path | None = None,
    stream: int | None = None,
) -> Any:
    """Return an onnxruntime.InferenceSession.

    Args:
        artifact: the ONNX file.
        device: whose provider comes first; the CPU's takes what that one leaves.
        settings: of the session.
        optimized: where onnxruntime writes the graph as it rewrote it.
        stream: the CUDA stream to compute on; None: one of onnxruntime's own.

    Raises:
        StepError: onnxruntime cannot load the file.
    """
    import onnxruntime as ort

    provider, index = parse_device(device)
    options = _session_options(provider, settings)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    arguments: dict[str, Any] = {"disabled_optimizers": _harmful_optimizers(artifact)}
    own = provider_options(provider, index, settings)
    if stream is not None:
        own["user_compute_stream"] = str(stream)
    if provider.plugin and not built_in(provider):
        options.add_provider_for_devices([plugin_devices(provider)[index]], own)
    else:
        fallback = [] if provider.name == CPU else [CPU]
        arguments |= {"providers": [provider.name, *fallback], "provider_options": [own, *({} for _ in fallback)]}
    try:
        return ort.InferenceSession(str(artifact), options, **arguments)
    except Exception as error:  # its errors share no base class
        raise StepError(
            f"onnxruntime {ort.__version__} cannot load it: {error}",
            where=str(artifact),
            fix="rebuild it with `masert export --force`",
        ) from error


def _session_options(provider: Provider, settings: SessionSettings) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[settings.optimization])
    options.intra_op_num_threads = settings.threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Threads that spin after a run slow down whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider.name != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider.device == "directml":
        options.enable_mem_pattern = False  # it supports neither this nor parallel execution
    if saturating_products():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _harmful_optimizers(path: Path) -> list[str]:
    """Return the optimizations of onnxruntime 1.31 that would change a file's result, or crash on it.

    With half scales, WeightBiasQuantization divides a bias by its scale in half, which overflows to infinity, and
    QDQSelectorActionTransformer makes a QLinearConcat that then fails the type check. NchwcTransformer reads the shapes
    of tensors that onnxruntime itself put between half nodes, which have none: a segmentation fault.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        return []  # onnxruntime itself says what is wrong with it
    half = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT16}
    if any(n.op_type == "DequantizeLinear" and n.input[1] in half for n in graph.node):
        return ["WeightBiasQuantization", "QDQSelectorActionTransformer", "NchwcTransformer"]
    return ["NchwcTransformer"] if half else []


def check_provider(asked: str, got: Sequence[str]) -> None:
    """Check that a session runs on the execution provider it was asked for.

    Raises:
        CheckError: it does not.
    """
    if not got or got[0] != asked:
        raise CheckError(
            f"asked for {asked}, got {', '.join(got) or 'nothing'}",
            where="onnxruntime",
            fix="install the libraries it was built for (for CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]'), "
            "or set allow_fallback = true",
        )


def check_assignment(asked: str, counts: Mapping[str, int], *, where: str) -> None:
    """Check that the provider asked for took nodes of the graph; shape computations may stay on the CPU.

    Raises:
        CheckError: it took none.
    """
    if counts and not counts.get(asked):
        others = ", ".join(f"{name}: {count} nodes" for name, count in counts.items())
        raise CheckError(
            f"{asked} took no node of the graph ({others})",
            where=where,
            fix="set allow_fallback = true to run it there all the same",
        )


class OnnxSession(Closing):
    """An ONNX file loaded by onnxruntime.

    Args:
        session: the onnxruntime.InferenceSession.
        device: that it runs on.
        memory: owns the CUDA stream that it computes on, and is freed with it; None where it has one of its own.
    """

    def __init__(self, session: Any, *, device: str, memory: Resources | None = None) -> None:
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        self._session = session
        self._device = device
        self._memory = memory

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run this session, first choice first."""
        return tuple(self._live().get_providers())

    @property
    def assigned(self) -> Mapping[str, int]:
        """How many nodes each provider took; empty on the CPU, where there is only one."""
        return {} if self._device == "cpu" else node_counts(self._live())

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model on one batch. Torch tensors pass through host memory.

        Raises:
            UsageError: the feed does not fit.
            StepError: onnxruntime failed.
        """
        if arrays_fit(feed, self.inputs):
            return self._run(feed)
        feed = with_ids_as_taken(feed, self.inputs, where=OnnxRuntime.name)
        check_feed(feed, self.inputs, where=OnnxRuntime.name)
        return like_feed(self._run({name: to_numpy(value) for name, value in feed.items()}), feed)

    def _run(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        try:
            values = self._live().run(self._names, arrays)
        except Exception as error:
            raise StepError(f"inference failed: {error}", where=OnnxRuntime.name) from error
        return dict(zip(self._names, values, strict=True))

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """Check one batch, and return what infers it from host memory to host memory: onnxruntime's own call."""
        check_feed(feed, self.inputs, where=OnnxRuntime.name)
        return partial(self._live().run, self._names, {name: to_numpy(value) for name, value in feed.items()})

    def bind(self, feed: Mapping[str, Any]) -> Bound:
        """Place one batch, and room for the outputs, on the device."""
        import onnxruntime as ort

        check_feed(feed, self.inputs, where=OnnxRuntime.name)
        session = self._live()
        provider, index = parse_device(self._device)
        kind, index = ("cuda", index) if provider.device in ("cuda", "tensorrt") else ("cpu", 0)
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(to_numpy(value), kind, index))
        for spec in self.outputs:
            binding.bind_output(spec.name, kind, index)
        if self._memory is None:
            return Bound(partial(session.run_with_iobinding, binding), binding.synchronize_outputs)
        from maseRT.runtimes.trt.cuda import bound_to_stream

        queued = ort.RunOptions()
        queued.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return bound_to_stream(lambda: self._live().run_with_iobinding(binding, queued), self._memory, index)

    def close(self) -> None:
        """Free the session, then the stream that it computed on."""
        self._session = None
        if self._memory is not None:
            self._memory.close()

    def _live(self) -> Any:
        if self._session is None:
            raise StepError("the session is closed", where=OnnxRuntime.name)
        return self._session


def _spec(node: Any) -> TensorSpec:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    dtype = _DTYPES.get(kind, kind)
    return TensorSpec(node.name, dtype, tuple(size if isinstance(size, int) else None for size in node.shape))
