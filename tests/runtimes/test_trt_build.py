"""Real engines, built ahead of time by tensorrt-rtx."""

import hashlib
import json
import logging

import numpy as np
import pytest
import tensorrt_rtx

from maseRT.errors import ExitCode, MissingError, StepError, UsageError
from maseRT.hardware import Gpu
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions, EngineInfo, ShapeRange
from maseRT.runtimes.tensorrt import FLAVOUR as TENSORRT
from maseRT.runtimes.tensorrt_rtx import FLAVOUR as RTX
from maseRT.runtimes.trt import build as module
from maseRT.runtimes.trt import flavour
from maseRT.runtimes.trt.build import target_capability
from maseRT.runtimes.trt.log import logger_for, make
from maseRT.runtimes.trt.timing import TimingCache

BATCH = BatchRange(1, 4, 8)


@pytest.fixture
def build(tmp_path):
    def build(onnx, **options):
        options = BuildOptions(**{"batch": BATCH, "compute_capability": "8.9", **options})
        return get_compiler("tensorrt-rtx").build(onnx, tmp_path / "model.trt", options)

    return build


def test_an_engine_and_what_is_said_about_it(mixed_onnx, mixed_engine):
    path, info = mixed_engine
    content = path.read_bytes()
    assert (info.runtime, info.version, info.target) == ("tensorrt-rtx", tensorrt_rtx.__version__, "8.9")
    assert info.gpu is None
    assert info.profiles == ({"input": ShapeRange((1, 1, 8, 8), (4, 1, 8, 8), (8, 1, 8, 8))},)
    assert info.onnx_sha256 == hashlib.sha256(mixed_onnx.read_bytes()).hexdigest()
    assert info.engine_sha256 == hashlib.sha256(content).hexdigest()
    assert info.bytes == len(content) > 1000
    assert info.seconds > 0
    assert info.layers_from == "build log"


def test_the_sidecar_gives_back_the_same_info(mixed_engine):
    info = mixed_engine[1]
    assert EngineInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_another_target_gives_another_engine(linear_onnx, build):
    first, second = build(linear_onnx), build(linear_onnx, compute_capability="12.0")
    assert (first.target, second.target) == ("8.9", "12.0")
    assert first.engine_sha256 != second.engine_sha256


def test_the_default_target_is_said(linear_onnx, build):
    info = build(linear_onnx, compute_capability=None)
    assert info.target == "8.9"
    assert any("compute_capability" in note for note in info.notes)


def test_a_target_that_the_library_lacks_lists_those_it_has(linear_onnx, build):
    with pytest.raises(UsageError, match=r"cannot build for compute capability 9\.0") as caught:
        build(linear_onnx, compute_capability="9.0")
    assert "7.5" in caught.value.fix
    assert "12.0" in caught.value.fix


def test_build_options_are_taken(linear_onnx, build):
    assert build(linear_onnx, workspace_mb=64, optimization_level=1, tf32=False, max_threads=1).bytes > 1000


def test_several_profiles(linear_onnx, build):
    profiles = ({"input": ShapeRange((1, 4), (1, 4), (1, 4))}, {"input": ShapeRange((2, 4), (8, 4), (16, 4))})
    info = build(linear_onnx, profiles=profiles)
    assert info.profiles == profiles
    assert EngineInfo.from_json(json.loads(json.dumps(info.to_json()))).profiles == profiles


def test_other_dynamic_dimensions_need_a_profile(onnx_file, build):
    onnx = onnx_file([("Relu", ["input"], "output", "act", {})], shape=("batch", 4, "width"))
    with pytest.raises(UsageError, match="other dynamic dimensions than the batch"):
        build(onnx)
    width = {"input": ShapeRange((1, 4, 1), (2, 4, 8), (4, 4, 16))}
    assert build(onnx, profiles=(width,)).profiles == (width,)


def test_profiles_that_name_other_inputs_are_refused(linear_onnx, build):
    with pytest.raises(UsageError, match=r"names \['x'\]; dynamic are \['input'\]"):
        build(linear_onnx, profiles=({"x": ShapeRange((1,), (1,), (1,))},))


def test_a_profile_out_of_order_is_refused(linear_onnx, build):
    with pytest.raises(UsageError, match="profile 0 is not valid"):
        build(linear_onnx, profiles=({"input": ShapeRange((8, 4), (4, 4), (4, 4))},))


def test_a_fixed_batch_is_built_as_it_is(onnx_file, build):
    onnx = onnx_file([("Relu", ["input"], "output", "act", {})], shape=(4, 4))
    assert build(onnx).profiles == ()
    with pytest.raises(UsageError, match="fixed batch 4, outside of 8 to 8"):
        build(onnx, batch=BatchRange(8, 8, 8))


def test_nodes_that_cannot_be_parsed_are_named_with_their_layer(onnx_file, build):
    onnx = onnx_file([("Det", ["input"], "output", "encoder.norm", {})], shape=("batch", 4, 4))
    with pytest.raises(StepError) as caught:
        build(onnx)
    assert "node_output (Det) of layer encoder.norm: UNSUPPORTED_NODE" in caught.value.what
    assert caught.value.where == str(onnx)


def test_a_lower_opset_is_offered_where_it_writes_the_node_otherwise(onnx_file, build):
    """Gelu came with opset 20; a Gelu that cannot be parsed is written in plain operators at 19."""
    nodes = [("Gelu", ["input"], "output", "mlp.act", {"approximate": "nonsense"})]
    with pytest.raises(StepError, match=r"Gelu\) of layer mlp\.act") as caught:
        build(onnx_file(nodes))
    assert "[export] opset = 19" in caught.value.fix


