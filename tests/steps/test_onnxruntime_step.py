"""The onnxruntime step on a small finished run: its models, its device, and what it tells about them."""

import json

import numpy as np
import onnx
import pytest
from projects import CONFIG, new_project

from maseRT.errors import ConfigError, ExitCode, MissingError, StepError
from maseRT.onnxrt import providers
from maseRT.onnxrt.kernels import count_kernels
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps import onnxruntime as step

MODES = ("optimized", "static", "dynamic", "auto-mixed", "qdq")
SECTION = f"""
[onnxruntime]
modes = {list(MODES)}
device = "cpu"
batches = 1
"""
WITH_MODES = CONFIG.replace("[export]", '[export]\ntargets = ["onnxruntime-cpu", "openvino"]') + SECTION
WITH_MODES = WITH_MODES.replace('"torch", "onnxruntime", "tensorrt"', '"torch", "onnxruntime"')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with every mode."""
    project = new_project(tmp_path_factory.mktemp("onnxrt") / "project", WITH_MODES)
    return project, project.transform()


def logits(path, x):
    with OnnxRuntime().open(path, threads=1) as session:
        return session.infer({"input": x})["output"]


def test_every_mode_leaves_a_model_and_its_sidecar_in_its_own_folder(made):
    project, outcomes = made
    root = project.folder / "out" / "onnxrt" / "digits"
    folders = {"optimized", "pre_processed", "static_quantized", "dynamic_quantized", "auto_mixed", "qdq"}
    assert folders <= {path.name for path in root.iterdir()}
    assert outcomes["onnxruntime"].status == "done"
    for mode in MODES:
        sidecar = json.loads(project.workspace.onnxrt_sidecar(mode).read_text())
        assert sidecar["mode"] == mode
        assert sidecar["device"] == "cpu"
        assert sidecar["bytes"] == project.workspace.onnxrt_model(mode).stat().st_size
        assert sidecar["agreement_with_fp32"]["samples"] > 0


def test_the_modes_are_what_they_say(made):
    project, _ = made
    kernels = {mode: json.loads(project.workspace.onnxrt_sidecar(mode).read_text())["kernels"] for mode in MODES}
    assert kernels["optimized"]["integer_convolutions"] == 0
    assert kernels["static"]["integer_convolutions"] == kernels["qdq"]["integer_convolutions"] == 3
    assert kernels["static"]["float_convolutions"] == kernels["qdq"]["float_convolutions"] == 0
    assert kernels["dynamic"]["integer_products"] == 2
    types = {tensor.data_type for tensor in onnx.load(project.workspace.onnxrt_model("auto-mixed")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


def test_the_modes_agree_with_the_model_they_are_made_from(made):
    project, _ = made
    x = np.random.default_rng(0).uniform(0, 1, (32, 1, 8, 8)).astype(np.float32)
    expected = logits(project.workspace.float_onnx, x)
    for mode, tolerance in (("optimized", 1e-5), ("auto-mixed", 0.02), ("dynamic", 0.05), ("static", 0.1)):
        found = logits(project.workspace.onnxrt_model(mode), x)
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max(), mode
    quantized = logits(project.workspace.onnx, x)
    found = logits(project.workspace.onnxrt_model("qdq"), x)
    assert np.abs(found - quantized).max() < 0.1 * np.abs(quantized).max()


def test_every_target_gets_its_file(made):
    project, outcomes = made
    told = outcomes["export"].summary["targets"]
    assert set(told) == {"onnxruntime-cpu", "openvino"}
    cpu = onnx.load(project.workspace.target_onnx("onnxruntime-cpu"))
    openvino = onnx.load(project.workspace.target_onnx("openvino"))
    symmetric = onnx.load(project.workspace.target_onnx("tensorrt"))
    assert _types(cpu) == {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    assert _types(openvino) == {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    assert _types(symmetric) == {onnx.TensorProto.INT8}
    assert told["onnxruntime-cpu"]["changes"]
    assert told["openvino"]["changes"]


def _rounded_to(model):
    """The types that activations are rounded to."""
    return _types(model, ("QuantizeLinear",))


def _types(model, operators=("QuantizeLinear", "DequantizeLinear")):
    """The types of the zero points."""
    initializers = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes = (node for node in model.graph.node if node.op_type in operators)
    return {initializers[node.input[2]] for node in nodes} - {onnx.TensorProto.INT32}


def test_the_report_has_a_row_for_every_mode_with_its_kernels(made):
    _, outcomes = made
    rows = {row["name"]: row for row in outcomes["analyze"].summary["rows"]}
    for mode in MODES:
        assert rows[f"onnxruntime-{mode}"]["provider"]["kernels"]["operators"]
    assert rows["onnxruntime-qdq"]["provider"]["kernels"]["integer_convolutions"] == 3
    assert rows["onnxruntime-int8"]["provider"]["kernels"]["integer_convolutions"] == 3
    assert rows["onnxruntime-fp32"]["provider"]["kernels"]["integer_convolutions"] == 0
    assert "provider" not in rows["torch-fp32"]


def test_a_second_run_does_nothing_and_a_changed_section_does(made):
    project, _ = made
    again = project.transform(first="export", last="onnxruntime")
    assert again["onnxruntime"].status == "cached"
    preview = project.run("onnxruntime.calibrator=entropy").preview(first="onnxruntime", last="onnxruntime")
    assert "calibrator" in preview[0].why


def test_a_damaged_model_is_noticed_outside_the_runs_folder(made):
    project, _ = made
    path = project.workspace.onnxrt_model("qdq")
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    try:
        with pytest.raises(StepError, match="masert onnxruntime"):
            project.single("analyze")
        preview = project.run().preview(first="onnxruntime", last="onnxruntime")
        assert "changed or damaged" in preview[0].why
    finally:
        path.write_bytes(content)


def test_a_device_that_is_not_here_ends_with_exit_code_3(made):
    project, _ = made
    with pytest.raises(MissingError, match="MIGraphXExecutionProvider") as caught:
        project.single("onnxruntime", "onnxruntime.device=migraphx")
    assert caught.value.exit_code is ExitCode.MISSING
    project.transform(first="onnxruntime", last="onnxruntime")


def test_without_openvino_auto_is_the_cpu_and_says_why(made, monkeypatch):
    project, _ = made
    monkeypatch.setattr(providers, "find_spec", lambda name: None if name == "onnxruntime_ep_openvino" else object())
    outcome = project.single("onnxruntime", "onnxruntime.device=auto", 'onnxruntime.modes=["optimized"]')
    assert outcome.summary["device"] == "cpu"
    assert "pip install onnxruntime-ep-openvino" in outcome.summary["device_chosen"]


@pytest.mark.parametrize(
    ("times", "best"), [({"cpu": 3.0, "openvino": 1.0}, "openvino"), ({"cpu": 1, "openvino": 2}, "cpu")]
)
def test_auto_keeps_the_faster_of_cpu_and_openvino(made, monkeypatch, times, best):
    """Both run on the CPU provider here: what is tested is the choice, and the form that each of them gets."""
    project, _ = made
    opened = []
    original = OnnxRuntime.open

    def open_on_cpu(self, artifact, device="cpu", **options):
        if artifact.name.startswith("probe"):
            opened.append(
                (device, count_kernels(onnx.load(artifact)).operators["Conv"], _rounded_to(onnx.load(artifact)))
            )
        return original(self, artifact, "cpu", threads=1)

    clock = iter(times.values())
    monkeypatch.setattr(step, "why_unavailable", lambda device: None)
    monkeypatch.setattr(step, "kernels_of", lambda path, device, settings: None)
    monkeypatch.setattr(OnnxRuntime, "open", open_on_cpu)
    monkeypatch.setattr(step, "_milliseconds", lambda call: next(clock))
    outcome = project.single("onnxruntime", "onnxruntime.device=auto", 'onnxruntime.modes=["qdq"]', force=True)
    assert outcome.summary["device"] == best
    assert f"openvino {times['openvino']:.2f} ms" in outcome.summary["device_chosen"]
    assert outcome.summary["modes"]["qdq"]["form"] == ("openvino" if best == "openvino" else "onnxruntime-cpu")
    assert [device for device, _, _ in opened] == ["cpu", "openvino"]
    assert opened[0][2] == {onnx.TensorProto.UINT8}
    assert opened[1][2] == {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    assert not list(project.workspace.onnxrt_cache.glob("probe*"))


def test_the_section_needs_an_export(tmp_path):
    config = CONFIG.replace("[export]\n", "") + SECTION
    with pytest.raises(ConfigError, match=r"\[onnxruntime\] needs \[export\]"):
        new_project(tmp_path / "p", config).run()
