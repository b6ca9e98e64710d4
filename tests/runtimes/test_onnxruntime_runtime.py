import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from maseRT.errors import CheckError, ExitCode, MissingError, StepError, UsageError
from maseRT.onnxrt import providers
from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.onnxruntime import OnnxRuntime, check_provider


def expected(x):
    return np.maximum(x @ (np.arange(12, dtype=np.float32).reshape(4, 3) - 5), 0)


def test_any_batch_runs(linear_onnx):
    with OnnxRuntime().open(linear_onnx) as session:
        assert session.inputs == (TensorSpec("input", "float32", (None, 4)),)
        assert [spec.name for spec in session.outputs] == ["output"]
        assert session.providers == ("CPUExecutionProvider",)
        for batch in (1, 7, 2):
            x = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
            np.testing.assert_allclose(session.infer({"input": x})["output"], expected(x), rtol=1e-6)


def test_tensors_give_tensors(linear_onnx):
    with OnnxRuntime().open(linear_onnx) as session:
        output = session.infer({"input": torch.ones(2, 4)})["output"]
    assert isinstance(output, torch.Tensor)
    np.testing.assert_allclose(output.numpy(), expected(np.ones((2, 4), np.float32)))


def test_a_mixed_precision_export_runs_the_same_with_and_without_optimizations(mixed_onnx):
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    outputs = []
    for level in ("disabled", "basic", "extended", "all"):
        with OnnxRuntime().open(mixed_onnx, threads=1, optimization=level) as session:
            outputs.append(session.infer({"input": x})["output"])
    for output in outputs:
        np.testing.assert_allclose(output, outputs[0], atol=0.05)


def test_the_optimization_level_reaches_the_session(linear_onnx, monkeypatch):
    seen = []
    create = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: (seen.append(a[1]), create(*a, **k))[1])
    OnnxRuntime().open(linear_onnx, threads=2, optimization="disabled").close()
    assert seen[0].graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert seen[0].intra_op_num_threads == 2


def test_a_prepared_batch_is_inferred_from_host_memory_each_time(linear_onnx):
    x = np.zeros((2, 4), np.float32)
    with OnnxRuntime().open(linear_onnx) as session:
        call = session.prepare({"input": x})
        for value in (1, 2):
            x[:] = value
            (output,) = call()
            np.testing.assert_array_equal(output, session.infer({"input": x})["output"])
        with pytest.raises(UsageError, match="float16, not float32"):
            session.prepare({"input": x.astype(np.float16)})


def test_a_bound_batch_runs_without_copies(linear_onnx):
    with OnnxRuntime().open(linear_onnx) as session:
        bound = session.bind({"input": np.ones((2, 4), np.float32)})
        bound.run()
        assert bound.device_times(1) is None


def test_wrong_feeds_are_refused(linear_onnx):
    with OnnxRuntime().open(linear_onnx) as session:
        with pytest.raises(UsageError, match=r"shape \[2, 5\], not \[any, 4\]"):
            session.infer({"input": np.ones((2, 5), np.float32)})
        with pytest.raises(UsageError, match="float16, not float32"):
            session.infer({"input": np.ones((2, 4), np.float16)})


def test_a_closed_session_says_so(linear_onnx):
    session = OnnxRuntime().open(linear_onnx)
    session.close()
    with pytest.raises(StepError, match="closed"):
        session.infer({"input": np.ones((2, 4), np.float32)})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StepError, match=r"nothing\.onnx: no such ONNX file"):
        OnnxRuntime().open(tmp_path / "nothing.onnx")


def test_a_damaged_file_is_named(linear_onnx):
    linear_onnx.write_bytes(linear_onnx.read_bytes()[:100])
    with pytest.raises(StepError, match=r"model\.onnx: onnxruntime .* cannot load it"):
        OnnxRuntime().open(linear_onnx)


def test_a_missing_package_says_what_to_install(linear_onnx, monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    assert "pip install onnxruntime" in OnnxRuntime().missing()
    with pytest.raises(MissingError, match="pip install onnxruntime"):
        OnnxRuntime().open(linear_onnx)


def test_a_gpu_without_a_cuda_provider_is_missing(linear_onnx, monkeypatch):
    monkeypatch.setattr(providers, "why_no_gpu", lambda index: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingError, match="has no CUDAExecutionProvider"):
        OnnxRuntime().open(linear_onnx, "cuda:0")


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it would not be replaced")
def test_a_silently_replaced_provider_is_an_error(linear_onnx, monkeypatch):
    """onnxruntime itself drops the CUDA provider here, with a warning, and goes on with the CPU's."""
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self, device=None: None)
    with pytest.raises(CheckError, match="asked for CUDAExecutionProvider, got CPUExecutionProvider") as caught:
        OnnxRuntime().open(linear_onnx, "cuda:0")
    assert caught.value.exit_code is ExitCode.CHECK


def test_no_provider_at_all_is_an_error():
    with pytest.raises(CheckError, match="got nothing"):
        check_provider("CPUExecutionProvider", [])


def test_the_package_is_imported_only_to_run():
    code = "import sys; from maseRT.runtimes.onnxruntime import OnnxRuntime; OnnxRuntime().missing();"
    subprocess.run([sys.executable, "-c", f"{code} sys.exit('onnxruntime' in sys.modules)"], check=True)


def test_a_large_bias_survives_half_precision_quantization(onnx_file):
    """onnxruntime's own quantization of biases overflows in half: 60 / (0.001 * 0.01) is beyond 65504."""
    one, scale, weight_scale = np.zeros((), np.int8), np.float16(0.001), np.float16(0.01)
    constants = {
        "zero": one,
        "s": np.array(scale),
        "ws": np.array(weight_scale),
        "ys": np.array(np.float16(1)),
        "w": np.full((2, 1, 1, 1), 3, np.int8),
        "bias": np.array([60, -60], np.float16),
    }
    nodes = [
        ("Cast", ["input"], "half", "conv", {"to": 10}),
        ("QuantizeLinear", ["half", "s", "zero"], "q", "conv", {}),
        ("DequantizeLinear", ["q", "s", "zero"], "x", "conv", {}),
        ("DequantizeLinear", ["w", "ws", "zero"], "dw", "conv", {}),
        ("Conv", ["x", "dw", "bias"], "y", "conv", {}),
        ("QuantizeLinear", ["y", "ys", "zero"], "yq", "act", {}),
        ("DequantizeLinear", ["yq", "ys", "zero"], "dy", "act", {}),
        ("Cast", ["dy"], "output", "act", {"to": 1}),
    ]
    path = onnx_file(nodes, shape=("batch", 1, 1, 1), constants=constants)
    for level in ("disabled", "all"):
        with OnnxRuntime().open(path, optimization=level) as session:
            output = session.infer({"input": np.full((1, 1, 1, 1), 0.1, np.float32)})["output"]
        np.testing.assert_allclose(output.ravel(), [60, -60], rtol=1e-2)
