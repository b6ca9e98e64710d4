"""quantize_model: from a plan alone, loadable checkpoints."""

import copy
import json

import pytest
import torch
from placement_nets import (
    NETS,
    BasicBlock,
    Encoder,
    ResNet,
    SharedLayer,
    batch,
    calibrated,
    lively,
    planned,
)
from torch import nn

from maseRT.errors import UsageError
from maseRT.plan import Plan
from maseRT.quant import quantize_model, quantizers, quantizers_off

HALF = {"float": "fp16"}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_with_quantizers_off_only_folding_remains(net: type[nn.Module]) -> None:
    model = lively(net())
    x = batch(model)
    before = model(x)
    calibrated(model, planned(model))
    with quantizers_off(model):
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(x), before) or not quantizers(model)


def test_a_model_is_rebuilt_from_plan_and_checkpoint() -> None:
    model = lively(ResNet())
    plan = planned(model, **HALF)
    calibrated(model, plan)
    document = json.loads(json.dumps(plan.to_json()))
    again = quantize_model(ResNet(), Plan.from_json(document))
    again.load_state_dict(model.state_dict(), strict=True)
    x = batch(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))


def test_a_checkpoint_with_master_weights_loads_into_the_final_model() -> None:
    model = lively(ResNet())
    plan = planned(model, **HALF)
    master = quantize_model(copy.deepcopy(model), plan, master_weights=True)
    assert {p.dtype for p in master.parameters()} == {torch.float32}
    final = quantize_model(model, plan)
    assert list(final.state_dict()) == list(master.state_dict())
    final.load_state_dict(master.state_dict(), strict=True)
    assert final.conv1.weight.dtype == torch.float16
    assert final.conv1.input_quantizer.amax.dtype == torch.float32


def test_quantizers_have_their_amax_names() -> None:
    model = lively(ResNet())
    plan = planned(model)
    quantize_model(model, plan)
    names = {quantizer.name for quantizer in quantizers(model).values()}
    assert names >= {"conv1.input", "conv1.weight", "layer1.0.add.1", "maxpool.input"}
    assert names == {name.removesuffix("_quantizer") for name in quantizers(model)}
    assert {name for tie in plan.ties for name in tie} <= names


def test_shared_layers_are_quantized_once() -> None:
    model = SharedLayer().eval()
    calibrated(model, planned(model))
    assert model.first is model.body[1]
    assert len(quantizers(model)) == 4


def test_quantized_models_train() -> None:
    model = lively(ResNet())
    calibrated(model, planned(model))
    model.train()
    model(batch(model)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_a_copy_is_independent() -> None:
    model = lively(ResNet())
    calibrated(model, planned(model))
    x = batch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        for quantizer in quantizers(model).values():
            quantizer.amax.mul_(0.5)
        assert torch.equal(twin(x), expected)
        assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("settings", [{}, HALF])
def test_the_transformer_s_fast_path_bypasses_nothing(settings: dict[str, object]) -> None:
    model = Encoder().eval()
    plan = planned(model, **settings)
    calibrated(model, plan)
    seen = []
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        module.register_forward_hook(lambda module, args, output, name=layer.name: seen.append(name))
    with torch.inference_mode():
        model(batch(model))
    assert {layer.name for layer in plan.layers} == set(seen)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = planned(ResNet().eval())
    with pytest.raises(UsageError, match="made for another model") as caught:
        quantize_model(BasicBlock(3, 3), plan)
    assert "plan of ResNet" in caught.value.where
    model = ResNet()
    model.fc = nn.Sequential(nn.Linear(32, 600))
    with pytest.raises(UsageError, match="it has a Linear here, the model has a Sequential"):
        quantize_model(model, plan)
