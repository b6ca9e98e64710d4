"""The table of models that maseRT brings along; torch is imported only when one is built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    Attributes:
        factory: "module:function"; called with num_classes, input_shape and the options of [model] args.
        description: one line for listings.
        expects: the inputs it takes, in words.
        input_shape: the shape of one input it was designed for, without the batch.
        num_classes: outputs when the data does not say how many classes there are.
    """

    factory: str
    description: str
    expects: str
    input_shape: tuple[int, ...]
    num_classes: int


_NETS = "maseRT.models.nets"
_IMAGES = "images [C, H, W]"
_SEQUENCES = "sequences [steps, features], or images read row by row"

ZOO: dict[str, ZooEntry] = {
    "digits-cnn": ZooEntry(
        f"{_NETS}.convnet:digits_cnn", "3 convolutions with BatchNorm, 23k parameters at 1x8x8", _IMAGES, (1, 8, 8), 10
    ),
    "fashion-cnn": ZooEntry(
        f"{_NETS}.convnet:fashion_cnn",
        "3 convolutions with BatchNorm, 61k parameters at 1x28x28",
        _IMAGES,
        (1, 28, 28),
        10,
    ),
    "toy-convnet": ZooEntry(
        f"{_NETS}.convnet:toy_convnet",
        "2 Conv2d, 2 Conv1d and a Linear without BatchNorm (MASE)",
        _IMAGES,
        (3, 32, 32),
        10,
    ),
    "vgg7": ZooEntry(
        f"{_NETS}.vgg:vgg7",
        "CIFAR-10 VGG with BatchNorm: conv 128-128-256-256-512-512, linear 1024-1024 (MASE)",
        f"{_IMAGES}, sides of 8 or more",
        (3, 32, 32),
        10,
    ),
    "jsc-toy": ZooEntry(
        f"{_NETS}.jsc:jsc_toy", "jet tagging: linear 16-8-8-5 with BatchNorm and ReLU (MASE)", "features [16]", (16,), 5
    ),
    "mobilenetv2": ZooEntry(
        f"{_NETS}.mobilenet:mobilenetv2", "torchvision's mobilenet_v2", _IMAGES, (3, 224, 224), 1000
    ),
    "mobilenetv3-small": ZooEntry(
        f"{_NETS}.mobilenet:mobilenetv3_small", "torchvision's mobilenet_v3_small", _IMAGES, (3, 224, 224), 1000
    ),
    "resnet18": ZooEntry(f"{_NETS}.resnet:resnet18", "torchvision's resnet18", _IMAGES, (3, 224, 224), 1000),
    "resnet50": ZooEntry(f"{_NETS}.resnet:resnet50", "torchvision's resnet50", _IMAGES, (3, 224, 224), 1000),
    "vit-b-16": ZooEntry(
        f"{_NETS}.vit:vit_b_16", "torchvision's vit_b_16", f"{_IMAGES}, sides multiples of 16", (3, 224, 224), 1000
    ),
    "transformer-classifier": ZooEntry(
        f"{_NETS}.transformer:transformer_classifier",
        "2 encoder layers of width 64 over patches or steps",
        "images [C, H, W], sides multiples of the patch, or sequences [steps, features]",
        (1, 8, 8),
        10,
    ),
    "transformer-d384": ZooEntry(
        f"{_NETS}.transformer:transformer_d384",
        "6 encoder layers of width 384; 197 tokens at 3x224x224",
        "images [C, H, W], sides multiples of 16, or sequences [steps, features]",
        (3, 224, 224),
        1000,
    ),
    "lstm-classifier": ZooEntry(
        f"{_NETS}.sequence:lstm_classifier", "bidirectional LSTM of width 64 and a Linear", _SEQUENCES, (29, 12), 9
    ),
    "conv1d-classifier": ZooEntry(
        f"{_NETS}.sequence:conv1d_classifier", "3 Conv1d with BatchNorm and a Linear", _SEQUENCES, (29, 12), 9
    ),
}
