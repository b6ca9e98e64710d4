"""explain --against: an INT8 run beside a float one, from the files that the two have left."""

import json

import pytest

from maseRT.config import Config
from maseRT.errors import StepError, UsageError
from maseRT.plan import LayerPlan, Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.receipt import Kernel, LayerReceipt, Receipt, Verdict
from maseRT.records import sha256
from maseRT.steps.explain import explain
from maseRT.workspace import Workspace, write_json

CONFIG = Config.model_validate(
    {"model": {"name": "digits-cnn", "random_weights": True}, "data": {"name": "digits"}, "quantize": {}}
)


def run_of(folder, name, precision, times):
    """Leave a run whose layers each have one kernel."""
    workspace = Workspace(folder, name)
    spec = QuantSpec() if precision is Precision.INT8 else None
    layers = tuple(LayerPlan(each, "Conv2d", precision, spec, spec, "default") for each in times)
    write_json(workspace.plan, Plan("net", Precision.FP16, "tensorrt", "native", layers).to_json())
    workspace.onnx.parent.mkdir(parents=True)
    workspace.onnx.write_bytes(b"onnx")
    digest = sha256(workspace.onnx)
    kernels = tuple(Kernel(f"k-{each}", each, "", "", str(precision), (), (), False) for each in times)
    asked = tuple(LayerReceipt(each, "Conv2d", precision, precision, precision, Verdict.AS_ASKED) for each in times)
    write_json(workspace.receipt, Receipt("tensorrt", "8.6.1", "9.0", digest, "inspector", asked, kernels).to_json())
    write_json(workspace.kernel_times, {"onnx_sha256": digest, "ms": {f"k-{n}": ms for n, ms in times.items()}})
    return workspace


@pytest.fixture
def runs(tmp_path):
    int8 = run_of(tmp_path, "int8", Precision.INT8, {"conv1": 0.1, "conv2": 0.4})
    return int8, run_of(tmp_path, "fp16", Precision.FP16, {"conv1": 0.2, "conv2": 0.2})


def test_the_slower_layer_and_its_rule_are_told(runs):
    found = explain(CONFIG, runs[0], against=runs[1])
    assert "slower than in float: conv2 0.4000 ms (0.2000 in float)" in found.remarks[-1]
    assert '{ name = "conv2", precision = "fp16" },' in found.remarks[-1]
    assert json.loads(json.dumps(found.summary))["blame"]["predicted_ms"] == pytest.approx(0.3)
    assert "blame" not in explain(CONFIG, runs[0]).summary


def test_a_run_without_times_or_engine_is_refused(runs, tmp_path):
    runs[1].kernel_times.unlink()
    with pytest.raises(UsageError, match="float engine were not timed"):
        explain(CONFIG, runs[0], against=runs[1])
    with pytest.raises(StepError, match="missing"):
        explain(CONFIG, runs[0], against=Workspace(tmp_path, "none"))
