"""Checkpoints of NVIDIA's pytorch-quantization: the quantized model computes what the trained one did."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from library_models import (
    LIBRARY,
    Digits,
    Plain,
    Residual,
    Rows,
    Upsampling,
    library_modules,
    outputs,
    rule,
    sqnr_db,
    train,
    trained,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from maseRT.config import QuantizeSection
from maseRT.config_file import load_config
from maseRT.errors import StepError, UsageError
from maseRT.models.build import build_model
from maseRT.models.checkpoint import load_checkpoint
from maseRT.models.nets.convnet import digits_cnn
from maseRT.models.weights import fit_names, load_weights
from maseRT.onnx_graph import count_qdq
from maseRT.plan import Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.progress import Silent
from maseRT.quant import make_plan, quantize_model, quantizers
from maseRT.quant.observe import load_amax
from maseRT.quant.plan_from_ranges import plan_from_ranges
from maseRT.steps.pipeline import Run
from maseRT.workspace import Workspace

quant_nn = pytest.importorskip("pytorch_quantization.nn")
QuantDescriptor = pytest.importorskip("pytorch_quantization.tensor_quant").QuantDescriptor


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load()


def follow(
    library: nn.Module, build: Callable[[], nn.Module], digits: Digits, folder: Path, section: QuantizeSection = LIBRARY
) -> tuple[nn.Module, Plan]:
    """The way from the library's state dict to a quantized model, as the quantize step goes it."""
    path = folder / "library.pt"
    torch.save(library.state_dict(), path)
    checkpoint = load_checkpoint(path, kind="pytorch-quantization")
    model = build().eval()
    load_weights(model, checkpoint, where=path.name)
    fitted, _ = fit_names(checkpoint, model, where=path.name)

    def make(section: QuantizeSection) -> Plan:
        return make_plan(model, digits.images[:2], section, model_name="net")

    plan, ranges = plan_from_ranges(model, section, fitted.amax, make=make, where=path.name)
    plan = Plan.from_json(plan.to_json())
    quantize_model(model, plan)
    load_amax(model, ranges)
    return model, plan


def assert_same(expected: Tensor, got: Tensor) -> None:
    """Equal but for float rounding, and what a rounding changes where a value lies between two levels."""
    assert torch.equal(expected.argmax(1), got.argmax(1))
    assert sqnr_db(expected, got) > 55


