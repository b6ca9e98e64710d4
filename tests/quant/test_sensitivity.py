"""One layer quantized at a time."""

import pytest
import torch
from placement_nets import ResNet, batch, calibrated, lively, planned

from maseRT.quant.observe import observe
from maseRT.quant.quantizer import amax_name, quantizers, quantizers_off
from maseRT.quant.sensitivity import expected_sqnr_db, only_quantized, tensors_by_layer
from maseRT.quant.sqnr import sqnr_db


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    net = lively(ResNet())
    plan = planned(net)
    return plan, calibrated(net, plan)


def test_every_quantized_tensor_belongs_to_one_layer_and_a_shortcut_to_the_layer_it_is_added_to(prepared):
    plan, net = prepared
    names = [amax_name(name) for name in quantizers(net)]
    groups = tensors_by_layer(plan, names)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    assert {"layer1.0.conv2.input", "layer1.0.conv2.weight"} < set(groups["layer1.0.conv2"])
    assert any(name.startswith("layer1.0.add") for name in groups["layer1.0.conv2"])
    assert set(groups) <= {layer.name for layer in plan.layers}


def test_one_layer_alone_is_quantized_and_the_model_is_as_before_afterwards(prepared):
    _, net = prepared
    x = batch(net, 4)
    with torch.no_grad():
        before = net(x)
        with quantizers_off(net):
            plain = net(x)
            with only_quantized(net, ["conv1.weight"]):
                active = [name for name, quantizer in quantizers(net).items() if quantizer.enabled]
                alone = net(x)
            assert torch.equal(net(x), plain)
        assert torch.equal(net(x), before)
    assert active == ["conv1.weight_quantizer"]
    assert 0 < (alone - plain).norm() < (before - plain).norm()


def test_the_expected_ratio_adds_the_noise_of_the_operands(prepared):
    _, net = prepared
    with torch.no_grad(), observe(net) as histograms:
        net(batch(net, 8))
    amax = {amax_name(name): quantizer.amax for name, quantizer in quantizers(net).items()}
    names = ["conv1.input", "conv1.weight"]
    together = expected_sqnr_db(names, histograms, amax)
    each = [sqnr_db(histograms[name], amax[name]) for name in names]
    assert min(each) - 3.02 < together < min(each)
    assert expected_sqnr_db(names, {}, amax) is None
