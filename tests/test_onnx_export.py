"""The exported file: numbers as in ONNX Runtime, real Q/DQ nodes, reproducible, clean, quiet; errors name the layer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from layer_cases import with_max_ranges
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.onnx_export import SCOPES, export_onnx
from maseRT.precision import QuantSpec
from maseRT.quant import LAYERS, default_specs, quantize_layer, quantizers, quantizers_off

ort = pytest.importorskip("onnxruntime")


class Branches(nn.Module):
    """Layers side by side: each gets its part of the input [N, sum of sizes], the results are joined to [N, ...]."""

    def __init__(self, **cases: tuple[nn.Module, tuple[int, ...]]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: layer for name, (layer, _) in cases.items()})
        self.shapes = {name: shape for name, (_, shape) in cases.items()}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.results(x), dim=1)

    def results(self, x: Tensor) -> list[Tensor]:
        parts = x.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return [
            self._run(layer, part.reshape(-1, *shape)).flatten(1)
            for (layer, shape), part in zip(
                zip(self.branches.values(), self.shapes.values(), strict=True), parts, strict=True
            )
        ]

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.MultiheadAttention):
            return layer(x, x, x, need_weights=False)[0]
        result = layer(x)
        return result[0] if isinstance(result, tuple) else result

    def example(self, batch: int) -> Tensor:
        return torch.randn(batch, sum(math.prod(shape) for shape in self.shapes.values()))


def quantize(model: nn.Module, example: Tensor) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) in LAYERS:
            activations, weights = default_specs(module)
            quantize_layer(module, name=name, input=activations, weight=weights)
    return with_max_ranges(model.eval(), example)


def ort_run(path: Path, x: Tensor) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


def every_type() -> Branches:
    return Branches(
        linear=(nn.Linear(6, 5), (6,)),
        linear_on_sequences=(nn.Linear(6, 5), (3, 6)),
        conv1=(nn.Conv1d(3, 4, 3), (3, 7)),
        conv2=(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 7)),
        conv3=(nn.Conv3d(2, 3, 2, dilation=2), (2, 5, 5, 5)),
        transposed1=(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5)),
        transposed2=(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
        transposed3=(nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 3, 3, 3)),
        max1=(nn.MaxPool1d(2), (2, 6)),
        max2=(nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 6, 6)),
        max3=(nn.MaxPool3d(2), (2, 4, 4, 4)),
        average1=(nn.AvgPool1d(2, padding=1), (2, 6)),
        average2=(nn.AvgPool2d(3, 2, 1, divisor_override=5), (2, 7, 7)),
        average3=(nn.AvgPool3d(2, padding=1, count_include_pad=False), (2, 4, 4, 4)),
        adaptive_max1=(nn.AdaptiveMaxPool1d(3), (2, 6)),
        adaptive_max2=(nn.AdaptiveMaxPool2d(1), (2, 6, 6)),
        adaptive_max3=(nn.AdaptiveMaxPool3d(2), (2, 4, 4, 4)),
        adaptive_average1=(nn.AdaptiveAvgPool1d(3), (2, 6)),
        adaptive_average2=(nn.AdaptiveAvgPool2d(1), (2, 6, 6)),
        adaptive_average3=(nn.AdaptiveAvgPool3d(2), (2, 4, 4, 4)),
        lstm=(nn.LSTM(3, 4, batch_first=True, proj_size=2), (2, 3)),
        lstm_cell=(nn.LSTMCell(3, 4), (3,)),
        attention=(nn.MultiheadAttention(4, 2, batch_first=True), (3, 4)),
    )


def every_padding() -> Branches:
    modes = {
        mode: (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), (2, 6, 6)) for mode in ("reflect", "replicate")
    }
    return Branches(
        **modes,
        circular=(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
        same=(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), (2, 6, 6)),
        same_reflect=(nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 6, 6)),
        valid=(nn.Conv2d(2, 3, 3, padding="valid"), (2, 6, 6)),
    )


def test_the_branches_cover_the_table() -> None:
    tables = {nn.Embedding}  # read ids; test_token_ids.py exports one
    assert {type(layer) for layer in every_type().branches.values()} == set(LAYERS) - tables


@pytest.mark.parametrize("make", [every_type, every_padding])
def test_a_layer_in_onnxruntime_is_within_one_step_of_the_fake_quantized_one(make: object, tmp_path: Path) -> None:
    model = make()
    x = model.example(6)
    quantize(model, x)
    export_onnx(model, x[:2], tmp_path / "m.onnx", opset=20)
    got = torch.from_numpy(ort_run(tmp_path / "m.onnx", x))
    with torch.no_grad():
        wanted = model.results(x)
    with torch.no_grad(), quantizers_off(model):
        floats = model.results(x)
    parts = got.split([part.shape[1] for part in wanted], dim=1)
    for name, part, want, unquantized in zip(model.branches, parts, wanted, floats, strict=True):
        step = want.abs().max() / 127
        assert (part - want).abs().max() <= step, name
        assert not torch.allclose(part, unquantized, atol=1e-6), f"{name} is not quantized"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(x).relu()).flatten(1))


@pytest.fixture
def small() -> nn.Module:
    return quantize(Small(), torch.randn(4, 1, 8, 8))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    example = torch.randn(4, 1, 8, 8)
    export_onnx(quantize(Small(), example), example, path, opset=20)
    return path


def test_every_quantized_tensor_is_a_pair_with_constant_scale_and_zero_point(exported: Path) -> None:
    graph = onnx.load(exported).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(pairs) == len(dequantized) == 5
    for dequantize in dequantized:
        assert dequantize.input[1:] == pairs[dequantize.input[0]].input[1:]
        scale, zero_point = (constants[name] for name in dequantize.input[1:])
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert scale.shape == zero_point.shape


def test_weights_are_float_initializers_with_one_scale_per_channel(exported: Path) -> None:
    graph = onnx.load(exported).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {n.input[0]: n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants}
    assert set(weights) == {"conv.weight", "fc.weight"}
    for name, node in weights.items():
        assert constants[name].dtype == np.float32
        assert constants[node.input[1]].shape == constants[name].shape[:1]
        assert [attribute.i for attribute in node.attribute if attribute.name == "axis"] == [0]


def test_nodes_keep_the_path_of_their_layer_and_nothing_of_the_machine(exported: Path) -> None:
    model = onnx.load(exported)
    for node in model.graph.node:
        assert [entry.key for entry in node.metadata_props] == [SCOPES]
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    assert "'conv'" in conv.metadata_props[0].value
    content = exported.read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in content
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_names_opset_and_a_batch_that_is_free(exported: Path) -> None:
    model = onnx.load(exported)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    (value,), (result,) = model.graph.input, model.graph.output
    assert (value.name, result.name) == ("input", "output")
    assert value.type.tensor_type.elem_type == result.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == ["batch", 1, 8, 8]
    assert [dim.dim_param or dim.dim_value for dim in result.type.tensor_type.shape.dim] == ["batch", 3]
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


@pytest.mark.parametrize("batch", [1, 7])
def test_other_batch_sizes_run(exported: Path, batch: int) -> None:
    assert ort_run(exported, torch.randn(batch, 1, 8, 8)).shape == (batch, 3)


def test_the_same_model_gives_the_same_bytes_whatever_the_batch_of_the_example(
    small: nn.Module, tmp_path: Path
) -> None:
    files = [tmp_path / f"{batch}.onnx" for batch in (1, 4)]
    for path, batch in zip(files, (1, 4), strict=True):
        export_onnx(small, torch.randn(batch, 1, 8, 8), path, opset=20)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_opset_19(small: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 1, 8, 8)
    export_onnx(small, x, tmp_path / "m.onnx", opset=19)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 19
    assert np.allclose(ort_run(tmp_path / "m.onnx", x), small(x).detach(), atol=1e-5)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_an_opset_outside_the_window_is_refused(small: nn.Module, tmp_path: Path, opset: int) -> None:
    with pytest.raises(StepError, match="19"):
        export_onnx(small, torch.randn(2, 1, 8, 8), tmp_path / "m.onnx", opset=opset)


def test_exporting_is_quiet_and_leaves_the_model_as_it_was(
    small: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    small.train()
    small.pool.eval()
    x = torch.randn(4, 1, 8, 8)
    state = {key: value.clone() for key, value in small.state_dict().items()}
    before = small(x)
    export_onnx(small, x, tmp_path / "m.onnx", opset=20)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert small.training
    assert small.fc.training
    assert not small.pool.training
    assert torch.equal(small(x), before)
    assert all(torch.equal(state[key], value) for key, value in small.state_dict().items())


def test_a_model_without_quantizers_has_no_qdq(tmp_path: Path) -> None:
    model, x = Small().eval(), torch.randn(3, 1, 8, 8)
    export_onnx(model, x, tmp_path / "m.onnx", opset=20)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {
        node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node
    }
    assert np.allclose(ort_run(tmp_path / "m.onnx", x), model(x).detach(), atol=1e-5)


def test_a_half_layer_has_half_scales(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.half()).float()

    model, x = Half(), torch.randn(3, 6)
    quantize(model, x)
    export_onnx(model, x, tmp_path / "m.onnx", opset=20)
    graph = onnx.load(tmp_path / "m.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {types[n.input[1]] for n in graph.node if n.op_type == "QuantizeLinear"} == {onnx.TensorProto.FLOAT16}
    with torch.no_grad():
        assert np.allclose(ort_run(tmp_path / "m.onnx", x), model(x), atol=5e-3)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_float_lstm_with_projections_gives_what_torch_gives(bidirectional: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, proj_size=2, bidirectional=bidirectional)
    model = Branches(lstm=(lstm, (5, 3)))
    x = model.example(6)
    export_onnx(model, x[:2], tmp_path / "m.onnx", opset=20)
    with torch.no_grad():
        wanted = torch.cat(model.results(x), dim=1)
    assert torch.allclose(torch.from_numpy(ort_run(tmp_path / "m.onnx", x)), wanted, atol=1e-6)
    assert "forward" not in vars(lstm)


@pytest.mark.parametrize(("sizes", "pools"), [((4, 2), 2), ((4, 3), 1)])
def test_adaptive_average_pools_are_average_pools_in_their_own_type_where_they_divide(
    sizes: tuple[int, ...], pools: int, tmp_path: Path
) -> None:
    layers = (nn.Conv2d(2, 3, 3, padding=1), *map(nn.AdaptiveAvgPool2d, sizes))
    model = nn.Sequential(*layers).eval()
    x = torch.randn(3, 2, 8, 8)
    export_onnx(model, x, tmp_path / "m.onnx", opset=20)
    assert np.allclose(ort_run(tmp_path / "m.onnx", x), model(x).detach(), atol=1e-6)
    export_onnx(model.half(), x.half(), tmp_path / "half.onnx", opset=20)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    found = [types[node.output[0]] for node in graph.node if node.op_type == "AveragePool"]
    assert found.count(onnx.TensorProto.FLOAT16) == pools


def test_rrelu_gives_what_torch_gives_in_eval_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.RReLU(0.1, 0.5)).eval()
    x = torch.randn(4, 6)
    export_onnx(model, x, tmp_path / "m.onnx", opset=19)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(ort_run(tmp_path / "m.onnx", x)), model(x), atol=1e-6)


class Attention(nn.Module):
    def __init__(self, heads: bool, **settings: object) -> None:
        super().__init__()
        self.heads, self.settings = heads, settings

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part[:, None] if self.heads else part for part in (x, x + 1, x.flip(-1)))
        mask = (x @ x.mT > 0) if self.settings.get("masked") else self.settings.get("attn_mask")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal="is_causal" in self.settings)


@pytest.mark.parametrize(
    ("heads", "settings"),
    [
        (False, {}),
        (False, {"is_causal": True}),
        (False, {"attn_mask": torch.ones(5, 5).tril()}),
        (False, {"masked": True}),
        (True, {"is_causal": True}),
    ],
)
def test_attention_without_heads_too(heads: bool, settings: dict[str, object], tmp_path: Path) -> None:
    model, x = Attention(heads, **settings).eval(), torch.randn(4, 5, 6)
    export_onnx(model, x[:2], tmp_path / "m.onnx", opset=20)
    assert np.allclose(ort_run(tmp_path / "m.onnx", x), model(x), atol=1e-6)


def test_a_float_lstm_stays_one_node(tmp_path: Path) -> None:
    model = Branches(lstm=(nn.LSTM(3, 4, batch_first=True), (5, 3)))
    export_onnx(model, model.example(2), tmp_path / "m.onnx", opset=20)
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node].count("LSTM") == 1


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Packs(nn.Module):
    """Reads sequences up to their padding of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x != 0).any(-1).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.gru(packed)[1].transpose(0, 1).flatten(1)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


