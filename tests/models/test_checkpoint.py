import argparse
import collections
import importlib
import os
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from maseRT.errors import UsageError
from maseRT.models.checkpoint import load_checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 2)


@pytest.fixture
def state():
    return Net().state_dict()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.ckpt"


def lightning(state, **more):
    """The layout of a checkpoint that Lightning 2.6 writes in the middle of training."""
    return {
        "epoch": 2,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 3, "processed": 3, "completed": 2}}}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 2e-4, "initial_lr": 2e-2}]}],
        "lr_schedulers": [{"base_lrs": [2e-2], "last_epoch": 3}],
        **more,
    }


def assert_holds(checkpoint, state):
    assert checkpoint.state_dict.keys() == state.keys()
    assert all(torch.equal(checkpoint.state_dict[name], state[name]) for name in state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net"])
def test_plain_state_dicts(file, state, key, legacy):
    content = state if key is None else {"epoch": 3, key: state, "optimizer": {"lr": 0.1}}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    for kind in (None, "pt"):
        checkpoint = load_checkpoint(file, kind=kind)
        assert checkpoint.kind == "pt"
        assert (checkpoint.epochs, checkpoint.learning_rate, checkpoint.amax) == (None, None, {})
        assert_holds(checkpoint, state)


def test_safetensors_are_told_by_their_content(file, state):
    save_file(state, file)
    for kind in (None, "safetensors"):
        checkpoint = load_checkpoint(file, kind=kind)
        assert checkpoint.kind == "safetensors"
        assert_holds(checkpoint, state)


def test_lightning_with_its_epochs_and_learning_rate(file, state):
    torch.save(lightning(state), file)
    for kind in (None, "pl"):
        checkpoint = load_checkpoint(file, kind=kind)
        assert (checkpoint.kind, checkpoint.epochs, checkpoint.learning_rate) == ("pl", 3, 2e-2)
        assert_holds(checkpoint, {f"model.{name}": value for name, value in state.items()})


def test_a_parameter_saved_as_such_is_a_plain_tensor(file):
    torch.save(dict(Net().named_parameters()), file)
    assert not load_checkpoint(file).state_dict["fc.weight"].requires_grad


def test_pytorch_quantization_ranges_are_taken_apart(file, state):
    ranges = {
        "conv1._input_quantizer._amax": torch.tensor(3.0),
        "conv1._weight_quantizer._amax": torch.arange(1.0, 5).reshape(4, 1, 1, 1),
        "fc._weight_quantizer._amax": torch.ones(2, 1),
        "lstm._input_quantizers.1._amax": torch.tensor(4.0),
        "layer1.0.residual_quantizer._amax": torch.tensor(2.0),
    }
    torch.save({"state_dict": state | ranges}, file)
    for kind in (None, "pytorch-quantization"):
        checkpoint = load_checkpoint(file, kind=kind)
        assert checkpoint.kind == "pytorch-quantization"
        assert_holds(checkpoint, state)
        assert {name: list(value.shape) for name, value in checkpoint.amax.items()} == {
            "conv1.input": [],
            "conv1.weight": [4, 1, 1, 1],
            "fc.weight": [2, 1],
            "lstm.input_1": [],
            "layer1.0.residual": [],
        }
        assert checkpoint.amax["conv1.weight"].flatten().tolist() == [1, 2, 3, 4]


def test_a_range_per_element_is_refused(file, state):
    torch.save(state | {"fc._weight_quantizer._amax": torch.ones(2, 4)}, file)
    with pytest.raises(UsageError, match=r"range fc\._weight_quantizer\._amax has the shape \[2, 4\]"):
        load_checkpoint(file)


def test_said_to_be_of_pytorch_quantization_without_ranges(file, state):
    torch.save(state, file)
    with pytest.raises(UsageError, match="holds no quantizer ranges"):
        load_checkpoint(file, kind="pytorch-quantization")


def test_other_classes_end_with_the_line_that_admits_them(file, state):
    content = lightning(state, hyper_parameters={"args": argparse.Namespace(lr=0.5), "when": collections.UserDict()})
    torch.save(content, file)
    with pytest.raises(UsageError, match=r"argparse\.Namespace, collections\.UserDict") as caught:
        load_checkpoint(file)
    assert '[model] allow_globals = ["argparse.Namespace", "collections.UserDict"]' in caught.value.fix
    with pytest.raises(UsageError, match=r"other than tensors: collections\.UserDict\n") as caught:
        load_checkpoint(file, allow_globals=["argparse.Namespace"])
    assert '[model] allow_globals = ["argparse.Namespace", "collections.UserDict"]' in caught.value.fix
    checkpoint = load_checkpoint(file, allow_globals=["argparse.Namespace", "collections.UserDict"])
    assert checkpoint.learning_rate == 0.5


def test_admitting_ends_with_the_call(file, state):
    torch.save(lightning(state, hyper_parameters=argparse.Namespace(lr=0.5)), file)
    assert load_checkpoint(file, allow_globals=["argparse.Namespace"]).learning_rate == 0.5
    with pytest.raises(UsageError, match=r"argparse\.Namespace"):
        load_checkpoint(file)


def test_other_classes_in_the_old_format(file, state):
    torch.save({"state_dict": state, "args": argparse.Namespace()}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"other than tensors: argparse\.Namespace"):
        load_checkpoint(file)
    assert_holds(load_checkpoint(file, allow_globals=["argparse.Namespace"]), state)


def test_a_users_own_class_from_the_working_directory(write, file, state):
    folder = str(write("my_settings.py", "class Settings:\n    lr = 1\n").parent)
    sys.path.insert(0, folder)
    settings = importlib.import_module("my_settings").Settings()
    torch.save({"state_dict": state, "settings": settings}, file)
    del sys.modules["my_settings"]
    sys.path.remove(folder)
    with pytest.raises(UsageError, match=r"other than tensors: my_settings\.Settings"):
        load_checkpoint(file)
    assert_holds(load_checkpoint(file, allow_globals=["my_settings.Settings"]), state)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_a_checkpoint_that_runs_code_runs_none(file, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "evil": Evil()}, file)
    with pytest.raises(UsageError, match=r"posix\.mkdir"):
        load_checkpoint(file)
    with pytest.raises(UsageError, match="never admitted"):
        load_checkpoint(file, allow_globals=["posix.mkdir"])
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("subprocess.Popen", "could run code, and is never admitted"),
        ("builtins.eval", "could run code, and is never admitted"),
        ("json.loads", "is no class; loading would call it"),
        ("no_such_package_here.Thing", "no module 'no_such_package_here'"),
        ("argparse.Namespase", r"no 'Namespase'; did you mean 'Namespace'\?"),
        ("Namespace", r"is not package\.module\.Class"),
        ("argparse:Namespace", r"is not package\.module\.Class"),
        ("__main__.Args", "defined in the script that saved"),
    ],
)
def test_names_that_are_not_admitted(file, state, name, message):
    torch.save(state, file)
    with pytest.raises(UsageError, match=message) as caught:
        load_checkpoint(file, allow_globals=[name])
    assert caught.value.where == "[model] allow_globals"


