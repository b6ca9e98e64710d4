"""Runs whose model reads token ids: digits as 16 words of a vocabulary of 256, one for each patch and place."""

import json

import numpy as np
import onnx
import pytest
from projects import Project, new_project, working_in
from sklearn.datasets import load_digits

from maseRT.errors import UsageError
from maseRT.onnxrt.kernels import count_kernels

CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "own:transformer"
[data]
name = "own:data"
batch_size = 64
[train]
epochs = 6
learning_rate = 1e-2
[quantize]
float = "fp16"
rules = [{ type = "Embedding", precision = "int8" }]
[calibrate]
batches = 4
methods = ["max"]
[finetune]
epochs = 1
initial_learning_rate = 1e-4
[export]
[build-engine]
runtime = "tensorrt-rtx"
compute_capability = "8.9"
[onnxruntime]
modes = ["optimized", "static", "dynamic", "auto-mixed", "qdq"]
device = "cpu"
batches = 2
[analyze]
runtimes = ["torch", "onnxruntime"]
drift = { sqnr_db = 100 }
warmup = 1
iterations = 2
seconds = 0
isolate = false
energy = false
"""

OWN = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def words():
    pictures, labels = load_digits(return_X_y=True)
    patches = torch.from_numpy(pictures > 7).view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4).long()
    return (patches * torch.tensor([1, 2, 4, 8])).sum(2) + 16 * torch.arange(16), torch.from_numpy(labels)


def data():
    whole = words()
    return [TensorDataset(*(part[a:b] for part in whole)) for a, b in ((0, 1200), (1200, 1400), (1400, 1797))]


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.place = nn.Parameter(torch.randn(16, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        self.head = nn.Linear(32, 10)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids) + self.place).mean(1))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0].mean(1))


transformer, lstm = Transformer, Lstm
"""

TOKENS = onnx.TensorProto.INT64


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of the transformer, and another one of the LSTM on the same words from a file."""
    folder = tmp_path_factory.mktemp("tokens") / "project"
    with working_in(folder, own=OWN):
        project = new_project(folder, CONFIG)
        yield project, project.transform()


def input_type(path):
    (value,) = onnx.load(path).graph.input
    return value.type.tensor_type.elem_type


def largest_float(path):
    """The number of values in the largest float constant: the table's, where it is one."""
    floats = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    return max(int(np.prod(tensor.dims)) for tensor in floats)


def test_every_row_reads_the_ids_and_answers_alike(made):
    project, _ = made
    rows = {row["name"]: row for row in read(project.workspace.report)["rows"]}
    assert {"torch-fp32", "torch-int8", "onnxruntime-fp32", "onnxruntime-int8", "onnxruntime-dynamic"} <= set(rows)
    accuracies = {name: row["metrics"]["values"]["accuracy"] for name, row in rows.items()}
    assert accuracies["torch-fp32"] > 0.75
    assert all(value > accuracies["torch-fp32"] - 0.03 for value in accuracies.values()), accuracies


def test_quantizers_see_the_table_and_activations_but_no_ids(made):
    project, _ = made
    plan = {layer["name"]: layer for layer in read(project.workspace.final_plan)["layers"]}
    assert plan["embed"]["precision"] == "int8"
    assert plan["embed"]["input"] is None
    assert plan["block.linear1"]["precision"] == "int8"
    assert "embed" in read(project.workspace.calibration)["methods"]["max"]["sqnr_db"]


def test_files_take_int64_and_hold_an_int8_table(made):
    workspace = made[0].workspace
    for path in (workspace.onnx, workspace.float_onnx, workspace.target_onnx("onnxruntime-cpu")):
        assert input_type(path) == TOKENS
    for mode in ("optimized", "static", "dynamic", "auto-mixed", "qdq"):
        assert input_type(workspace.onnxrt_model(mode)) == TOKENS
    table = 256 * 32
    assert largest_float(workspace.float_onnx) == table
    assert largest_float(workspace.target_onnx("onnxruntime-cpu")) < table
    assert largest_float(workspace.onnxrt_model("dynamic")) < table


