"""The first layer that diverges, in models trained on real digits, each with one layer broken on purpose."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from placement_nets import ResNet, SequenceNet, planned
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from maseRT.config import DriftLimits
from maseRT.drift import ladder
from maseRT.errors import MissingError
from maseRT.models.nets.convnet import digits_cnn
from maseRT.onnx_export import export_onnx
from maseRT.plan import Plan
from maseRT.quant import quantize_model, quantizers
from maseRT.quant.observe import load_amax, observe
from maseRT.runtimes.base import BatchRange, BuildOptions, EngineInfo, Session
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.analysis.divergence import explain, first_divergence
from maseRT.steps.analysis.layer_readers import EngineReader, LayerReader, OnnxReader, TorchReader

THRESHOLD_DB = 15.0


@dataclass
class Trained:
    """A network on digits: as trained, fake-quantized, and exported."""

    plan: Plan
    floating: nn.Module
    quantized: nn.Module
    onnx: Path
    samples: np.ndarray
    labels: np.ndarray

    def torch_readers(self, broken: nn.Module | None = None) -> tuple[TorchReader, TorchReader]:
        quantized = self.quantized if broken is None else broken
        return TorchReader(lambda: self.floating, self.plan.folds), TorchReader(lambda: quantized)


def inputs_for(net: nn.Module) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.from_numpy(digits.images[:512] / 16).float()[:, None]
    if isinstance(net, ResNet):
        images = F.interpolate(images, scale_factor=2).repeat(1, 3, 1, 1)
    if isinstance(net, SequenceNet):
        images = F.pad(images[:, 0], (0, 1, 0, 4))
    return images, torch.from_numpy(digits.target[:512]).long()


def train(net: nn.Module, folder: Path) -> Trained:
    images, labels = inputs_for(net)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    net.train()
    for step in range(24):
        part = slice(64 * (step % 8), 64 * (step % 8) + 64)
        optimizer.zero_grad()
        F.cross_entropy(net(images[part]), labels[part]).backward()
        optimizer.step()
    net.eval()
    net.input_shape = tuple(images.shape[1:])
    return quantized_and_exported(net, planned(net), folder)


def quantized_and_exported(net: nn.Module, plan: Plan, folder: Path) -> Trained:
    images, labels = inputs_for(net)
    quantized = quantize_model(copy.deepcopy(net), plan)
    with torch.no_grad(), observe(quantized) as histograms:
        quantized(images[:256])
    peaks = {name: h.max if h.spec.axis is not None else h.max[0] for name, h in histograms.items()}
    for tie in plan.ties:
        peaks |= dict.fromkeys(tie, torch.stack([peaks[name] for name in tie]).max())
    load_amax(quantized, peaks)
    path = folder / f"{type(net).__name__}.onnx"
    export_onnx(quantized, images[:2], path, opset=20)
    return Trained(plan, net, quantized, path, images[:32].numpy(), labels[:32].numpy())


NETS: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: digits_cnn(num_classes=10, input_shape=(1, 8, 8)),
    "resnet": ResNet,
    "lstm": SequenceNet,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def _trained(name: str) -> Trained:
        if name not in made:
            torch.manual_seed(0)
            made[name] = train(NETS[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return _trained


def narrowed(model: nn.Module, quantizer: str) -> nn.Module:
    """Return the model with a range that is ten times too small."""
    broken = copy.deepcopy(model)
    quantizers(broken)[quantizer].amax.div_(10)
    return broken


def with_weight(path: Path, out: Path, name: str) -> Path:
    """Write the file with one layer's weights mixed up."""
    model = onnx.load(path)
    weight = next(each for each in model.graph.initializer if each.name == name)
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), name))
    onnx.save(model, out)
    return out


CNN_LAYERS = ("conv1", "conv2", "conv3", "fc1", "fc2")
RESNET_LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer2.0.downsample.0", "fc")


