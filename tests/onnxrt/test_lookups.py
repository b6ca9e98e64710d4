"""INT8 tables of embeddings in the form for ONNX Runtime: rows are taken first, and dequantized then."""

import numpy as np
import onnx
import pytest
import torch
from exported import Exported
from onnx import TensorProto
from torch import nn

from maseRT.errors import UsageError
from maseRT.runtimes.onnxruntime import OnnxRuntime

WORDS, WIDTH = 500, 64


class Tied(nn.Module):
    """Two lookups in one table, which the last layer shares where it is tied."""

    def __init__(self, *, tied):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids).mean(1)).relu() + self.embed(ids[:, 0]))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    ids = torch.randint(0, WORDS, (24, 10))
    rules = [{"type": "Embedding", "precision": "int8"}, {"type": "Linear", "precision": "int8"}]
    folder = tmp_path_factory.mktemp("tied")
    return Exported(folder, Tied(tied=request.param).eval(), (), inputs=ids, rules=rules)


def constants(path, kind):
    return {tuple(each.dims) for each in onnx.load(path).graph.initializer if each.data_type == kind}


def test_the_table_is_stored_as_int8_and_never_dequantized_as_a_whole(exported):
    path, form = exported.cpu()
    assert (WORDS, WIDTH) in constants(path, TensorProto.INT8)
    assert (WORDS, WIDTH) not in constants(path, TensorProto.FLOAT)
    graph = onnx.load(path).graph
    tables = {each.name for each in graph.initializer if each.data_type == TensorProto.INT8}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    assert len(lookups) == 2
    readers = [node.op_type for node in graph.node if {each.output[0] for each in lookups} & {*node.input}]
    assert readers == ["DequantizeLinear", "DequantizeLinear"]
    assert form.int8_weights == 3
    assert form.rounded_weights == 0


def test_it_computes_what_the_exported_model_does(exported):
    path, _ = exported.cpu()
    found, expected = exported.infer(path), exported.quantized
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert np.linalg.norm(found - exported.float) < 0.05 * np.linalg.norm(exported.float)


def test_the_other_forms_hold_the_table_too(exported):
    path, _ = exported.openvino()
    assert (WORDS, WIDTH) in constants(path, TensorProto.INT8)
    np.testing.assert_allclose(exported.infer(path), exported.quantized, atol=0.1)


def test_a_file_of_int64_ids_takes_int32_too(exported):
    path, _ = exported.cpu()
    ids = exported.inputs.numpy()
    with OnnxRuntime().open(path, threads=1) as session:
        assert session.inputs[0].dtype == "int64"
        np.testing.assert_array_equal(session.infer({"input": ids.astype("int32")})["output"], exported.infer(path))
        with pytest.raises(UsageError, match="'input' is float32, not int64"):
            session.infer({"input": ids.astype("float32")})
