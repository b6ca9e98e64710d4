"""Outputs of torch layers in exported graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from placement_nets import NETS, batch, calibrated, exported, lively, planned
from torch import nn

from maseRT.onnx_outputs import Outputs, call_name, layer_outputs, with_outputs
from maseRT.plan import OUTPUT
from maseRT.runtimes.onnxruntime import OnnxRuntime


@dataclass(frozen=True)
class Case:
    net: nn.Module
    model: onnx.ModelProto
    found: Outputs


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Quantized and exported networks, each made once."""

    @cache
    def _case(name: str, precision: str = "fp32") -> Case:
        torch.manual_seed(0)
        net = lively(NETS[name]())
        calibrated(net, planned(net, float=precision))
        model = onnx.load(exported(net, tmp_path_factory.mktemp(name) / "m.onnx"))
        return Case(net, model, layer_outputs(model))

    return _case


def test_branches_repeated_calls_and_operations(case) -> None:
    found = case("ResNet").found
    names = list(found.tensors)
    assert names[:3] == ["conv1", "relu", "maxpool"]
    assert names[-2:] == ["fc", OUTPUT]
    assert found.before[call_name("layer2.0.relu", 0)] == {"layer2.0.conv1"}
    assert found.before[call_name("layer2.0.relu", 1)] == {"layer2.0.add"}
    assert found.before["layer2.0.add"] == {"layer2.0.conv2", "layer2.0.downsample"}
    assert found.before["layer2.0.conv1"] == found.before["layer2.0.downsample.0"] == {"layer1"}
    assert found.tensors["layer1"] == found.tensors["layer1.0"] == found.tensors["layer1.0.relu (call 2)"]


@pytest.mark.parametrize(
    ("name", "layer", "precision"),
    [
        ("Encoder", "layers.layers.0.self_attn", "fp32"),
        ("SequenceNet", "lstm", "fp32"),
        ("MobileBlock", "act", "fp32"),
        ("MobileBlock", "act", "fp16"),
    ],
)
def test_a_layers_output_is_what_torch_computes(case, name: str, layer: str, precision: str, tmp_path: Path) -> None:
    made = case(name, precision)
    marked, names = with_outputs(made.model, {layer: made.found.tensors[layer]})
    onnx.checker.check_model(marked, full_check=True)
    onnx.save(marked, tmp_path / "m.onnx")
    x, seen = batch(made.net, 3), []
    hook = made.net.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        made.net(x)
    hook.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    with OnnxRuntime().open(tmp_path / "m.onnx", threads=1, optimization="disabled") as session:
        value = session.infer({"input": x.numpy()})[names[layer]]
    assert value.dtype == np.float32
    assert np.abs(value - expected.float().numpy()).max() < 0.02 * expected.abs().max()


def test_the_model_itself_stays_as_it_is(case) -> None:
    made = case("MobileBlock", "fp16")
    before = made.model.SerializeToString(deterministic=True)
    marked, names = with_outputs(made.model, made.found.tensors)
    assert made.model.SerializeToString(deterministic=True) == before
    assert {value.name for value in marked.graph.output} == set(names.values())
    assert names[OUTPUT] == made.model.graph.output[0].name
    casts = [node for node in marked.graph.node if node.name.endswith("_as_fp32")]
    assert len(casts) == len(marked.graph.node) - len(made.model.graph.node) > 0


def test_quantizers_are_no_outputs(case) -> None:
    """A DequantizeLinear that two layers share stands in the first one's scope."""
    made = case("ResNet")
    makers = {name: node.op_type for node in made.model.graph.node for name in node.output}
    read = {makers[tensor] for tensor in made.found.tensors.values()}
    assert read == {"Conv", "Relu", "MaxPool", "Add", "ReduceMean", "Gemm"}