@pytest.mark.parametrize("net", ["cnn", "resnet"])
def test_a_range_ten_times_too_small_is_found_in_the_fake_quantized_model(trained, net: str) -> None:
    """Every layer in turn, its input and its weights, with the threshold that follows from the default limits."""
    case = trained(net)
    found = {}
    for name in quantizers(case.quantized):
        layer = name.rpartition(".")[0]
        if not layer.endswith(".add"):
            readers: dict[str, LayerReader] = dict(
                zip(("float", "int8"), case.torch_readers(narrowed(case.quantized, name)), strict=True)
            )
            (rung,) = explain(climbed(readers, case, DriftLimits()), readers, case.samples, DriftLimits())
            found[name] = (layer, rung.divergence.layer, rung.divergence.note)
    assert len(found) >= 7
    assert {name: got for name, (_, *got) in found.items()} == {
        name: [layer, ""] for name, (layer, *_) in found.items()
    }


def test_a_broken_shortcut_shows_in_the_layer_that_reads_the_sum(trained) -> None:
    net = trained("resnet")
    source, target = net.torch_readers(narrowed(net.quantized, "layer2.0.add.1_quantizer"))
    found = first_divergence(source, target, net.samples, threshold_db=THRESHOLD_DB)
    assert (found.layer, found.before) == ("layer2.0.relu (call 2)", "layer2.0.conv2")


@pytest.mark.parametrize("net", ["cnn", "resnet", "lstm"])
def test_nothing_is_found_where_nothing_is_wrong(trained, net: str) -> None:
    case = trained(net)
    readers: list[LayerReader] = [*case.torch_readers(), OnnxReader(case.onnx), OnnxReader(case.onnx, "disabled")]
    for source, target in pairwise(readers):
        found = first_divergence(source, target, case.samples, threshold_db=THRESHOLD_DB)
        assert (found.layer, found.before) == ("", "")
        assert found.compared > (3 if source.fuses == target.fuses else 0)


@pytest.mark.parametrize(("net", "layer"), [*(("cnn", each) for each in CNN_LAYERS), ("lstm", "lstm"), ("lstm", "fc")])
def test_a_changed_weight_is_found_in_the_file(trained, tmp_path: Path, net: str, layer: str) -> None:
    case = trained(net)
    weight = "val_110" if layer == "lstm" else f"{layer}.weight"
    path = with_weight(case.onnx, tmp_path / "m.onnx", weight)
    source = TorchReader(lambda: case.quantized)
    scanned = first_divergence(source, OnnxReader(path, "disabled"), case.samples, threshold_db=THRESHOLD_DB)
    assert scanned.layer == layer
    bisected = first_divergence(source, OnnxReader(path), case.samples, threshold_db=THRESHOLD_DB)
    assert (bisected.layer, bisected.before) == (layer, scanned.before)


@pytest.mark.parametrize("layer", RESNET_LAYERS)
def test_a_changed_weight_in_a_file_with_branches(trained, tmp_path: Path, layer: str) -> None:
    net = trained("resnet")
    path = with_weight(net.onnx, tmp_path / "m.onnx", f"{layer}.weight")
    source = TorchReader(lambda: net.quantized)
    found = first_divergence(source, OnnxReader(path, "disabled"), net.samples, threshold_db=THRESHOLD_DB)
    assert found.layer == layer


def test_the_float_model_against_the_file(trained, tmp_path: Path) -> None:
    """Rows in between may be missing: BatchNorms are folded in one of the two."""
    cnn = trained("cnn")
    path = with_weight(cnn.onnx, tmp_path / "m.onnx", "conv2.weight")
    found = first_divergence(cnn.torch_readers()[0], OnnxReader(path), cnn.samples, threshold_db=THRESHOLD_DB)
    assert found.layer == "conv2"


@dataclass
class StandInCompiler:
    """Makes "engines" for ONNX Runtime in which one layer's weights are mixed up.

    Attributes:
        weight: its weights; "" breaks none.
        unless: a layer's tensor; where it is an output, nothing is broken.
    """

    weight: str
    unless: str = ""
    builds: int = 0
    name: str = "stand-in"

    def missing(self) -> str | None:
        return None

    def build(self, onnx_file: Path, out: Path, options: BuildOptions) -> EngineInfo:
        self.builds += 1
        outputs = [value.name for value in onnx.load(onnx_file).graph.output]
        if self.weight and self.unless not in outputs:
            with_weight(onnx_file, out, self.weight)
        else:
            shutil.copy(onnx_file, out)
        return EngineInfo(self.name, "1", "8.9", None, (), "", "", 0.0, out.stat().st_size, None, "")