def test_products_are_integers_behind_the_table(made):
    kernels = count_kernels(onnx.load(made[0].workspace.target_onnx("onnxruntime-cpu")))
    assert kernels.operators["Gather"] >= 1
    modes = {mode: read(made[0].workspace.onnxrt_sidecar(mode)) for mode in ("static", "dynamic", "qdq")}
    assert all(each["kernels"]["integer_products"] >= 4 for each in modes.values())
    assert all(each["agreement_with_fp32"]["label_agreement"] > 0.9 for each in modes.values())


def test_the_engine_keeps_the_table_in_int8(made):
    project, outcomes = made
    receipt = {layer["name"]: layer for layer in read(project.workspace.receipt)["layers"]}
    assert receipt["embed"]["exported"] == "int8"
    assert receipt["embed"]["executed"] == "int8"
    assert not outcomes["build-engine"].summary["precision"]["differ"]
    assert read(project.workspace.sidecar)["profiles"] == [
        {"input": {"min": [1, 16], "opt": [64, 16], "max": [64, 16]}}
    ]


def test_the_first_layer_that_diverges_is_found_on_ids(made):
    project, _ = made
    rungs = read(project.workspace.report)["drift"]
    named = [rung for rung in rungs if not rung["holds"]]
    assert named
    assert all(rung["divergence"]["layer"] == "embed" for rung in named)
    assert all(rung["divergence"]["compared"] > 5 for rung in named)


def test_an_lstm_on_int32_words_from_a_file(made):
    project, _ = made
    pictures, labels = load_digits(return_X_y=True)
    bits = (pictures > 7).reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4) @ [1, 2, 4, 8]
    np.savez(project.folder / "words.npz", x=(bits + 16 * np.arange(16)).astype(np.int32), y=labels)
    other = Project(project.folder / "lstm")
    new_project(other.folder, CONFIG)
    done = other.transform(
        "model.name=own:lstm", "data.name=npz", "data.path=words.npz", 'onnxruntime.modes=["dynamic"]'
    )
    plan = {layer["name"]: layer for layer in read(other.workspace.final_plan)["layers"]}
    assert "recurrent" in plan["embed"]["reason"]  # the rule asks for INT8
    assert input_type(other.workspace.onnx) == onnx.TensorProto.INT32
    assert not done["build-engine"].summary["precision"]["differ"]
    rows = {row["name"]: row for row in read(other.workspace.report)["rows"]}
    accuracies = {name: row["metrics"]["values"]["accuracy"] for name, row in rows.items()}
    assert accuracies["torch-fp32"] > 0.75
    assert all(value > accuracies["torch-fp32"] - 0.03 for value in accuracies.values()), accuracies


UNREAD = """
from own import data as held

class Unread:
    def __init__(self, dataset, wrong):
        self.dataset, self.wrong = dataset, wrong

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        ids, label = self.dataset[index]
        return ids + 256 * (index == self.wrong), label

def {part}():
    parts = dict(zip(("train", "validation", "test"), held(), strict=True))
    return [Unread(dataset, 150 if part == "{part}" else -1) for part, dataset in parts.items()]
"""


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_id_beyond_the_table_is_named_where_it_is_met(made, part):
    """These data sets do not hold their ids: nothing knows them before they are read."""
    project, _ = made
    other = Project(project.folder / f"late_{part}")
    new_project(other.folder, CONFIG)
    (project.folder / f"late_{part}.py").write_text(UNREAD.format(part=part))
    with pytest.raises(UsageError, match=r"int64 ids from \d+ to 4\d\d, of shape \[\d+, 16\]: IndexError"):
        other.transform(f"data.name=late_{part}:{part}", "train.epochs=1", last="train")


def test_ids_beyond_the_table_are_found_before_the_first_epoch(made):
    project, _ = made
    words = np.zeros((100, 16), np.int64)
    words[70, 3] = 256
    np.savez(project.folder / "beyond.npz", x=words, y=np.arange(100) % 10)
    other = Project(project.folder / "beyond")
    new_project(other.folder, CONFIG)
    with pytest.raises(UsageError, match="int64 ids from 0 to 256") as caught:
        other.transform("data.name=npz", "data.path=beyond.npz", last="train")
    assert "num_embeddings" in caught.value.fix
