import importlib
import sys

import pytest
import torch

from maseRT.config import ModelSection
from maseRT.errors import MissingError, UsageError
from maseRT.models.build import build_model
from maseRT.models.check import check_model

# Stands in for a package that may be missing here: what maseRT hands over is what the real one is called with.
TIMM = """
from torch import nn
def list_models():
    return ["resnet18", "resnet50"]
def is_model(name):
    return name in list_models()
def create_model(name, pretrained, num_classes, in_chans, **options):
    if options:
        raise TypeError(f"unexpected {sorted(options)}")
    assert pretrained is False
    return nn.Sequential(nn.Conv2d(in_chans, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def build(name, **args):
    return build_model(ModelSection(name=name, args=args), num_classes=7, input_shape=(3, 32, 32))


def importable(package):
    try:
        importlib.import_module(package)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("package", ["timm", "torchvision", "transformers"])
def test_a_package_that_is_not_installed(package, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(MissingError, match=f"{package} is not installed") as caught:
        build(f"{package}:resnet18")
    assert caught.value.fix == f"pip install {package}"


def test_a_package_that_needs_another(write):
    write("timm/__init__.py", "import torchvision_that_is_not_there")
    sys.path.insert(0, "")
    sys.modules.pop("timm", None)
    with pytest.raises(MissingError, match="timm needs torchvision_that_is_not_there, which is not installed"):
        build("timm:resnet18")


def test_a_torchvision_of_another_torch(write):
    write("torchvision/__init__.py", "raise RuntimeError('operator torchvision::nms does not exist')")
    sys.path.insert(0, "")
    sys.modules.pop("torchvision", None)
    with pytest.raises(MissingError, match="torchvision is installed but does not import: operator") as caught:
        build("torchvision:resnet18")
    assert f"belongs to torch {torch.__version__}" in caught.value.fix


@pytest.fixture
def timm(write):
    write("timm/__init__.py", TIMM)
    sys.path.insert(0, "")
    sys.modules.pop("timm", None)


@pytest.mark.usefixtures("timm")
def test_classes_and_channels_go_to_timm():
    model = build("timm:resnet18")
    assert check_model(model, torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert build("timm:resnet18", num_classes=4)[0].out_channels == 4


@pytest.mark.usefixtures("timm")
def test_a_name_that_timm_does_not_have():
    with pytest.raises(UsageError, match=r"timm has no model 'resnet19'; did you mean 'resnet18'\?"):
        build("timm:resnet19")


@pytest.mark.usefixtures("timm")
def test_what_timm_raises_is_shown():
    with pytest.raises(UsageError, match=r"timm cannot build 'resnet18': TypeError: unexpected \['depth'\]"):
        build("timm:resnet18", depth=3)


@pytest.mark.skipif(not importable("transformers"), reason="transformers does not import here")
def test_a_transformers_model_takes_one_tensor_and_gives_logits():
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    model = build("transformers:vit", **small)
    assert check_model(model, torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.skipif(not importable("torchvision"), reason="torchvision does not import here")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_torchvision_model(name):
    assert check_model(build(f"torchvision:{name}"), torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(UsageError, match="did you mean"):
        build("torchvision:resnet19")


@pytest.mark.skipif(not importable("torchvision"), reason="torchvision does not import here")
def test_the_zoo_gives_what_torchvision_gives():
    theirs = build("torchvision:mobilenet_v3_small")
    ours = build("mobilenetv3-small")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.skipif(not importable("timm"), reason="timm does not import here")
def test_a_timm_model():
    assert check_model(build("timm:resnet18"), torch.randn(2, 3, 32, 32)).shape == (2, 7)
