"""The order of calls of an ONNX Runtime session on a GPU, with a CUDA and a CUDA provider that only take notes."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("cuda.bindings.runtime")

from device_in_memory import Cuda

from maseRT.errors import CheckError, MissingError, StepError
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.runtimes.trt import cuda as calls


class NotingCuda(Cuda):
    """Notes what happens on the stream."""

    def __init__(self, notes):
        self.notes = notes
        super().__init__()

    def cudaEventRecord(self, event, stream):  # noqa: N802
        self.notes.append(("event", stream))
        return super().cudaEventRecord(event, stream)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        self.notes.append(("wait", int(stream)))
        return super().cudaStreamSynchronize(stream)

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.notes.append(("freed", int(stream)))
        return self._free(stream)


class FakeSession:
    """An InferenceSession whose CUDA provider notes its inferences."""

    def __init__(self, path, options, *, providers, provider_options, notes, got="CUDAExecutionProvider", **_):
        self.notes = notes
        self.stream = int(provider_options[0].get("user_compute_stream", 0))
        self.providers = [got, "CPUExecutionProvider"]
        self._sess = self

    def get_providers(self):
        return self.providers

    def get_provider_graph_assignment_info(self):
        return [SimpleNamespace(ep_name=self.providers[0], get_nodes=lambda: [1, 2])]

    def get_inputs(self):
        return [SimpleNamespace(name="input", type="tensor(float)", shape=["batch", 4])]

    def get_outputs(self):
        return [SimpleNamespace(name="output", type="tensor(float)", shape=["batch", 3])]

    def io_binding(self):
        ignore = SimpleNamespace(bind_ortvalue_input=lambda *a: None, bind_output=lambda *a: None)
        ignore.synchronize_outputs = lambda: self.notes.append(("wait", "onnxruntime"))
        return ignore

    def run_with_iobinding(self, binding, options=None):
        queued = options is not None and options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.notes.append(("queued" if queued else "run", self.stream))


@pytest.fixture
def notes():
    return []


@pytest.fixture
def on_gpu(monkeypatch, notes):
    """Let cuda:0 be there; returns what its provider answers to: {"got": another provider}."""
    device, changed = NotingCuda(notes), {}
    monkeypatch.setattr(calls, "cudart", lambda: device)
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self, device=None: None)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: FakeSession(*a, **{**k, "notes": notes, **changed})
    )
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda array, kind, index: (array, kind, index))
    return SimpleNamespace(device=device, changed=changed)


FEED = {"input": np.zeros((2, 4), np.float32)}


def test_each_inference_but_the_first_is_queued_between_two_events(on_gpu, notes, linear_onnx):
    with OnnxRuntime().open(linear_onnx, "cuda:0") as session:
        bound = session.bind(FEED)
        notes.clear()
        assert bound.device_times(2).ms == [0.25, 0.25]
    (stream,) = {stream for what, stream in notes if what == "queued"}
    assert stream > 0
    one = [("event", stream), ("queued", stream), ("event", stream)]
    untimed = [("wait", stream), ("event", stream), ("queued", stream)]
    assert notes == [*untimed, *one, *one, ("wait", stream), ("freed", stream)]


def test_inferences_back_to_back_are_waited_for_once(on_gpu, notes, linear_onnx):
    with OnnxRuntime().open(linear_onnx, "cuda:0") as session:
        session.bind(FEED).repeat(3)
        assert [what for what, _ in notes] == ["queued"] * 3 + ["wait"]


def test_the_stream_is_freed_after_the_session_and_when_it_cannot_be_opened(on_gpu, linear_onnx):
    session = OnnxRuntime().open(linear_onnx, "cuda:0")
    bound = session.bind(FEED)
    assert on_gpu.device.alive
    session.close()
    assert not on_gpu.device.alive
    with pytest.raises(StepError, match="closed"):
        bound.run()
    on_gpu.changed["got"] = "CPUExecutionProvider"
    with pytest.raises(CheckError, match="asked for CUDAExecutionProvider, got CPUExecutionProvider"):
        OnnxRuntime().open(linear_onnx, "cuda:0")
    assert not on_gpu.device.alive


def test_without_cuda_python_nothing_is_timed_and_the_reason_is_told(on_gpu, linear_onnx, monkeypatch, caplog):
    def missing():
        raise MissingError("cuda-python is not installed", where="CUDA", fix="pip install cuda-python")

    monkeypatch.setattr(calls, "cudart", missing)
    with OnnxRuntime().open(linear_onnx, "cuda:0") as session:
        assert session.bind(FEED).device_times(2) is None
    assert "cuda-python is not installed; pip install cuda-python" in caplog.text