def test_numpy_scalars_can_be_admitted(file, state):
    import numpy as np

    torch.save(lightning(state, hyper_parameters={"lr": np.float64(0.25)}), file)
    names = ["numpy._core.multiarray.scalar", "numpy.dtype"]
    with pytest.raises(UsageError, match=f"other than tensors: {', '.join(map(re.escape, names))}"):
        load_checkpoint(file)
    with pytest.raises(UsageError, match=r"other than tensors: numpy\.dtypes\.Float64DType"):
        load_checkpoint(file, allow_globals=names)
    checkpoint = load_checkpoint(file, allow_globals=[*names, "numpy.dtypes.Float64DType"])
    assert checkpoint.learning_rate == 0.25


def test_a_whole_model_gives_its_weights_once_its_classes_are_admitted(file):
    model = nn.Linear(3, 2)
    torch.save(model, file)
    with pytest.raises(UsageError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(file)
    assert_holds(load_checkpoint(file, allow_globals=["torch.nn.modules.linear.Linear"]), model.state_dict())


def test_a_missing_file_brings_its_neighbour(file, state):
    torch.save(state, file)
    with pytest.raises(UsageError, match=r"no such checkpoint; did you mean 'weights\.ckpt'\?"):
        load_checkpoint(file.with_name("weight.ckpt"))
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_checkpoint(file.parent / "nowhere" / "weights.ckpt")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="cannot read the checkpoint: Is a directory"):
        load_checkpoint(tmp_path)


def test_an_empty_file(file):
    file.touch()
    with pytest.raises(UsageError, match="is empty"):
        load_checkpoint(file)


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.99])
def test_a_truncated_file(file, state, save, part):
    save(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UsageError, match="corrupt") as caught:
        load_checkpoint(file)
    assert caught.value.where == str(file)
    assert caught.value.fix == "save or copy the file again"


def test_a_damaged_weight_is_found_by_its_checksum(file, state):
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    content[content.index(state["fc.weight"].numpy().tobytes()) + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"is corrupt or truncated .*wrong checksum of .*/data/"):
        load_checkpoint(file)


def test_a_file_without_checksums_is_read(file, state):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_holds(load_checkpoint(file), state)


def test_text_and_foreign_archives(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\n")
    with pytest.raises(UsageError, match="no checkpoint, or corrupt"):
        load_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(UsageError, match="corrupt"):
        load_checkpoint(file)


def test_archives_of_other_kinds_say_so(file):
    exported = file.with_suffix(".pt2")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), exported)
    with pytest.raises(UsageError, match=r"is a torch\.export archive") as caught:
        load_checkpoint(exported)
    assert "torch.export.load(path).state_dict" in caught.value.fix
    np.savez(file.with_suffix(".npz"), weight=np.ones(2))
    with pytest.raises(UsageError, match=r"was not written by torch\.save.* weight\.npy"):
        load_checkpoint(file.with_suffix(".npz"))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_says_so(file):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)), file)
    with pytest.raises(UsageError, match="is a TorchScript archive"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "loss": 0.1}, "holds no state dict, but the keys epoch, loss"),
        ([1, 2], "holds no state dict, but a list"),
        ({}, "holds no state dict, but an empty dict"),
        (torch.ones(3), "holds no state dict, but a Tensor"),
    ],
)
def test_files_without_a_state_dict(file, content, message):
    torch.save(content, file)
    with pytest.raises(UsageError, match=message):
        load_checkpoint(file)


def test_a_file_of_another_kind_than_said(file, state):
    torch.save(state, file)
    with pytest.raises(UsageError, match="said to be of kind 'safetensors', but is no safetensors file"):
        load_checkpoint(file, kind="safetensors")
    with pytest.raises(
        UsageError, match=r"of kind 'pl', but is no Lightning checkpoint: it holds the keys conv1\.weight"
    ):
        load_checkpoint(file, kind="pl")
    save_model(Net(), str(file))
    with pytest.raises(UsageError, match="said to be of kind 'pt', but is a safetensors file"):
        load_checkpoint(file, kind="pt")
    with pytest.raises(UsageError, match=r"no checkpoint kind 'safetensor'; did you mean 'safetensors'\?"):
        load_checkpoint(file, kind="safetensor")
