"""One small finished run on digits, made once, and copies of it to spoil."""

import shutil
from pathlib import Path

import pytest
from projects import Project, new_project


@pytest.fixture
def empty(tmp_path: Path) -> Project:
    """A project that was never run."""
    return new_project(tmp_path / "project")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run that nobody may change."""
    project = new_project(tmp_path_factory.mktemp("pristine") / "project")
    project.transform()
    return project


@pytest.fixture
def finished(pristine: Project, tmp_path: Path) -> Project:
    """A copy of the finished run."""
    shutil.copytree(pristine.folder, tmp_path / "project")
    return Project(tmp_path / "project")
