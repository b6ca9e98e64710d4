"""FP16 overflow: seen while the model runs in FP32, and what the plan makes of it."""

from pathlib import Path

import pytest
import torch
from placement_nets import calibrated, exported, in_onnxruntime, planned, sqnr_db
from torch import Tensor, nn

from maseRT.errors import UsageError
from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.quant import keep_in_fp32, observed_overflow, quantize_model, ranges_below_half, set_float_precisions
from maseRT.quant.observe import observe

FP32, FP16, INT8 = Precision.FP32, Precision.FP16, Precision.INT8


class ThreeLayers(nn.Module):
    """Each puts out what is as large as its input."""

    input_shape = (64,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 64))
        for layer in (self.a, self.b, self.c):
            nn.init.normal_(layer.weight, 0, layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)


class Loud(ThreeLayers):
    """Its middle reaches 3e5: an operation writes it, an INT8 layer reads it; the ends are small."""

    def forward(self, x: Tensor) -> Tensor:
        loud = self.a(x) * 1e5
        return self.c(torch.tanh(self.b(loud) * 1e-5))


def observed(net: nn.Module, plan: Plan) -> dict[str, str]:
    quantize_model(net, plan, master_weights=True)
    for quantizer in (m for m in net.modules() if hasattr(m, "observer")):
        quantizer.enabled = False
    with torch.no_grad(), observed_overflow(net, plan) as found:
        net(torch.randn(16, 64))
        net(torch.randn(16, 64) * 0.01)
    return found


def test_what_overflows_is_found_in_a_float_run() -> None:
    net = Loud().eval()
    found = observed(net, planned(net, float="fp16"))
    assert set(found) == {"mul", "b", "mul_1"}
    assert found["b"].startswith("its tensors reach ")
    assert float(found["b"].split()[-1]) > 65504


def test_nothing_is_looked_for_where_nothing_is_fp16() -> None:
    net = Loud().eval()
    assert observed(net, planned(net)) == {}


def test_masks_of_minus_infinity_are_no_overflow() -> None:
    class Masked(nn.Module):
        input_shape = (64,)

        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, float("-inf")).softmax(-1)

    net = Masked().eval()
    assert observed(net, planned(net, precision="fp16")) == {}


def test_the_plan_keeps_it_in_fp32(tmp_path: Path) -> None:
    net = Loud().eval()
    plan = planned(net, float="fp16")
    found = observed(net, plan)
    kept = keep_in_fp32(plan, found, overflow="keep-fp32")
    assert kept.of("b").precision is INT8
    assert kept.of("b").float is FP32
    assert kept.of("a").float is kept.of("c").float is FP16
    assert {o.name: o.precision for o in kept.operations} == {"mul": FP32, "mul_1": FP32, "tanh": FP16}
    assert kept.output_of("mul") is FP32
    assert kept.output_of("mul_1") is FP16
    assert [note.split()[0] for note in kept.notes] == list(found)

    rebuilt = calibrated(Loud().eval(), kept)
    x = torch.randn(8, 64)
    with torch.no_grad():
        result = rebuilt(x)
    assert torch.isfinite(result).all()
    path = exported(rebuilt, tmp_path / "model.onnx")
    assert sqnr_db(result, in_onnxruntime(path, x, optimize=False)) > 30


def test_without_it_the_model_overflows() -> None:
    net = Loud().eval()
    set_float_precisions(quantize_model(net, plan := planned(net, precision="fp16"), master_weights=True), plan)
    with torch.no_grad():
        assert not torch.isfinite(net.b(torch.full((1, 512), 3e5))).all()


def test_it_can_be_refused() -> None:
    net = Loud().eval()
    plan = planned(net, float="fp16")
    with pytest.raises(UsageError, match=r"outside the FP16 range of 6e-05 to 65504: mul \(its tensors reach"):
        keep_in_fp32(plan, observed(net, plan), overflow="error")
    assert keep_in_fp32(plan, {}, overflow="error") == plan


class Quiet(ThreeLayers):
    """The weights of `b` are about 1e-7, and so are the inputs of `c`; what comes out is of ordinary size."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.b.weight.mul_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))) * 1e6


@pytest.mark.parametrize("follow", [False, True])
def test_tiny_weights_and_inputs_lose_no_more_than_others(follow: bool) -> None:
    net = Quiet().eval()
    x = torch.randn(8, 64)
    with torch.no_grad():
        expected = net(x)
        calibrated(net, planned(net))
        for quantizer in (m for m in net.modules() if hasattr(m, "follow")):
            quantizer.follow = follow and quantizer.spec.axis is not None
        assert sqnr_db(expected, net(x)) > 30


def test_scales_that_fp16_cannot_hold_stay_fp32() -> None:
    net = Quiet().eval()
    plan = planned(net, float="fp16")
    model = quantize_model(Quiet().eval(), plan, master_weights=True)
    with torch.no_grad(), observe(model) as histograms:
        model(torch.randn(16, 64))
    found = ranges_below_half(plan, histograms)
    assert set(found) == {"b", "c"}
    assert found["b"].startswith("b.weight reaches ")
    assert found["c"].startswith("c.input reaches ")
    kept = keep_in_fp32(plan, found, overflow="keep-fp32")
    assert kept.of("b").precision is kept.of("c").precision is INT8
    assert kept.of("b").float is kept.of("c").float is FP32
    assert kept.of("a").float is FP16
    assert [note.split()[0] for note in kept.notes] == ["b", "c"]
    assert ranges_below_half(kept, histograms) == {}


def test_fp16_weights_below_its_normal_numbers_stay_fp32() -> None:
    net = Quiet().eval()
    plan = planned(net, precision="fp16", float="fp16")
    assert (plan.of("a").precision, plan.of("b").precision, plan.of("c").precision) == (FP16, FP32, FP16)
    assert "weight reaches" in plan.of("b").reason
    with torch.no_grad():
        net.b.weight.zero_()
    assert planned(net, precision="fp16", float="fp16").of("b").precision is FP16
