"""Forms for CPUs of a model whose float layers are FP16."""

import onnx
import pytest
from projects import UNTRAINED, new_project

from maseRT.workspace import read_json

CONFIG = (
    UNTRAINED
    + """
[quantize]
float = "fp16"
[calibrate]
batches = 1
methods = ["max"]
[export]
targets = ["tensorrt", "onnxruntime-cpu", "openvino"]
"""
)

ANALYZE = """
[analyze]
runtimes = [{}]
seconds = 0.0
isolate = false
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = new_project(tmp_path_factory.mktemp("half"), CONFIG)
    project.transform()
    return project


def halves(path):
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = [value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)]
    return onnx.TensorProto.FLOAT16 in [*types, *(tensor.data_type for tensor in graph.initializer)]


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino"])
def test_forms_for_cpus_compute_in_fp32(project, target):
    assert halves(project.workspace.onnx)
    assert not halves(project.workspace.target_onnx(target))
    told = read_json(project.workspace.export, made_by="export")["targets"][target]
    assert told["changes"][0] == "what is FP16 in the exported model is FP32"
    assert told["agreement_with_float"]["disabled"]["sqnr_db"] > 20


def test_a_row_that_the_cpu_has_no_kernels_for_says_so(tmp_path):
    project = new_project(tmp_path, CONFIG + ANALYZE.format('"onnxruntime"'))
    outcomes = project.transform("quantize.float=bf16", "quantize.precision=bf16", 'export.targets=["tensorrt"]')
    assert outcomes["analyze"].status == "done"
    rows = {row["name"]: row["not_run"] for row in read_json(project.workspace.report, made_by="analyze")["rows"]}
    assert rows == {"onnxruntime-fp32": "", "onnxruntime-bf16": "ONNX Runtime's CPU provider has no BF16 kernels"}


def test_a_plan_of_fp32_alone_is_a_result_too(tmp_path):
    project = new_project(tmp_path, CONFIG + ANALYZE.format('"torch", "onnxruntime"'))
    project.transform("quantize.float=fp32", "quantize.precision=fp32", 'export.targets=["tensorrt"]')
    report = read_json(project.workspace.report, made_by="analyze")
    assert {row["name"]: row["role"] for row in report["rows"]} == {
        "torch-fp32": "baseline",
        "onnxruntime-fp32": "deployed",
    }
    assert report["verdict"].startswith("ONNX Runtime FP32 ")


def test_a_row_that_the_cpu_computes_in_fp32_says_so(tmp_path):
    modes = '[onnxruntime]\nmodes = ["qdq"]\ndevice = "cpu"\nbatches = 1\n'
    project = new_project(tmp_path, CONFIG + modes + ANALYZE.format('"onnxruntime"'))
    project.transform("quantize.precision=fp16", 'export.targets=["onnxruntime-cpu"]')
    rows = read_json(project.workspace.report, made_by="analyze")["rows"]
    assert {row["name"]: row["precision"] for row in rows} == {
        "onnxruntime-fp32": "fp32",
        "onnxruntime-fp16": "fp32",
        "onnxruntime-qdq": "fp32",
    }
