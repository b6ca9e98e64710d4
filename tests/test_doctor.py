import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli

from maseRT import doctor
from maseRT.doctor import MATRIX, PYTHON, examine


@pytest.fixture(scope="module")
def findings():
    return examine()


def test_the_matrix_is_what_the_project_declares():
    project = tomli.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {"": project["dependencies"], **project["optional-dependencies"]}
    for name, tested in MATRIX.items():
        exact = f"{name}=={tested.lowest}"
        assert f"{name}{tested.range}" in declared[tested.extra] or exact in declared[tested.extra], name
    assert project["requires-python"] == PYTHON.range


def test_installed_versions_are_told(findings):
    torch = next(package for package in findings.packages if package.name == "torch")
    assert torch.version == metadata.version("torch")
    assert torch.problem == ""


def test_every_runtime_has_its_state(findings):
    states = {state.name: state for state in findings.runtimes}
    assert list(states) == ["torch", "onnxruntime", "tensorrt", "tensorrt-rtx"]
    assert states["torch"].why_not_run is None
    assert not states["torch"].builds
    assert states["tensorrt-rtx"].builds
    assert states["tensorrt-rtx"].why_not_build is None


def test_findings_are_json_and_tables(findings):
    assert json.loads(json.dumps(findings.as_dict()))["cpu"]["name"] == findings.cpu.name
    for _, rows in findings.tables():
        assert len({len(row) for row in rows}) == 1
        assert all(isinstance(cell, str) for row in rows for cell in row)


@pytest.mark.parametrize(
    ("version", "accepted"), [("2.9", True), ("2.13.0+cpu", True), ("2.8.9", False), ("2.14.0", False), ("3.0", False)]
)
def test_version_ranges(version, accepted):
    assert doctor.Tested("2.9", "2.14", "2.13.0").accepts(version) is accepted


@pytest.fixture
def installed(monkeypatch):
    def pretend(**versions):
        def version(name):
            if versions.get(name, "") is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or {"torch": "2.13.0"}.get(name, MATRIX[name].lowest if name in MATRIX else "13")

        monkeypatch.setattr(doctor.metadata, "version", version)

    return pretend


def test_a_version_out_of_range_is_a_problem(installed):
    installed(torch="2.8.0")
    assert "torch 2.8.0 is outside of >=2.9,<2.14" in examine().problems


def test_a_missing_core_package_is_a_problem_and_a_missing_extra_is_not(installed):
    installed(onnx=None, tensorrt=None)
    problems = examine().problems
    assert "onnx is not installed" in problems
    assert not any("tensorrt" in problem for problem in problems)


def test_two_packages_of_one_module_are_a_problem(installed):
    installed()
    assert any("onnxruntime and onnxruntime-gpu share one module" in problem for problem in examine().problems)
    assert "Problems" in dict(examine().tables())


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from maseRT.doctor import examine; examine();"
        "sys.exit(bool({'torch', 'onnx', 'onnxruntime', 'lightning_fabric'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_runtime_that_cannot_be_imported_says_what_is_missing():
    code = """
import sys
sys.modules["numpy"] = None
from maseRT.doctor import examine
print({each.why_not_run for each in examine().runtimes if each.name == "torch"})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "{'numpy is not installed'}\n", result.stderr
