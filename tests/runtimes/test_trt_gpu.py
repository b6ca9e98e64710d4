"""Engines on a real GPU: built, inspected and run with the library that is here."""

import gc
import json

import numpy as np
import pytest
import torch

from maseRT.errors import CheckError, StepError
from maseRT.runtimes import get_compiler, get_runtime
from maseRT.runtimes.base import BatchRange, BuildOptions
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.runtimes.trt.layers import executed
from maseRT.runtimes.trt.sidecar import sidecar_path


def _library():
    for name in ("tensorrt", "tensorrt-rtx"):
        if get_runtime(name).missing() is None and get_compiler(name).missing() is None:
            return name
    return None


LIBRARY = _library()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(LIBRARY is None, reason="no library runs engines here"),
]


def _build(onnx, path, **options):
    info = get_compiler(LIBRARY).build(onnx, path, BuildOptions(batch=BatchRange(1, 4, 8), **options))
    sidecar_path(path).write_text(json.dumps(info.to_json()))
    return info


@pytest.fixture(scope="module")
def built(mixed_onnx, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "mixed.trt"
    return path, _build(mixed_onnx, path)


@pytest.fixture
def session(built):
    with get_runtime(LIBRARY).open(built[0], "cuda:0") as session:
        yield session


@pytest.fixture(scope="module")
def reference(mixed_onnx):
    with OnnxRuntime().open(mixed_onnx, "cpu", optimization="disabled") as session:
        yield lambda x: session.infer({"input": x})["output"]


def batch(size, seed=0):
    return np.random.default_rng(seed).normal(size=(size, 1, 8, 8)).astype(np.float32)


def test_the_engine_agrees_with_onnx_runtime(session, reference):
    for seed, size in enumerate((8, 8, 8, 3, 1, 8)):  # as it is, captured, replayed, other shapes
        x = batch(size, seed)
        np.testing.assert_allclose(session.infer({"input": x})["output"], reference(x), atol=0.05)


def test_each_layer_runs_in_the_precision_of_the_file(built):
    layers = built[1].layers
    assert layers
    found = {name: executed(layers, name) for name in ("stem", "body", "halved", "full", "head")}
    assert found == {"stem": "int8", "body": "int8", "halved": "fp16", "full": "fp32", "head": "fp32"}


def test_tensors_stay_on_the_gpu(session, reference):
    x = batch(5)
    output = session.infer({"input": torch.from_numpy(x).cuda()})["output"]
    assert output.is_cuda
    np.testing.assert_allclose(output.cpu().numpy(), reference(x), atol=0.05)


def test_tensors_of_any_stream_and_arrays_take_turns(session, reference):
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    done = []
    for seed in range(24):
        x = batch(8 if seed < 18 else 5, seed)
        with torch.cuda.stream(streams[seed % 3]):
            torch.mm(busy, busy)  # so that the input is there late
            y = torch.from_numpy(x).pin_memory().cuda(non_blocking=True)
            done.append((session.infer({"input": y})["output"], x))
        if seed % 5 == 4:
            np.testing.assert_allclose(session.infer({"input": x})["output"], reference(x), atol=0.05)
    torch.cuda.synchronize()
    for output, x in done:
        np.testing.assert_allclose(output.cpu().numpy(), reference(x), atol=0.05)


def test_a_fixed_batch_takes_a_short_one(mixed_onnx, reference, tmp_path):
    path = tmp_path / "fixed.trt"
    options = BuildOptions(batch=BatchRange(8, 8, 8))
    info = get_compiler(LIBRARY).build(mixed_onnx, path, options)
    sidecar_path(path).write_text(json.dumps(info.to_json()))
    with get_runtime(LIBRARY).open(path, "cuda:0") as session:
        for size in (8, 3):
            x = batch(size)
            np.testing.assert_allclose(session.infer({"input": x})["output"], reference(x), atol=0.05)


def test_a_bound_batch_is_timed_by_the_device(session):
    times = session.bind({"input": batch(8)}).device_times(50)
    assert len(times.ms) == 50
    assert min(times.ms) > 0
    assert 0 <= times.waited <= 50


def test_memory_is_flat_and_given_back(built):
    def used():
        free, total = torch.cuda.mem_get_info(0)
        return total - free

    x = batch(8)
    with get_runtime(LIBRARY).open(built[0], "cuda:0") as session:
        session.infer({"input": x})
        before = used()
        for _ in range(10_000):
            session.infer({"input": x})
        assert used() == before
    gc.collect()
    assert used() <= before


def test_another_gpus_engine_is_refused(built, tmp_path):
    path = tmp_path / "model.trt"
    path.write_bytes(built[0].read_bytes())
    sidecar_path(path).write_text(json.dumps({**built[1].to_json(), "target": "1.0"}))
    with pytest.raises(CheckError, match=r"built for compute capability 1\.0"):
        get_runtime(LIBRARY).open(path, "cuda:0")


def test_rubbish_that_is_trusted_does_not_load(tmp_path):
    path = tmp_path / "model.trt"
    path.write_bytes(b"rubbish" * 100)
    with pytest.raises(StepError, match="cannot load it"):
        get_runtime(LIBRARY).open(path, "cuda:0", trust=True)


def test_the_timing_cache_is_reused_and_a_broken_one_replaced(mixed_onnx, tmp_path):
    caches = tmp_path / "timing"
    if get_compiler(LIBRARY).flavour.ahead_of_time:
        pytest.skip("times nothing")
    _build(mixed_onnx, tmp_path / "a.trt", timing_caches=caches)
    notes = _build(mixed_onnx, tmp_path / "b.trt", timing_caches=caches).notes
    assert not any("was replaced" in note for note in notes)
    (cache,) = caches.iterdir()
    cache.write_bytes(b"rubbish")
    notes = _build(mixed_onnx, tmp_path / "c.trt", timing_caches=caches).notes
    assert any("was replaced" in note for note in notes)
