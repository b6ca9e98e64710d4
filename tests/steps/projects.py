"""A small project on digits that the tests of the steps run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from maseRT.config_file import load_config
from maseRT.progress import Silent
from maseRT.steps.pipeline import Outcome, Run
from maseRT.steps.table import STEPS
from maseRT.workspace import Workspace

CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "digits-cnn"
[data]
name = "digits"
batch_size = 128
[train]
epochs = 2
learning_rate = 5e-3
[quantize]
[calibrate]
batches = 2
methods = ["max", "mse"]
[finetune]
epochs = 2
initial_learning_rate = 1e-4
[export]
[analyze]
runtimes = ["torch", "onnxruntime", "tensorrt"]
warmup = 1
iterations = 3
seconds = 0.0
isolate = false
"""

UNTRAINED = """
[run]
threads = 1
device = "cpu"
[model]
name = "digits-cnn"
random_weights = true
[data]
name = "digits"
batch_size = 64
"""
"""The start of a config whose model keeps its random weights."""


@dataclass(frozen=True)
class Project:
    """A folder with a config and its output."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "digits.toml"

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "out", "digits")

    def run(self, *overrides: str, force: bool = False) -> Run:
        return Run(load_config(self.config, overrides), self.config, self.workspace, Silent(), force)

    def transform(self, *overrides: str, first: str | None = None, last: str | None = None) -> dict[str, Outcome]:
        return {outcome.step: outcome for outcome in self.run(*overrides).transform(first=first, last=last)}

    def single(self, name: str, *overrides: str, force: bool = False) -> Outcome:
        return self.run(*overrides, force=force).single(STEPS[name])


def new_project(folder: Path, config: str = CONFIG) -> Project:
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder)
    project.config.write_text(config)
    return project


@contextmanager
def working_in(folder: Path, **modules: str) -> Iterator[None]:
    """Make a folder with modules of a user's own the working directory; what was imported of them is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield
    for name in modules:
        sys.modules.pop(name, None)
