"""Float precisions: types of parameters, casts at the borders, FP32 at the model's ends."""

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from placement_nets import Encoder, ResNet, SequenceNet, batch, calibrated, exported, lively, planned
from torch import Tensor, nn

from maseRT.quant import quantize_model

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


def types_seen(net: nn.Module) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Return the types of each module's first input and output in one forward."""
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(
                name, (args[0].dtype, (output[0] if isinstance(output, tuple) else output).dtype)
            )
        )
        for name, module in net.named_modules()
    ]
    with torch.no_grad():
        net(batch(net, 2))
    for handle in handles:
        handle.remove()
    return seen


def casts(path: Path) -> int:
    return sum(node.op_type == "Cast" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", HALF), ("bf16", BRAIN)])
def test_the_whole_model_in_another_type(precision: str, dtype: torch.dtype) -> None:
    net = Encoder().eval()
    plan = planned(net, precision=precision)
    x = batch(net)
    expected = net(x)
    quantize_model(net, plan)
    assert {p.dtype for p in net.parameters()} == {dtype}
    seen = types_seen(net)
    assert seen[""] == (dtype, SINGLE)
    assert all(types == (dtype, dtype) for name, types in seen.items() if name)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.05)


class TokenNorm(nn.Module):
    """A linear layer with BatchNorm over all tokens, as in LeViT."""

    input_shape = (5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.head(self.norm(x.flatten(0, 1)).reshape_as(x)).mean(1)


def test_what_reads_a_shape_alone_takes_part_in_no_cast() -> None:
    net = TokenNorm().eval()
    x = batch(net)
    expected = net(x)
    quantize_model(net, planned(net, precision="fp16"))
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.05)


def test_fp32_stays_untouched() -> None:
    net = lively(ResNet())
    x = batch(net)
    expected = net(x)
    quantize_model(net, planned(net, precision="fp32"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_an_island_is_cast_at_its_borders_only(tmp_path: Path) -> None:
    net = lively(ResNet())
    plan = planned(net, precision="fp16", rules=[{"name": "layer1.*", "precision": "fp32"}])
    quantize_model(net, plan)
    seen = types_seen(net)
    assert seen["layer1.0.conv2"] == (SINGLE, SINGLE)
    assert seen["layer2.0.conv1"] == (HALF, HALF)
    assert casts(exported(net, tmp_path / "model.onnx")) == 4


def test_the_ends_need_no_casts_where_the_outer_layers_are_fp32(tmp_path: Path) -> None:
    net = lively(ResNet())
    rules = [{"first": 1, "precision": "fp32"}, {"last": 1, "precision": "fp32"}]
    calibrated(net, planned(net, float="fp16", rules=rules))
    seen = types_seen(net)
    assert seen["conv1"] == (SINGLE, HALF)
    assert seen["fc"] == (SINGLE, SINGLE)
    assert casts(exported(net, tmp_path / "model.onnx")) == 2


def test_states_and_tuples_are_cast_too() -> None:
    net = lively(SequenceNet())
    rules = [{"type": "LSTM", "precision": "fp16"}]
    quantize_model(net, planned(net, precision="fp32", rules=rules))
    assert {p.dtype for p in net.lstm.parameters()} == {HALF}
    assert types_seen(net)["lstm"] == (HALF, SINGLE)


def test_constants_made_in_a_forward_do_not_widen_what_follows(tmp_path: Path) -> None:
    class Net(nn.Module):
        input_shape = (64,)

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.register_buffer("offset", torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + torch.arange(64, dtype=torch.float32) * 0.01 + self.offset
            return F.linear(x, self.b.weight) * 2

    net = Net().eval()
    quantize_model(net, planned(net, precision="fp16"))
    assert net.offset.dtype == HALF
    path = exported(net, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    computed = [node for node in graph.node if node.op_type in ("Gemm", "MatMul", "Add", "Mul")]
    assert {kinds[node.output[0]] for node in computed if node.output[0] in kinds} == {onnx.TensorProto.FLOAT16}
    assert casts(path) <= 3
