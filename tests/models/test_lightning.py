from argparse import Namespace

import numpy as np
import pytest

from maseRT.models.lightning import is_lightning, original_epochs, original_learning_rate


def test_what_is_a_lightning_file():
    assert is_lightning({"state_dict": {}, "pytorch-lightning_version": "1.0"})
    assert is_lightning({"state_dict": {}, "epoch": 1, "global_step": 9})
    assert not is_lightning({"state_dict": {}, "epoch": 1})
    assert not is_lightning({"epoch": 1, "global_step": 9})
    assert not is_lightning([1])


@pytest.mark.parametrize(
    ("content", "epochs"),
    [
        ({"hyper_parameters": {"max_epochs": 20}, "epoch": 3}, 20),
        ({"hyper_parameters": {"train": {"epochs": 12}}}, 12),
        ({"hyper_parameters": Namespace(epochs=8)}, 8),
        ({"hyper_parameters": {"max_epochs": -1}, "epoch": 3}, 4),
        # saved by a callback in the third epoch, and after three epochs of training
        ({"epoch": 2, "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 3}}}}}, 3),
        ({"epoch": 3, "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 3}}}}}, 3),
        ({"epoch": 2}, 3),
        ({}, None),
        ({"epoch": "three", "loops": []}, None),
    ],
)
def test_original_epochs(content, epochs):
    assert original_epochs(content) == epochs


def optimizer(**group):
    return {"optimizer_states": [{"state": {}, "param_groups": [group]}]}


@pytest.mark.parametrize(
    ("content", "rate"),
    [
        ({"hyper_parameters": {"learning_rate": 0.1}, **optimizer(lr=0.001)}, 0.1),
        ({"hyper_parameters": Namespace(lr=0.2)}, 0.2),
        ({"hyper_parameters": {"lr": np.float32(0.25)}}, 0.25),
        ({"hyper_parameters": {"optimizer": {"lr": 0.3}}}, 0.3),
        ({"lr_schedulers": [{"base_lrs": [0.4]}], **optimizer(lr=0.001)}, 0.4),
        ({"lr_schedulers": [{"best": 1}], **optimizer(lr=0.001, initial_lr=0.5)}, 0.5),
        (optimizer(lr=0.6), 0.6),
        # a schedule has changed the rate, and nothing says what it was
        ({"lr_schedulers": [{"best": 1}], **optimizer(lr=0.001)}, None),
        ({"hyper_parameters": {"lr": "auto"}}, None),
        ({"optimizer_states": []}, None),
        ({}, None),
    ],
)
def test_original_learning_rate(content, rate):
    assert original_learning_rate(content) == rate
