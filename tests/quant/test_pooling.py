"""Pools that TensorRT has no INT8 kernel for: float by default, with the same numbers; INT8 where a rule asks."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from placement_nets import batch, calibrated, exported, planned
from torch import Tensor, nn

from maseRT.onnx_graph import layer_precisions
from maseRT.precision import Precision
from maseRT.quant import quantize_model, quantizers
from maseRT.receipt import Verdict, names_in, receipt_from
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Pooled(nn.Module):
    """A pool between two convolutions of 1 to 3 dimensions; inputs [N, 3, 8, ...]."""

    def __init__(self, pool: nn.Module, dims: int = 3) -> None:
        super().__init__()
        self.input_shape = (3, *(8,) * dims)
        self.first = CONVS[dims](3, 8, 3, padding=1)
        self.pool = pool
        self.second = CONVS[dims](8, 8, 3, padding=1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.pool(F.relu(self.first(x)))).flatten(1)


WITHOUT_KERNEL = {
    "MaxPool3d": lambda: Pooled(nn.MaxPool3d(2)),
    "AdaptiveMaxPool3d": lambda: Pooled(nn.AdaptiveMaxPool3d(4)),
    "AvgPool3d": lambda: Pooled(nn.AvgPool3d(2)),
    "AdaptiveAvgPool3d": lambda: Pooled(nn.AdaptiveAvgPool3d(4)),
    "AvgPool1d": lambda: Pooled(nn.AvgPool1d(2), dims=1),
    "AdaptiveAvgPool1d": lambda: Pooled(nn.AdaptiveAvgPool1d(4), dims=1),
    "AdaptiveAvgPool2d": lambda: Pooled(nn.AdaptiveAvgPool2d(3), dims=2),
}

WITH_KERNEL = {
    "padding counts": lambda: Pooled(nn.AvgPool2d(3, 2, 1), dims=2),
    "nothing is padded": lambda: Pooled(nn.AvgPool2d(2, count_include_pad=False), dims=2),
    "adaptive": lambda: Pooled(nn.AdaptiveAvgPool2d(4), dims=2),
}


@pytest.mark.parametrize("kind", WITHOUT_KERNEL)
@pytest.mark.parametrize("placement", ["tensorrt", "layerwise"])
def test_they_stay_float_and_the_plan_says_why(kind: str, placement: str) -> None:
    plan = planned(WITHOUT_KERNEL[kind](), placement=placement)
    assert [layer.name for layer in plan.layers if layer.precision is Precision.INT8] == ["first", "second"]
    assert "TensorRT-RTX runs" in plan.of("pool").reason
    assert ("TensorRT 8.6 has no kernel" in plan.of("pool").reason) is ("Max" in kind)
    assert "a rule that names it or its type makes it INT8" in plan.of("pool").reason
    assert not any(site.op.endswith("pool3d") for site in plan.sites)
    assert not any("but TensorRT" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"padding": 1}, Precision.INT8),
        ({"ceil_mode": True}, Precision.INT8),
        ({"count_include_pad": False}, Precision.INT8),
        ({"count_include_pad": False, "padding": 1}, Precision.FP32),
        ({"count_include_pad": False, "ceil_mode": True}, Precision.FP32),
        ({"divisor_override": 3}, Precision.FP32),
    ],
)
def test_a_2d_average_pool_is_int8_where_it_divides_by_the_size_of_its_window(
    options: dict[str, object], precision: Precision
) -> None:
    plan = planned(Pooled(nn.AvgPool2d(2, **options), dims=2))
    assert plan.of("pool").precision is precision
    assert ("does not divide by the size" in plan.of("pool").reason) is precision.is_float


@pytest.mark.parametrize("kind", WITHOUT_KERNEL)
def test_a_rule_makes_them_int8_and_a_note_says_what_comes_of_that(kind: str) -> None:
    plan = planned(WITHOUT_KERNEL[kind](), rules=[{"type": kind, "precision": "int8"}])
    assert plan.of("pool").precision is Precision.INT8
    (note,) = [note for note in plan.notes if "but TensorRT" in note]
    assert note.startswith("pool: INT8 as asked, but ")


def indices_left_out(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize(
    ("function", "pool"),
    [
        (lambda x: F.max_pool2d(x, 2), nn.MaxPool2d(2)),
        (lambda x: torch.max_pool2d(x, 3, 2, 1, 1, True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        (lambda x: F.max_pool1d(x, 2), nn.MaxPool1d(2)),
        (lambda x: F.max_pool3d(x, 2), nn.MaxPool3d(2)),
        (lambda x: F.adaptive_max_pool1d(x, 4, return_indices=True), nn.AdaptiveMaxPool1d(4, return_indices=True)),
        (lambda x: F.adaptive_max_pool2d(x, (4, 2)), nn.AdaptiveMaxPool2d((4, 2))),
        (lambda x: F.adaptive_max_pool3d(x, 4), nn.AdaptiveMaxPool3d(4)),
        (lambda x: F.avg_pool1d(x, 2), nn.AvgPool1d(2)),
        (lambda x: F.avg_pool3d(x, 2), nn.AvgPool3d(2)),
        (lambda x: F.avg_pool2d(x, 2), nn.AvgPool2d(2)),
        (lambda x: F.avg_pool2d(x, 3, padding=1), nn.AvgPool2d(3, padding=1)),
        (lambda x: F.avg_pool2d(input=x, kernel_size=3, ceil_mode=True), nn.AvgPool2d(3, ceil_mode=True)),
        (lambda x: F.avg_pool2d(x, 2, count_include_pad=False), nn.AvgPool2d(2, count_include_pad=False)),
        (lambda x: F.avg_pool2d(x, 3, 2, 1, False, False), nn.AvgPool2d(3, 2, 1, False, False)),
        (lambda x: F.avg_pool2d(x, 3, 2, 0, True, False), nn.AvgPool2d(3, 2, 0, True, False)),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), nn.AvgPool2d(2, divisor_override=3)),
        (lambda x: F.adaptive_avg_pool1d(x, 4), nn.AdaptiveAvgPool1d(4)),
        (lambda x: F.adaptive_avg_pool2d(x, 4), nn.AdaptiveAvgPool2d(4)),
        (lambda x: F.adaptive_avg_pool2d(x, 3), nn.AdaptiveAvgPool2d(3)),
        (lambda x: F.adaptive_avg_pool2d(x, 1), nn.AdaptiveAvgPool2d(1)),
        (lambda x: F.adaptive_avg_pool3d(x, 4), nn.AdaptiveAvgPool3d(4)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_a_function_is_decided_as_its_layer_is(function: Callable[[Tensor], Tensor], pool: nn.Module) -> None:
    class Net(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            pooled = function if isinstance(self.pool, nn.Identity) else self.pool
            return self.second(indices_left_out(pooled(F.relu(self.first(x))))).flatten(1)

    dims = next(dims for dims in CONVS if type(pool).__name__.endswith(f"{dims}d"))
    expected, plan = planned(Net(pool, dims)), planned(Net(nn.Identity(), dims))
    quantized = expected.of("pool").precision is Precision.INT8
    assert [site.reason for site in plan.sites] == ([expected.of("pool").reason] if quantized else [])
    assert len(plan.ties) == len(expected.ties)


def test_a_max_pool_in_float_gives_the_numbers_of_one_in_int8() -> None:
    torch.manual_seed(0)
    net = WITHOUT_KERNEL["MaxPool3d"]()
    other = WITHOUT_KERNEL["MaxPool3d"]()
    other.load_state_dict(net.state_dict())
    calibrated(net, planned(net, rules=[{"name": "pool", "precision": "int8"}]))
    quantize_model(other, planned(other))
    for name, quantizer in quantizers(other).items():
        quantizer.amax.copy_(quantizers(net)[name].amax)
    x = batch(net)
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["MaxPool3d", "AvgPool1d", "AdaptiveAvgPool2d", *WITH_KERNEL])
def test_tensorrt_rtx_runs_the_plan_as_it_is(kind: str, tmp_path: Path) -> None:
    net = (WITHOUT_KERNEL | WITH_KERNEL)[kind]()
    plan = planned(net, float="fp16")
    floats = Precision.FP32 if kind == "AdaptiveAvgPool2d" else Precision.FP16
    assert plan.of("pool").precision is (Precision.INT8 if kind in WITH_KERNEL else floats)
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    options = BuildOptions(batch=BatchRange(1, 4, 8), compute_capability="8.9")
    info = get_compiler("tensorrt-rtx").build(path, tmp_path / "model.trt", options)
    receipt = receipt_from(plan, layer_precisions(path, names_in(plan)), info, onnx_sha256="")
    assert receipt.mismatches == ()
    parts = Verdict.FUSED if kind == "AdaptiveAvgPool2d" else Verdict.AS_ASKED  # it is many nodes
    verdicts = {layer.name: layer.verdict for layer in receipt.layers}
    assert verdicts == {"first": Verdict.AS_ASKED, "pool": parts, "second": Verdict.AS_ASKED}


@pytest.mark.parametrize("rules", [[], [{"name": "pool", "precision": "int8"}]])
def test_onnxruntime_takes_a_3d_max_pool_in_integers_either_way(rules: list[dict[str, str]], tmp_path: Path) -> None:
    net = WITHOUT_KERNEL["MaxPool3d"]()
    path = exported(calibrated(net, planned(net, rules=rules)), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = batch(net, 4)
    with torch.no_grad():
        wanted = net(x)
    got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    (pool,) = (node for node in graph.node if node.op_type == "MaxPool")
    makers = {name: node.op_type for node in graph.node for name in node.output}
    assert makers[pool.input[0]] == "QuantizeLinear"
