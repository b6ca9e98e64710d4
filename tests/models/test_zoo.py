import hashlib
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from maseRT.config import ModelSection
from maseRT.errors import UsageError
from maseRT.models.build import build_model
from maseRT.models.check import check_model
from maseRT.models.zoo import ZOO

# sha256 over the sorted "name shape" lines of torchvision 0.29.2's state dicts with 1000 classes, and their parameters
TORCHVISION = {
    "resnet18": ("867b8d8ae95f5a28c42c5b8a8409d5869ea42922a87e779dc263f79d0c746ff2", 11_689_512),
    "resnet50": ("2d5b8870b35e15302b693633772b7dd09604c71f966194756edea01b1c1ca347", 25_557_032),
    "mobilenetv2": ("b37e2a9130e6341bc6158c07707da3e63bbde46fdbffb1ff4d42ea45ff281e7e", 3_504_872),
    "mobilenetv3-small": ("4e84a246a3fc73835e191372d01789c2284fac451f1cfa615656b0aa1fea6593", 2_542_856),
    "vit-b-16": ("55c98fb7dfaa7147621a00df3cd3ea5b3894407776986fb151a8494fbb9de6e0", 86_567_656),
}

# zoo name -> state name -> shape, as the MASE project's checkpoints spell them
MASE = {
    "vgg7": {
        "feature_layers.0.weight": [128, 3, 3, 3],
        "feature_layers.3.bias": [128],
        "feature_layers.8.running_var": [256],
        "feature_layers.14.weight": [512, 256, 3, 3],
        "feature_layers.17.weight": [512, 512, 3, 3],
        "classifier.0.weight": [1024, 8192],
        "classifier.2.weight": [1024, 1024],
        "last_layer.weight": [10, 1024],
    },
    "jsc-toy": {
        "seq_blocks.0.running_mean": [16],
        "seq_blocks.2.weight": [8, 16],
        "seq_blocks.3.weight": [8],
        "seq_blocks.5.weight": [8, 8],
        "seq_blocks.8.bias": [5],
        "seq_blocks.9.weight": [5],
    },
    "toy-convnet": {
        "block_1.0.weight": [8, 3, 3, 3],
        "block_2.0.weight": [16, 8, 3, 3],
        "block_3.0.weight": [32, 16, 3],
        "block_4.0.weight": [64, 32, 3],
        "linear.weight": [10, 64],
    },
}


def build(name, shape, classes=None, **args):
    return build_model(ModelSection(name=name, args=args), num_classes=classes, input_shape=shape)


def test_the_table_imports_no_torch():
    code = "import sys, maseRT.models.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ZOO)
def test_every_model_classifies_the_input_it_was_designed_for(name):
    entry = ZOO[name]
    model = build(name, entry.input_shape)
    assert not model.training
    example = torch.randn(2, *entry.input_shape)
    logits = check_model(model, example)
    assert logits.shape == (2, entry.num_classes)
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (1, 8, 8)) for name in ("resnet18", "resnet50", "mobilenetv2", "mobilenetv3-small", "vgg7")),
        *((name, (3, 32, 32)) for name in ("resnet18", "mobilenetv2", "mobilenetv3-small", "digits-cnn")),
        *((name, (1, 28, 28)) for name in ("vgg7", "toy-convnet", "digits-cnn", "transformer-classifier")),
        ("vit-b-16", (1, 32, 48)),
        ("transformer-d384", (3, 32, 32)),
        ("transformer-d384", (20, 12)),
        ("transformer-classifier", (29, 12)),
        ("transformer-classifier", (3, 64, 64)),
        ("lstm-classifier", (1, 8, 8)),
        ("conv1d-classifier", (3, 9, 8)),
        ("jsc-toy", (7,)),
    ],
)
def test_models_follow_the_shape_and_the_classes_of_the_data(name, shape):
    model = build(name, shape, 7)
    assert check_model(model, torch.randn(3, *shape)).shape == (3, 7)
    model.train()
    assert model(torch.randn(4, *shape)).shape == (4, 7)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18", (16,), r"resnet18 takes images \[C, H, W\]; one input of this data set is 16"),
        ("vgg7", (3, 4, 32), "sides of 8 or more; one input of this data set is 3x4x32"),
        ("digits-cnn", (1, 2, 2), "sides of 4 or more"),
        ("vit-b-16", (3, 224, 220), "multiples of the patch, 16; one input of this data set is 3x224x220"),
        ("transformer-classifier", (1, 9, 8), "multiples of the patch, 2"),
        ("jsc-toy", (1, 8, 8), "feature vectors; one input of this data set is 1x8x8"),
        ("lstm-classifier", (16,), r"sequences \[steps, features\]; one input of this data set is 16"),
    ],
)
def test_inputs_that_a_model_cannot_take(name, shape, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(name, shape, 10)
    assert caught.value.fix


@pytest.mark.parametrize("name", TORCHVISION)
def test_state_names_and_shapes_are_torchvisions(name):
    model = build(name, (3, 224, 224))
    lines = sorted(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
    digest, parameters = TORCHVISION[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", MASE)
def test_state_names_and_shapes_are_mases(name):
    state = build(name, ZOO[name].input_shape).state_dict()
    assert {key: list(state[key].shape) for key in MASE[name]} == MASE[name]


def test_vgg7_has_the_widths_of_its_name():
    model = build("vgg7", (3, 32, 32))
    convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    linears = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert (convolutions, linears) == ([128, 128, 256, 256, 512, 512], [1024, 1024, 10])


def test_the_wide_transformer_has_197_tokens():
    model = build("transformer-d384", (3, 224, 224))
    assert model.positions.shape == (1, 197, 384)
    assert sum(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()) == 6


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "mobilenetv3-small"])
def test_the_small_stem_keeps_more_of_a_small_image(name):
    def final_size(model):
        sizes = []
        model.avgpool.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
        model(torch.randn(1, 3, 32, 32))
        return sizes[0]

    assert final_size(build(name, (3, 32, 32), 10, stem="small")) > final_size(build(name, (3, 32, 32), 10))
    with pytest.raises(UsageError, match='stem is "imagenet" or "small", not \'smal\''):
        build(name, (3, 32, 32), 10, stem="smal")


@pytest.mark.parametrize("name", ["lstm-classifier", "conv1d-classifier"])
def test_channels_first_reads_the_transposed_sequence(name):
    model = build(name, (9, 4), 3)
    other = build(name, (4, 9), 3, channels_first=True)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 9, 4)
    assert torch.equal(other(x.transpose(1, 2)), model(x))


def test_images_are_read_row_by_row():
    image = build("lstm-classifier", (2, 5, 3), 4)
    sequence = build("lstm-classifier", (5, 6), 4)
    sequence.load_state_dict(image.state_dict())
    x = torch.randn(2, 2, 5, 3)
    rows = torch.stack([x[:, :, row].flatten(1) for row in range(5)], dim=1)
    assert torch.equal(sequence(rows), image(x))


@pytest.mark.parametrize(
    "name", ["digits-cnn", "toy-convnet", "jsc-toy", "mobilenetv3-small", "transformer-classifier", "lstm-classifier"]
)
def test_models_can_be_traced(name):
    shape = (1, 32, 32) if name == "mobilenetv3-small" else ZOO[name].input_shape
    model = build(name, shape, 5)
    x = torch.randn(3, *shape)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_digits_cnn_learns_the_digits():
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = build("digits-cnn", (1, 8, 8), 10).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(8):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    assert accuracy > 0.97