def test_a_graph_that_does_not_fit_together_gives_the_reason(onnx_file, build):
    weight = np.ones((5, 3), np.float32)
    with pytest.raises(
        StepError, match=r"(?s)MatMul\) of layer head: INVALID_NODE.*last dimension of input0 = 4"
    ) as caught:
        build(onnx_file([("MatMul", ["input", "w"], "output", "head", {})], constants={"w": weight}))
    assert caught.value.exit_code is ExitCode.FAILED


@pytest.mark.parametrize("content", [b"", b"garbage " * 9], ids=["empty", "garbage"])
def test_a_damaged_file_is_named(tmp_path, build, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(StepError, match=r"model\.onnx: damaged"):
        build(tmp_path / "model.onnx")


def test_a_missing_file_is_named(tmp_path, build):
    with pytest.raises(StepError, match=r"nothing\.onnx: cannot read: No such file"):
        build(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_what_the_library_cannot_do_is_not_ignored(linear_onnx, build, option, tmp_path):
    with pytest.raises((UsageError, StepError), match=option):
        build(linear_onnx, **{option: True})
    assert not (tmp_path / "model.trt").exists()


def test_nothing_is_built_without_the_library(linear_onnx, build, monkeypatch):
    monkeypatch.setattr(flavour, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install tensorrt-rtx"):
        build(linear_onnx)


def test_the_librarys_log_goes_to_pythons(linear_onnx, build, caplog):
    with caplog.at_level(logging.DEBUG, logger="maseRT.tensorrt_rtx"):
        build(linear_onnx)
    levels = {record.levelno for record in caplog.records if record.name == "maseRT.tensorrt_rtx"}
    assert {logging.DEBUG, logging.INFO} <= levels
    assert any(record.message.startswith("Layers:") for record in caplog.records)


H200 = Gpu(0, "NVIDIA H200", "9.0", 143771, "GPU-0")
L4 = Gpu(0, "NVIDIA L4", "8.9", 23034, "GPU-1")


@pytest.mark.parametrize(
    ("library", "gpu", "asked", "target"),
    [
        (TENSORRT, H200, None, "9.0"),
        (TENSORRT, H200, "9.0", "9.0"),
        (RTX, H200, None, "8.9"),  # runs on no such GPU: the default
        (RTX, Gpu(0, "NVIDIA A2", "8.6", 15356, "GPU-2"), None, "8.6"),
        (RTX, L4, "12.0", "12.0"),
    ],
)
def test_the_target_is_the_one_asked_for_or_this_gpu(monkeypatch, library, gpu, asked, target):
    monkeypatch.setattr(module, "nvidia_gpus", lambda: (gpu,))
    assert target_capability(library, BuildOptions(compute_capability=asked))[0] == target


def test_tensorrt_builds_for_no_other_gpu(monkeypatch):
    monkeypatch.setattr(module, "nvidia_gpus", lambda: (H200,))
    with pytest.raises(UsageError, match=r"builds for the GPU it runs on \(9\.0\), not for 8\.9"):
        target_capability(TENSORRT, BuildOptions(compute_capability="8.9"))


@pytest.mark.filterwarnings("ignore:Use Deprecated")
def test_a_broken_timing_cache_is_replaced_with_a_word(tmp_path):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"rubbish")
    config = tensorrt_rtx.Builder(logger_for(tensorrt_rtx)).create_builder_config()
    (note,) = TimingCache(tensorrt_rtx, config, path).save()
    assert note.startswith("the timing cache timing.cache did not fit and was replaced: ")
    assert path.read_bytes() != b"rubbish"


@pytest.mark.filterwarnings("ignore:Use Deprecated")
def test_a_first_timing_cache_needs_no_word(tmp_path):
    path = tmp_path / "new" / "timing.cache"
    config = tensorrt_rtx.Builder(logger_for(tensorrt_rtx)).create_builder_config()
    assert TimingCache(tensorrt_rtx, config, path).save() == []
    assert path.stat().st_size > 0


def test_a_build_is_tried_again_with_less_where_no_kernel_obeys(monkeypatch, linear_onnx, build, caplog):
    class Refusing:
        """A builder that finds no kernel at first."""

        def __init__(self, builder):
            self.builder = builder
            self.calls = 0

        def __getattr__(self, name):
            return getattr(self.builder, name)

        def build_serialized_network(self, network, config):
            self.calls += 1
            if self.calls > 1:
                return self.builder.build_serialized_network(network, config)
            logger_for(tensorrt_rtx).log(tensorrt_rtx.ILogger.Severity.ERROR, "could not find any implementation")
            return None

    class Weak:
        def __init__(self, *network):
            self.notes = []

        def relax(self, heard):
            self.notes.append("a type was given up")
            return heard.errors == ["could not find any implementation"]

    builder = Refusing(make(tensorrt_rtx, "Builder"))
    monkeypatch.setattr(module, "_builder", lambda trt, device: builder)
    monkeypatch.setattr(module, "types_strongly", lambda trt: False)
    monkeypatch.setattr(module, "WeakTypes", Weak)
    assert "a type was given up" in build(linear_onnx).notes
    assert builder.calls == 2
    assert "a type was given up" in caplog.text
