import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from maseRT.config import ModelSection
from maseRT.errors import UsageError
from maseRT.models.build import build_model
from maseRT.models.checkpoint import Checkpoint, load_checkpoint
from maseRT.models.weights import fit_names, load_weights


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


class Shared(nn.Module):
    """One Linear under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 2)


def checkpoint(state, kind="pt", **more):
    return Checkpoint(state_dict=dict(state), kind=kind, **more)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def load(model, state, kind="pt"):
    return load_weights(model, checkpoint(state, kind), where="net.ckpt")


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "model.model.", "module.model.", "net.", "_orig_mod.", "model._orig_mod."]
)
def test_prefixes_are_taken_off(prefix):
    source, target = Net(), Net()
    assert load(target, prefixed(source.state_dict(), prefix)) == ()
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_an_averaged_models_weights_are_loaded_without_their_count():
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    target = Net()
    assert load(target, averaged.state_dict()) == ("n_averaged",)
    assert torch.equal(target.fc.weight, averaged.module.fc.weight)


def test_a_wrapped_models_own_prefix_is_put_on():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()

    source, target = Net(), Wrapped()
    ranges = {"conv1.input": torch.tensor(1.0)}
    fitted, _ = fit_names(checkpoint(source.state_dict(), amax=ranges), target, where="")
    assert list(fitted.amax) == ["model.conv1.input"]
    load(target, source.state_dict())
    assert torch.equal(target.model.fc.weight, source.fc.weight)


def test_ranges_follow_the_names_of_the_weights():
    amax = {"model.conv1.input": torch.tensor(1.0), "model.fc.weight": torch.ones(3)}
    fitted, outside = fit_names(checkpoint(prefixed(Net().state_dict(), "model."), amax=amax), Net(), where="")
    assert list(fitted.amax) == ["conv1.input", "fc.weight"]
    assert outside == ()


def test_a_models_own_common_prefix_stays():
    source = build_model(ModelSection(name="jsc-toy"), num_classes=5, input_shape=(16,))
    target = build_model(ModelSection(name="jsc-toy"), num_classes=5, input_shape=(16,))
    load(target, prefixed(source.state_dict(), "model."), "pl")
    assert torch.equal(target.seq_blocks[2].weight, source.seq_blocks[2].weight)


def test_what_lightning_keeps_beside_the_model_is_named():
    state = prefixed(Net().state_dict(), "model.") | {"loss.weight": torch.ones(3), "accuracy.total": torch.ones(())}
    assert load(Net(), state, "pl") == ("loss.weight", "accuracy.total")
    with pytest.raises(UsageError, match=r"2 too many: loss\.weight, accuracy\.total"):
        load(Net(), state)


def test_the_models_own_prefix_wins_over_an_average():
    model, average = Net().state_dict(), Net().state_dict()
    target = Net()
    load(target, prefixed(average, "ema.") | prefixed(model, "model."), "pl")
    assert torch.equal(target.fc.weight, model["fc.weight"])


def test_two_equal_candidates_are_refused():
    state = prefixed(Net().state_dict(), "student.") | prefixed(Net().state_dict(), "teacher.")
    with pytest.raises(UsageError, match=r"several parts of the checkpoint fit the model: student\., teacher\."):
        load(Net(), state, "pl")


def test_missing_and_too_many_and_other_shapes_in_one_message():
    state = Net(classes=5).state_dict()
    state["conv2.weight"] = torch.ones(1)
    del state["bn1.bias"]
    with pytest.raises(UsageError) as caught:
        load(Net(), state)
    assert str(caught.value).splitlines()[:4] == [
        "net.ckpt: the checkpoint does not fit the model",
        "  1 missing: bn1.bias",
        "  1 too many: conv2.weight",
        "  2 of another shape: fc.weight [5, 4] instead of [3, 4], fc.bias [5] instead of [3]",
    ]


def test_another_models_checkpoint_is_shortened():
    other = build_model(ModelSection(name="resnet18"), num_classes=10, input_shape=(1, 8, 8))
    with pytest.raises(UsageError, match="is not a checkpoint of this model") as caught:
        load(build_model(ModelSection(name="vgg7"), num_classes=10, input_shape=(1, 8, 8)), other.state_dict())
    text = str(caught.value)
    assert "122 too many: conv1.weight, bn1.weight, " in text
    assert "and 114 more" in text
    assert len(text) < 1000


def test_a_failed_load_leaves_the_model_alone():
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError):
        load(model, {"conv1.weight": torch.zeros(4, 1, 3, 3)})
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_weights_of_another_number_type():
    state = Net().state_dict()
    state["fc.weight"] = torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(UsageError, match=r"1 of another number type: fc\.weight int8"):
        load(Net(), state)


def test_half_weights_are_loaded_as_floats():
    model = Net()
    load(
        model,
        {name: value.half() if value.is_floating_point() else value for name, value in Net().state_dict().items()},
    )
    assert model.fc.weight.dtype == torch.float32


def test_files_without_batchnorms_step_counter():
    state = {name: value for name, value in Net().state_dict().items() if "num_batches" not in name}
    assert load(Net(), state) == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    state = Net().state_dict()
    state["bn1.running_var"][2] = value
    with pytest.raises(UsageError, match=r"NaN or infinity in bn1\.running_var \(1 of 4 values\)"):
        load(Net(), state)


def test_a_shared_layer_loads_from_one_name(tmp_path):
    source, target = Shared(), Shared()
    save_model(source, str(tmp_path / "shared.safetensors"))  # keeps one name of each tensor
    saved = load_checkpoint(tmp_path / "shared.safetensors")
    assert len(saved.state_dict) < len(source.state_dict())
    load_weights(target, saved, where="shared.safetensors")
    assert torch.equal(target.first.weight, source.first.weight)
    assert target.second is target.first


def test_a_shared_layer_with_two_values():
    state = Shared().state_dict()
    state["second.weight"] = state["second.weight"] + 1
    with pytest.raises(
        UsageError, match=r"first\.weight and second\.weight are one shared tensor in the model, but differ"
    ):
        load(Shared(), state)


def test_modules_that_refuse_are_quoted():
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise RuntimeError("made for another version")

    with pytest.raises(UsageError, match="the model refuses the checkpoint: made for another version"):
        load(Picky(2, 2), nn.Linear(2, 2).state_dict())
