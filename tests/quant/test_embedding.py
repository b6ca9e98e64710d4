"""Embeddings: ids stay integers in every precision, and the table is quantized where a rule asks for that."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from maseRT.config import QuantizeSection
from maseRT.errors import StepError, UsageError
from maseRT.onnx_export import export_onnx
from maseRT.onnx_graph import layer_precisions
from maseRT.plan import Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.quant import make_plan, quantize_model
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.layers import quantize_layer
from maseRT.quant.observe import load_amax, observe
from maseRT.quant.qat import train_ranges
from maseRT.runtimes.onnxruntime import OnnxRuntime

WORDS = 300
TABLE = {"type": "Embedding", "precision": "int8"}


class Bag(nn.Module):
    """The mean of the words' vectors, padding left out, then a layer that is worth quantizing."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 64, padding_idx=0)
        self.body = body or nn.Linear(64, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.embed(ids)
        if isinstance(self.body, nn.LSTM):
            return self.head(self.body(vectors)[0].mean(1))
        known = (ids != 0).unsqueeze(-1)
        return self.head(self.body((vectors * known).sum(1) / known.sum(1)).relu())


def ids(count: int = 16, kind: torch.dtype = torch.int64) -> Tensor:
    drawn = torch.randint(1, WORDS, (count, 12), generator=torch.Generator().manual_seed(1))
    drawn[:, 9:] = 0
    return drawn.to(kind)


def bag(body: nn.Module | None = None) -> Bag:
    torch.manual_seed(0)
    return Bag(body).eval()


def planned(model: nn.Module, **section: object) -> Plan:
    return make_plan(model, ids(4), QuantizeSection.model_validate(section), model_name="bag")


def calibrated(model: nn.Module, **section: object) -> nn.Module:
    quantize_model(model, planned(model, **section))
    with torch.inference_mode(), observe(model) as histograms:
        model(ids())
    load_amax(model, amax_from_histograms(histograms, lambda name: Method("max")))
    return model


def exported(model: nn.Module, x: Tensor, folder: Path) -> Path:
    export_onnx(model, x, folder / "model.onnx", opset=20)
    return folder / "model.onnx"


def infer(path: Path, x: Tensor) -> np.ndarray:
    with OnnxRuntime().open(path, threads=1) as session:
        return session.infer({"input": x.numpy()})["output"]


def sqnr_db(found: np.ndarray, expected: Tensor) -> float:
    reference = expected.detach().numpy().astype(np.float64)
    return float(10 * np.log10((reference**2).sum() / ((reference - found) ** 2).sum()))


def test_the_table_stays_float_and_the_plan_says_why() -> None:
    plan = planned(bag())
    assert plan.of("embed").precision is Precision.FP32
    assert plan.of("embed").reason.startswith("a table to look up: INT8 makes it smaller, not faster")
    assert plan.of("body").precision is Precision.INT8
    assert planned(bag(), rules=[{"first": 1, "precision": "int8"}]).of("embed").precision is Precision.FP32


def test_a_rule_that_names_it_makes_it_int8_with_one_scale() -> None:
    for rule in (TABLE, {"name": "embed", "precision": "int8"}):
        layer = planned(bag(), rules=[rule]).of("embed")
        assert (layer.precision, layer.weight, layer.input) == (Precision.INT8, QuantSpec(), None)


def test_layers_are_tiny_beside_a_table_as_they_are_without() -> None:
    small = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(48, 3))
    plan = make_plan(small.eval(), ids(4) % 8, QuantizeSection(), model_name="small")
    assert plan.of("2").reason == "default; tiny, but the model has nothing larger"


def test_a_table_that_a_recurrent_layer_reads_stays_float() -> None:
    recurrent = bag(nn.LSTM(64, 256, batch_first=True))
    assert "a recurrent layer reads" in planned(recurrent, rules=[TABLE]).of("embed").reason


def test_a_table_that_rewrites_itself_is_refused() -> None:
    model = bag()
    model.embed.max_norm = 1.0
    with pytest.raises(UsageError, match="max_norm rewrites its table while it runs"):
        planned(model, rules=[TABLE])
    with pytest.raises(StepError, match="max_norm"):
        quantize_layer(model.embed, weight=QuantSpec())


@pytest.mark.parametrize("rules", [[], [TABLE]], ids=["float table", "int8 table"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("float", ["fp32", "fp16"])
def test_ids_are_never_cast(tmp_path: Path, float: str, kind: torch.dtype, rules: list[object]) -> None:
    reference = bag()(ids())
    model = calibrated(bag(), float=float, rules=rules)
    seen: list[torch.dtype] = []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    outputs = model(ids(kind=kind))
    assert seen == [kind]
    assert sqnr_db(outputs.detach().numpy(), reference) > 30
    path = exported(model, ids(kind=kind), tmp_path)
    (given,) = onnx.load(path).graph.input
    assert given.type.tensor_type.elem_type == (TensorProto.INT32 if kind is torch.int32 else TensorProto.INT64)
    assert sqnr_db(infer(path, ids(kind=kind)), outputs) > 40


def test_ids_beyond_half_stay_what_they_are() -> None:
    """2049 and 70000 are no halves: a cast on the way would look up other rows, or none."""
    table = nn.Embedding(70001, 4)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 256), nn.Linear(256, 3)).eval()
    x = torch.tensor([[2049, 70000], [3, 2051]])
    expected = model(x)
    plan = make_plan(model, x, QuantizeSection(precision="fp16", float="fp16"), model_name="wide")
    assert sqnr_db(quantize_model(model, plan)(x).detach().numpy(), expected) > 50


def test_quantizers_see_the_table_and_floats_alone() -> None:
    model = bag()
    quantize_model(model, planned(model, rules=[TABLE]))
    with torch.inference_mode(), observe(model) as histograms:
        model(ids())
    assert set(histograms) == {"embed.weight", "body.input", "body.weight"}


def test_the_table_learns_while_it_is_quantized() -> None:
    model = calibrated(bag(), rules=[TABLE]).train()
    train_ranges(model, learned=False)
    before = model.embed.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nn.functional.cross_entropy(model(ids()), torch.arange(16) % 10).backward()
    optimizer.step()
    changed = (model.embed.weight != before).any(dim=1)
    assert set(changed.nonzero().flatten().tolist()) == set(ids().flatten().tolist()) - {0}  # 0 is the padding
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    model(ids())
    assert model.embed.weight_quantizer.amax == model.embed.weight.abs().max()


def test_exported_tables_are_layers_of_the_receipt(tmp_path: Path) -> None:
    for rules, precision in (([], "fp16"), ([TABLE], "int8")):
        path = exported(calibrated(bag(), float="fp16", rules=rules), ids(), tmp_path)
        table = layer_precisions(path)["embed"]
        assert (table.precision, table.float, table.looks_up) == (precision, "fp16", True)
        assert not layer_precisions(path)["body"].looks_up
