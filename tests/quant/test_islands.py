"""FP32 convolutions in a half region take along what is fused behind them, and then really run in FP32."""

import pytest
import torch
from placement_nets import calibrated, exported, lively, planned
from torch import Tensor, nn

from maseRT.onnx_graph import layer_precisions
from maseRT.precision import Precision
from maseRT.quant.islands import keep_islands_whole
from maseRT.receipt import Verdict, names_in, receipt_from
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions

ISLAND = {"name": "island", "precision": "fp32"}


class Net(nn.Module):
    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.island = nn.Conv2d(32, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.act = nn.SiLU()
        self.last = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.middle(torch.relu(self.stem(x)))))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Activated(Net):
    def middle(self, x):
        return self.act(self.bn(self.island(x)))


class Functional(Net):
    def middle(self, x):
        return torch.relu(self.island(x))


class Added(Net):
    def middle(self, x):
        return self.act(self.bn(self.island(x)) + x)


class Direct(Net):
    def middle(self, x):
        return self.island(x)


def half(net, *rules, **settings):
    return planned(lively(net), float="fp16", rules=[*rules, ISLAND], **settings)


def floats(plan):
    named = {layer.name: layer.float for layer in plan.layers} | {o.name: o.precision for o in plan.operations}
    return {name for name, precision in named.items() if precision is Precision.FP32}


@pytest.mark.parametrize(
    ("net", "company"),
    [(Activated, {"act"}), (Functional, {"relu_1"}), (Added, {"add", "act"}), (Direct, {"last"})],
)
def test_the_company_of_an_island(net, company):
    plan = half(net())
    assert floats(plan) == {"island", *company} | ({"bn"} if net in (Activated, Added) else set())
    (note,) = plan.notes
    assert note.endswith("fp32 along with island, which compilers would run in half between two casts")
    assert all(name in note for name in company)
    assert plan.of("last").precision is Precision.INT8
    assert keep_islands_whole(plan) == plan


def test_a_rule_about_the_activation_is_obeyed():
    plan = half(Activated(), {"name": "act", "precision": "fp16"})
    assert floats(plan) == {"island", "bn"}
    assert plan.notes == ()


def test_where_no_casts_surround_it_nothing_is_taken_along():
    first = planned(lively(Functional()), float="fp16", rules=[{"name": "stem", "precision": "fp32"}])
    assert floats(first) == {"stem"}
    assert half(Direct(), precision="fp16").notes == ()  # a convolution behind it is not its company
    assert planned(lively(Functional()), float="fp32", rules=[ISLAND]).notes == ()


@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("net", [Activated, Added, Direct])
def test_tensorrt_rtx_then_runs_it_in_fp32(net, precision, tmp_path):
    if net is Direct and precision == "fp16":
        pytest.skip("nothing to take along")
    compiler = get_compiler("tensorrt-rtx")
    if compiler.missing():
        pytest.skip(compiler.missing())
    torch.manual_seed(0)
    model = net()
    plan = half(model, precision=precision)
    path = exported(calibrated(model, plan), tmp_path / "model.onnx")
    options = BuildOptions(batch=BatchRange(1, 4, 8), compute_capability="8.9")
    info = compiler.build(path, tmp_path / "model.trt", options)
    receipt = receipt_from(plan, layer_precisions(path, names_in(plan)), info, onnx_sha256="")
    island = next(layer for layer in receipt.layers if layer.name == "island")
    assert (island.executed, island.verdict) == ("fp32", Verdict.AS_ASKED)
    assert receipt.mismatches == ()