@dataclass
class StandInRuntime:
    """Runs them, in batches of 4 to 6."""

    why_not: str | None = None
    name: str = "stand-in"

    def missing(self, device: str | None = None) -> str | None:
        return self.why_not

    def open(self, artifact: Path, device: str) -> Session:
        if self.why_not:
            raise MissingError(self.why_not)
        session = OnnxRuntime().open(artifact, "cpu", threads=1, optimization="disabled")
        infer = session.infer

        def checked(feed):
            assert 4 <= len(feed["input"]) <= 6
            return infer(feed)

        session.infer = checked
        return session


def engine_reader(case: Trained, folder: Path, compiler: StandInCompiler, why_not: str | None = None) -> EngineReader:
    engine = folder / "model.trt"
    options = BuildOptions(batch=BatchRange(4, 6, 6))
    compiler.build(case.onnx, engine, options)
    compiler.builds = 0
    return EngineReader(engine, case.onnx, compiler, StandInRuntime(why_not), options)


@pytest.mark.parametrize(
    ("net", "layer"), [*(("cnn", each) for each in CNN_LAYERS), *(("resnet", each) for each in RESNET_LAYERS)]
)
def test_a_broken_layer_of_an_engine_is_found_with_few_builds(trained, tmp_path: Path, net: str, layer: str) -> None:
    case = trained(net)
    compiler = StandInCompiler(f"{layer}.weight")
    target = engine_reader(case, tmp_path, compiler)
    found = first_divergence(OnnxReader(case.onnx, "disabled"), target, case.samples, threshold_db=THRESHOLD_DB)
    assert found.layer == layer
    assert compiler.builds <= 6
    assert "in a build of its own" in found.note


def test_an_engine_against_torch_where_the_file_did_not_run(trained, tmp_path: Path) -> None:
    net = trained("resnet")
    target = engine_reader(net, tmp_path, StandInCompiler("layer2.0.conv1.weight"))
    found = first_divergence(TorchReader(lambda: net.quantized), target, net.samples, threshold_db=THRESHOLD_DB)
    assert found.layer == "layer2.0.conv1"


def test_an_engine_that_is_right_once_a_layer_is_read_names_the_fusion(trained, tmp_path: Path) -> None:
    cnn = trained("cnn")
    tensor = next(node.output[0] for node in onnx.load(cnn.onnx).graph.node if node.op_type == "MaxPool")
    target = engine_reader(cnn, tmp_path, StandInCompiler("conv2.weight", unless=tensor))
    found = first_divergence(OnnxReader(cnn.onnx, "disabled"), target, cnn.samples, threshold_db=THRESHOLD_DB)
    assert found.layer in ("conv2", "pool2")
    assert ("fused across it" in found.note) == (found.layer == "pool2")


def test_builds_are_bounded(trained, tmp_path: Path) -> None:
    net = trained("resnet")
    compiler = StandInCompiler("layer1.0.conv2.weight")
    target = engine_reader(net, tmp_path, compiler)
    found = first_divergence(OnnxReader(net.onnx, "disabled"), target, net.samples, threshold_db=15.0, looks=2)
    assert compiler.builds == 2
    assert "were not read" in found.note


def outputs_of(reader: LayerReader, samples: np.ndarray) -> np.ndarray:
    with reader.reading(()) as read:
        parts = [read(samples[start : start + 6]) for start in range(0, len(samples), 6)]
    return np.concatenate([part["@output"] for part in parts])


def climbed(readers: dict[str, LayerReader], case: Trained, limits: DriftLimits):
    outputs = {name: outputs_of(reader, case.samples) for name, reader in readers.items()}
    accuracies = {name: float((each.argmax(1) == case.labels).mean()) for name, each in outputs.items()}
    return ladder(outputs, accuracies, list(readers), limits)