def test_outputs_of_a_checkpoint_without_batchnorm_are_the_librarys_bit_for_bit(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    model, plan = follow(library, Plain, digits, tmp_path)
    assert [layer.name for layer in plan.layers if layer.precision is Precision.INT8] == ["conv", "wide", "pool", "fc"]
    assert torch.equal(outputs(library, digits.images), outputs(model, digits.images))
    native, _ = follow(library, Plain, digits, tmp_path, QuantizeSection())
    assert_same(outputs(library, digits.images), outputs(native, digits.images))


@pytest.mark.parametrize("backend", ["native", "pytorch-quantization"])
@pytest.mark.parametrize("placement", ["tensorrt", "layerwise"])
def test_outputs_of_a_checkpoint_with_batchnorm(digits: Digits, tmp_path: Path, backend: str, placement: str) -> None:
    def build() -> nn.Module:
        return digits_cnn(num_classes=10, input_shape=(1, 8, 8))

    library = trained(build, digits)
    amax = library.conv2._weight_quantizer.amax.flatten()
    assert bool((library.conv2.weight.abs().amax((1, 2, 3)) > amax).any()), "training left the ranges"
    with torch.no_grad():
        library.bn3.weight[0] = 0
        library.bn2.weight[3] *= -1
        library.conv2.weight[3].clamp_(-amax[3], amax[3])
        library.conv2.weight[3, 0, 0, 0] = -1.5 * amax[3]
    model, plan = follow(library, build, digits, tmp_path, QuantizeSection(backend=backend, placement=placement))
    assert len(plan.folds) == 3
    assert "negative gains of bn2 turn 1 weights from -128 to 127" in plan.notes
    assert [layer.name for layer in plan.layers if layer.weighted and layer.precision.is_float] == []
    assert_same(outputs(library, digits.images), outputs(model, digits.images))
    assert (outputs(library, digits.images).argmax(1) == digits.labels).float().mean() > 0.8


def test_the_folded_weights_keep_their_levels(digits: Digits, tmp_path: Path) -> None:
    library = trained(Residual, digits)
    model, _ = follow(library, Residual, digits, tmp_path)
    for name in ("stem", "conv1", "conv2"):
        before = library.get_submodule(name)
        quantizer = before._weight_quantizer
        levels = quantizer(before.weight) / quantizer.amax * 127
        after = model.get_submodule(name)
        scale = after.weight_quantizer.scale.view(-1, 1, 1, 1)
        folded_levels = after.weight_quantizer(after.weight) / scale
        sign = library.get_submodule({"stem": "bn0", "conv1": "bn1", "conv2": "bn2"}[name]).weight.sign()
        torch.testing.assert_close(folded_levels, levels * sign.view(-1, 1, 1, 1), atol=1e-3, rtol=0)


def test_a_batchnorm_that_would_turn_many_weights_of_the_lowest_level_stays(digits: Digits, tmp_path: Path) -> None:
    library = trained(Residual, digits)
    amax = library.conv1._weight_quantizer.amax.flatten()
    with torch.no_grad():
        library.bn1.weight[2] = -0.7
        library.conv1.weight[2] = -2 * amax[2]
    model, plan = follow(library, Residual, digits, tmp_path)
    assert [fold.batchnorm for fold in plan.folds] == ["bn0", "bn2"]
    assert any("bn1: not folded" in note for note in plan.notes)
    assert_same(outputs(library, digits.images), outputs(model, digits.images))


def test_ranges_per_tensor_become_ranges_per_channel_behind_a_fold(digits: Digits, tmp_path: Path) -> None:
    with library_modules():
        library = Residual()
    for name in ("stem", "conv1", "conv2", "fc"):
        library.get_submodule(name)._weight_quantizer = quant_nn.TensorQuantizer(QuantDescriptor())
    train(library, digits)
    model, plan = follow(library, Residual, digits, tmp_path)
    assert plan.of("fc").weight == QuantSpec()
    assert plan.of("conv1").weight == QuantSpec(axis=0)
    assert_same(outputs(library, digits.images), outputs(model, digits.images))


def test_a_quantized_shortcut(digits: Digits, tmp_path: Path) -> None:
    library = trained(lambda: Residual(quant_nn.TensorQuantizer(QuantDescriptor())), digits)
    model, plan = follow(library, Residual, digits, tmp_path)
    assert [site.name for site in plan.sites] == ["add.1"]
    assert_same(outputs(library, digits.images), outputs(model, digits.images))
    with pytest.raises(UsageError, match="range for the shortcut of the model, where the plan quantizes 0 additions"):
        follow(library, Residual, digits, tmp_path, QuantizeSection(placement="layerwise"))
    _, plan = follow(library, Residual, digits, tmp_path, rule("conv2"))
    assert "ranges that the config leaves unused: conv2, residual" in plan.notes
    without = trained(Residual, digits)
    model, plan = follow(without, Residual, digits, tmp_path)
    assert plan.sites == ()
    assert "operands that stay float, as the checkpoint has no ranges for them: add.1" in plan.notes
    assert_same(outputs(without, digits.images), outputs(model, digits.images))


def test_transposed_convolutions_need_ranges_of_their_output_channels(digits: Digits, tmp_path: Path) -> None:
    library = trained(Upsampling, digits)
    with pytest.raises(
        UsageError, match=r"ranges of shape \[8, 1, 1, 1\] .* takes one per output channel, \[1, 8, 1, 1\]"
    ):
        follow(library, Upsampling, digits, tmp_path)
    _, plan = follow(library, Upsampling, digits, tmp_path, rule("up"))
    assert plan.of("up").precision is Precision.FP32
    assert "ranges that the config leaves unused: up" in plan.notes


@pytest.mark.parametrize(("groups", "folds"), [(1, 1), (2, 0)])
def test_transposed_convolutions_with_ranges_of_their_output_channels(
    digits: Digits, tmp_path: Path, groups: int, folds: int
) -> None:
    def build() -> nn.Module:
        return Upsampling(groups)

    with library_modules():
        library = build()
    library.up._weight_quantizer = quant_nn.TensorQuantizer(QuantDescriptor(axis=(1)))
    train(library, digits)
    model, plan = follow(library, build, digits, tmp_path)
    assert len(plan.folds) == folds
    assert_same(outputs(library, digits.images), outputs(model, digits.images))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_lstms(digits: Digits, tmp_path: Path, options: dict) -> None:
    def build() -> nn.Module:
        return Rows(**options)

    library = trained(build, digits)
    for quantizer in library.lstm._input_quantizers:
        quantizer.amax = 1.0
    model, plan = follow(library, build, digits, tmp_path)
    assert [layer.precision for layer in plan.layers if layer.weighted] == [Precision.INT8, Precision.INT8]
    torch.testing.assert_close(outputs(model, digits.images), outputs(library, digits.images), atol=2e-3, rtol=0)
    assert sqnr_db(outputs(library, digits.images), outputs(model, digits.images)) > 50
    if options.get("bidirectional"):
        library.lstm._input_quantizers[1].amax = 0.9
        with pytest.raises(UsageError, match="the two directions of layer 0 quantize their input with different"):
            follow(library, build, digits, tmp_path)


def test_layers_without_ranges_stay_float(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    library.fc = nn.Linear(128, 10)
    del library.wide._input_quantizer._amax
    library.wide._input_quantizer.disable()
    model, plan = follow(library, Plain, digits, tmp_path)
    assert plan.of("fc").precision is Precision.FP32
    assert plan.of("fc").reason == "the checkpoint has no ranges for it"
    assert (plan.of("wide").input, plan.of("wide").weight) == (None, QuantSpec(axis=0))
    assert torch.equal(outputs(library, digits.images), outputs(model, digits.images))


def test_rules_and_ranges_that_do_not_go_together(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    _, plan = follow(library, Plain, digits, tmp_path, rule("fc"))
    assert "ranges that the config leaves unused: fc" in plan.notes
    assert not any("decides nothing" in note for note in plan.notes)
    _, plan = follow(library, Plain, digits, tmp_path, QuantizeSection(precision=Precision.FP32))
    assert not plan.has_int8
    assert "ranges that the config leaves unused: conv, wide, pool, fc" in plan.notes
    library.fc = nn.Linear(128, 10)
    with pytest.raises(UsageError, match="no ranges for fc, which a rule makes INT8"):
        follow(library, Plain, digits, tmp_path, rule("fc", Precision.INT8))
    library.register_module("_extra_quantizer", library.conv._input_quantizer)
    with pytest.raises(UsageError, match="ranges that the model has no place for: extra"):
        follow(library, Plain, digits, tmp_path)


def test_a_layer_that_the_library_trained_wrongly_is_refused(digits: Digits, tmp_path: Path) -> None:
    def build() -> nn.Module:
        convolution = nn.Conv2d(1, 8, 3, padding=1, padding_mode="replicate")
        return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    library = trained(build, digits)
    for section in (LIBRARY, QuantizeSection()):
        with pytest.raises(UsageError, match="with 0 quantized, which cannot be loaded: pytorch-quantization pads"):
            follow(library, build, digits, tmp_path, section)
    _, plan = follow(library, build, digits, tmp_path, rule("0"))
    assert plan.of("3").precision is Precision.INT8


def test_a_range_of_zero_is_named(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    library.wide._input_quantizer._amax.zero_()
    with pytest.raises(StepError, match=r"wide\.input: the range is 0"):
        follow(library, Plain, digits, tmp_path)


CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "digits-cnn"
checkpoint = "{checkpoint}"
kind = "pytorch-quantization"
[data]
name = "digits"
batch_size = 128
[quantize]
backend = "pytorch-quantization"
[calibrate]
batches = 2
[finetune]
epochs = 1
initial_learning_rate = 1e-4
[export]
"""


def test_the_pipeline_keeps_and_trains_on_from_the_checkpoints_ranges(digits: Digits, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return digits_cnn(num_classes=10, input_shape=(1, 8, 8))

    library = trained(build, digits)
    torch.save({"state_dict": {f"model.{k}": v for k, v in library.state_dict().items()}}, tmp_path / "trained.ckpt")
    path = tmp_path / "digits.toml"
    path.write_text(CONFIG.format(checkpoint=tmp_path / "trained.ckpt"))
    config, workspace = load_config(path), Workspace(tmp_path / "out", "digits")
    outcomes = {outcome.step: outcome for outcome in Run(config, path, workspace, Silent(), False).transform()}
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 4
    assert "the ranges come from the checkpoint" in outcomes["calibrate"].headline
    plan = Plan.from_json(json.loads(workspace.final_plan.read_text()))
    model = quantize_model(build_model(config.model, num_classes=10, input_shape=(1, 8, 8)), plan)
    model.load_state_dict(load_file(workspace.calibrated_checkpoint))
    assert_same(outputs(library, digits.images), outputs(model.eval(), digits.images))
    assert count_qdq(workspace.onnx) == len(quantizers(model)) == 10
    tuned = load_file(workspace.epoch_checkpoint(1))
    np.testing.assert_allclose(tuned["fc2.weight_quantizer.amax"], tuned["fc2.weight"].abs().amax(1), rtol=1e-2)
    assert tuned["fc2.input_quantizer.amax"] == library.fc2._input_quantizer.amax
