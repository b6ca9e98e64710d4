"""Half precision on a CPU that has no kernel for an operator: float32 inside of it, one rounding, the same graph."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from placement_nets import batch, calibrated, exported, in_onnxruntime, planned, sqnr_db
from torch import Tensor, nn

from maseRT.quant import quantize_model

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Video(nn.Module):
    """An average pool between two convolutions; clips [N, 3, 4, 8, 8]."""

    input_shape = (3, 4, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.pool = nn.AvgPool3d(2)
        self.second = nn.Conv3d(8, 8, 3, padding=1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.pool(F.relu(self.first(x)))).flatten(1)


class Only(nn.Module):
    """One layer or function."""

    def __init__(self, run: nn.Module | object, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.run = run
        self.input_shape = shape
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool3d(x, 3, stride=1) * 0.5


CASES = {
    "AvgPool3d": lambda: Only(nn.AvgPool3d(3, stride=1, padding=1), (2, 4, 4, 4)),
    "avg_pool3d": lambda: Only(lambda x: F.avg_pool3d(x, 3, stride=1), (2, 4, 4, 4)),
    "own": lambda: Only(Own(), (2, 4, 4, 4)),
    "antialias": lambda: Only(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), (2, 8, 8)),
}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_in_float32_rounded_once(case: str, precision: str) -> None:
    torch.manual_seed(0)
    net = CASES[case]()
    x = batch(net).to(TYPES[precision]).float()
    wanted = net(x)
    if case == "own":  # two operators, each of which rounds
        wanted = (wanted * 2).to(TYPES[precision]) * 0.5
    plan = planned(net, precision=precision)
    quantize_model(net, plan)
    with torch.no_grad():
        got = net(x)
    exact = "no BF16 form" in str(plan.layers) + str(plan.operations)  # which leaves it in FP32
    expected = wanted if exact else wanted.to(TYPES[precision]).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"float": "fp16"}, {"precision": "fp16"}])
def test_a_3d_average_pool_in_fp16_from_calibration_to_onnxruntime(settings: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = calibrated(Video(), planned(Video(), **settings))
    path = exported(net, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    (pool,) = (node for node in graph.node if node.op_type == "AveragePool")
    assert {types[name] for name in (*pool.input, *pool.output)} == {onnx.TensorProto.FLOAT16}
    assert sum(node.op_type == "Cast" for node in graph.node) == 2  # those at the model's ends
    x = batch(net)
    with torch.no_grad():
        assert sqnr_db(net(x), in_onnxruntime(path, x, optimize=False)) > 40


def test_a_copy_computes_with_its_own_weights() -> None:
    net = Video()
    quantize_model(net, planned(net, precision="fp16"))
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        assert not net(x := batch(net)).any()
        assert other(x).any()


def test_a_model_that_is_one_layer_is_exported(tmp_path: Path) -> None:
    net = nn.AvgPool3d(2).eval()
    net.input_shape = (2, 4, 4, 4)
    quantize_model(net, planned(net, precision="fp16"))
    x = batch(net)
    assert sqnr_db(F.avg_pool3d(x, 2), net(x)) > 60
    (pool,) = (n for n in onnx.load(exported(net, tmp_path / "m.onnx")).graph.node if n.op_type == "AveragePool")
    assert pool


def test_an_error_of_another_kind_is_the_caller_s() -> None:
    class Unfinished(nn.Module):
        done = True

        def forward(self, x: Tensor) -> Tensor:
            if self.done:
                return x * 2
            raise NotImplementedError("to be done")

    net = Only(Unfinished(), (4,))
    quantize_model(net, planned(net, precision="fp16"))
    Unfinished.done = False
    with pytest.raises(NotImplementedError, match="to be done"):
        net(batch(net))