def test_the_whole_ladder_with_a_broken_rung(trained, tmp_path: Path) -> None:
    cnn = trained("cnn")
    source, target = cnn.torch_readers()
    broken = with_weight(cnn.onnx, tmp_path / "m.onnx", "conv3.weight")
    readers: dict[str, LayerReader] = {"float": source, "int8": target, "onnx": OnnxReader(broken, threads=1)}
    rungs = explain(climbed(readers, cnn, DriftLimits()), readers, cnn.samples, DriftLimits())
    assert [(rung.source, rung.target, rung.holds) for rung in rungs] == [
        ("float", "int8", True),
        ("int8", "onnx", False),
    ]
    assert rungs[0].divergence is None
    assert rungs[1].divergence.layer == "conv3"


def test_rungs_that_hold_cost_nothing(trained) -> None:
    cnn = trained("cnn")

    def never() -> nn.Module:
        raise AssertionError

    readers: dict[str, LayerReader] = dict(zip(("float", "int8"), cnn.torch_readers(), strict=True))
    rungs = climbed(readers, cnn, DriftLimits())
    assert explain(rungs, {name: TorchReader(never) for name in readers}, cnn.samples, DriftLimits()) == rungs


def test_what_cannot_run_here_or_be_read_is_said(trained, tmp_path: Path) -> None:
    cnn = trained("cnn")
    engine = engine_reader(cnn, tmp_path, StandInCompiler("fc1.weight"))
    readers: dict[str, LayerReader] = {"onnx": OnnxReader(cnn.onnx), "engine": engine}
    rungs = climbed(readers, cnn, DriftLimits())
    readers["engine"] = replace(engine, runtime=StandInRuntime("no GPU here"))
    told = explain(rungs, readers, cnn.samples, DriftLimits())[0].divergence
    assert told.layer == ""
    assert "no GPU here" in told.note
    assert (
        "engine cannot be read"
        in explain(rungs, {"onnx": readers["onnx"]}, cnn.samples, DriftLimits())[0].divergence.note
    )


def test_outputs_that_are_not_finite(trained) -> None:
    cnn = trained("cnn")
    broken = copy.deepcopy(cnn.quantized)
    with torch.no_grad():
        broken.get_submodule("fc1").bias[0] = torch.nan
    source, target = cnn.torch_readers(broken)
    readers: dict[str, LayerReader] = {"float": source, "int8": target}
    limits = DriftLimits(accuracy_drop=None, agreement=None)
    (rung,) = explain(climbed(readers, cnn, limits), readers, cnn.samples, limits)
    assert (rung.holds, rung.divergence.layer, rung.divergence.sqnr_db) == (False, "fc1", None)
    assert "not finite" in rung.divergence.note


def test_noise_that_grows_from_layer_to_layer_is_no_layers_fault(trained) -> None:
    """The layer that crosses the threshold is named, and that it does not stand out."""
    cnn = trained("cnn")
    noisy = copy.deepcopy(cnn.floating)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    source, target = TorchReader(lambda: cnn.floating), TorchReader(lambda: noisy)
    worst = first_divergence(source, target, cnn.samples, threshold_db=100.0).sqnr_db
    found = first_divergence(source, target, cnn.samples, threshold_db=worst - 3)
    assert found.before
    assert "no single one stands out" in found.note


def test_onnxruntimes_own_optimizations_are_named(trained, tmp_path: Path) -> None:
    """It quantizes biases to 32 bits in steps of input scale * weight scale: a channel that is all bias overflows."""
    cnn = trained("cnn")
    model = copy.deepcopy(cnn.floating)
    batchnorm = model.get_submodule("bn2")
    with torch.no_grad():
        batchnorm.weight[:16].fill_(1e-9)
        batchnorm.bias[:16].fill_(1.0)
    case = quantized_and_exported(model, cnn.plan, tmp_path)
    readers: dict[str, LayerReader] = {
        "torch": TorchReader(lambda: case.quantized),
        "onnx": OnnxReader(case.onnx, threads=1),
    }
    (rung,) = explain(climbed(readers, case, DriftLimits()), readers, case.samples, DriftLimits())
    assert rung.divergence.layer == "conv2"
    assert "ONNX Runtime's optimizations are to blame" in rung.divergence.note


def test_samples_that_do_not_show_it(trained) -> None:
    cnn = trained("cnn")
    found = first_divergence(*cnn.torch_readers(), cnn.samples, threshold_db=5.0)
    assert found.layer == ""
    assert "no layer is below 5.0 dB" in found.note