class TestErrors:
    @pytest.fixture(autouse=True)
    def _quiet_and_no_file(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        yield
        assert capfd.readouterr() == ("", "")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("layer", "shape", "message"),
        [
            (Branching(), (4,), r"^1: cannot be traced: .*data-dependent"),
            (FixedBatch(), (4,), r"fixes the batch size"),
            (Packs(), (6, 3), r"^1.gru: sequences are packed .*(?s:.)*mask the padding"),
            (nn.Linear(5, 3), (4,), r"^1: cannot be traced"),
            (nn.AdaptiveAvgPool3d(3), (2, 4, 4, 4), r"^1: aten\._adaptive_avg_pool3d has no ONNX form"),
            (
                nn.AvgPool2d(2, ceil_mode=True, divisor_override=3),
                (2, 5, 5),
                r"^1: aten\.avg_pool2d .*divisor_override",
            ),
            (TwoOutputs(), (4,), r"2 outputs"),
        ],
    )
    def test_what_cannot_be_exported_is_named(
        self, layer: nn.Module, shape: tuple[int, ...], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(StepError, match=message):
            export_onnx(nn.Sequential(nn.ReLU(), layer), torch.randn(2, *shape), tmp_path / "m.onnx", opset=20)

    def test_a_range_that_is_not_set(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        quantize_layer(model[0], name="0", input=QuantSpec(), weight=QuantSpec(axis=0))
        with pytest.raises(StepError, match=r"0\.input: the range"):
            export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx", opset=20)
        assert all(quantizer.enabled for quantizer in quantizers(model).values())


def test_a_quantized_file_builds_in_tensorrt_rtx(exported: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(exported)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, 1, 8, 8), (4, 1, 8, 8), (8, 1, 8, 8))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 1000
