import sys
import types

import pytest
import torch
from torch import nn

from maseRT.config import ModelSection
from maseRT.errors import UsageError
from maseRT.models.build import build_model


def build(name, **args):
    return build_model(ModelSection(name=name, args=args), num_classes=10, input_shape=(1, 8, 8))


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(UsageError, match=r"no model 'digit-cnn'; did you mean 'digits-cnn'\?") as caught:
        build("digit-cnn")
    assert "package.module:factory" in caught.value.fix


def test_a_module_without_its_colon(write):
    write("my_nets.py", "")
    with pytest.raises(UsageError, match=r"no model 'my_nets\.make'; did you mean 'my_nets:make'\?"):
        build("my_nets.make")


def test_a_name_like_none_lists_the_zoo():
    with pytest.raises(UsageError, match=r"valid: digits-cnn, fashion-cnn, .*vit-b-16"):
        build("xyzzy")


def test_args_reach_the_zoo_and_win_over_the_data():
    assert build("transformer-classifier", depth=3, num_classes=4).head.out_features == 4
    assert len(build("transformer-classifier", depth=3).layers) == 3


def test_an_unknown_argument_brings_the_nearest():
    with pytest.raises(UsageError, match=r"takes no argument 'detph'; did you mean 'depth'\?"):
        build("transformer-classifier", detph=3)


def test_arguments_that_do_not_go_together():
    with pytest.raises(UsageError, match=r"cannot be built with these arguments: .*embed_dim must be divisible"):
        build("transformer-classifier", width=30, heads=4)


def test_data_without_a_number_of_classes_leave_the_models_own():
    model = build_model(ModelSection(name="digits-cnn"), num_classes=None, input_shape=(1, 8, 8))
    assert model.fc2.out_features == 10


def test_a_users_factory_gets_its_args_and_the_model_is_in_eval_mode(write):
    write("my_net.py", "from torch import nn\ndef make(width=2):\n    return nn.Linear(width, 3).train()")
    assert build("my_net:make").in_features == 2
    model = build("my_net:make", width=5)
    assert model.in_features == 5
    assert not model.training


def test_a_model_class_is_a_factory(write):
    write("my_class.py", "from torch import nn\nclass Net(nn.Module):\n    pass")
    assert type(build("my_class:Net")).__name__ == "Net"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def make():\n    raise ValueError('no weights here')",
            r"factory raised ValueError: no weights here \(.*:2\)",
        ),
        ("make = 3", "'make' is not callable, it is of type int"),
        ("def make():\n    return {'a': 1}", r"returned a dict, not a torch\.nn\.Module"),
        ("def make():\n    pass", r"returned a NoneType, not a torch\.nn\.Module"),
        ("from torch import nn\nmake = nn.Linear(2, 2)", "'make' is a model, not a factory"),
        ("from torch import nn\ndef make():\n    return nn.LazyLinear(3)", "parameters without a shape: weight, bias"),
        ("from torch import nn\ndef make():\n    return nn.Linear(2, 2).half()", "float16 instead of float32, such as"),
        (
            "from torch import nn\ndef make():\n    return nn.DataParallel(nn.ReLU())",
            "model is wrapped in DataParallel",
        ),
        ("import torch_extras_not_there", "raised ModuleNotFoundError: No module named 'torch_extras_not_there'"),
        ("def build():\n    pass", "no 'make'"),
    ],
)
def test_factories_that_cannot_be_used(write, text, message):
    write("bad_factory.py", text)
    with pytest.raises(UsageError, match=message):
        build("bad_factory:make")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, "the model is compiled"),
        (lambda net: nn.Sequential(torch.compile(net)), "0 is compiled"),
        (torch.jit.script, "the model is TorchScript"),
    ],
)
def test_models_that_hide_their_layers(monkeypatch, wrap, message):
    module = types.ModuleType("wrapping_module")
    module.make = lambda: wrap(nn.ReLU())
    monkeypatch.setitem(sys.modules, "wrapping_module", module)
    with pytest.raises(UsageError, match=message):
        build("wrapping_module:make")


def test_what_a_factory_raised_is_the_cause(write):
    write("causing_factory.py", "def make():\n    raise KeyError('depth')")
    with pytest.raises(UsageError) as caught:
        build("causing_factory:make")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_module_that_is_not_there(write):
    write("my_models.py", "")
    with pytest.raises(UsageError, match=r"no module 'my_model' .*did you mean 'my_models'\?"):
        build("my_model:make")


def test_random_weights_follow_the_seed():
    torch.manual_seed(3)
    first = build("resnet18")
    torch.manual_seed(3)
    second = build("resnet18")
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert isinstance(first, nn.Module)
