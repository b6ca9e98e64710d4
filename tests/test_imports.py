"""Imports point one way, and what must stay light loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maseRT"

LAYERS = [
    {
        "cli", "cli_endings", "cli_group", "cli_options", "cli_outcomes", "cli_report", "console", "__init__",
        "__main__",
    },
    {"steps"},
    {
        "quant", "runtimes", "plan", "layer_rules", "models", "data", "measure", "report", "onnx_export",
        "onnx_translations", "onnx_graph", "onnxrt", "evaluate", "learning", "agreement", "checkpoints", "doctor",
        "scaffold", "receipt", "tasks", "energy", "meters", "nvml", "onnx_compat", "onnx_widen", "blame", "workers",
        "intervals", "drift", "bisection", "onnx_outputs", "onnx_casts", "token_ids",
    },
    {
        "workspace", "records", "config", "config_errors", "config_file", "errors", "precision", "progress", "logs",
        "factories", "hardware", "interrupts", "closing", "termination", "user_code", "eval_mode", "spread",
    },
]  # fmt: skip

HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnxscript", "torchmetrics", "lightning_fabric"}

LIGHT = [
    "maseRT", "maseRT.cli", "maseRT.config", "maseRT.workspace", "maseRT.records", "maseRT.plan", "maseRT.hardware",
    "maseRT.factories", "maseRT.steps.pipeline", "maseRT.steps.table", "maseRT.scaffold", "maseRT.quant",
    "maseRT.models", "maseRT.data", "maseRT.runtimes", "maseRT.measure", "maseRT.intervals", "maseRT.workers.process",
    "maseRT.workers.child", "maseRT.workers.schedule",
]  # fmt: skip


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("maseRT"):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("maseRT")}
    return names


def _rank(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    relative = path.relative_to(PACKAGE)
    mine = relative.parts[0].removesuffix(".py")
    for module in _imported(path):
        theirs = _part(module)
        if theirs == "__init__":  # the version
            continue
        assert _rank(theirs) >= _rank(mine), f"{relative} imports {module}"
        if mine == "quant":
            assert theirs != "runtimes"
        if mine == "runtimes":
            assert theirs not in {"plan", "config", "models", "quant"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("steps/**/*.py")), ids=lambda path: path.stem)
def test_only_analyze_is_made_of_steps_analysis(path):
    uses = any(module.startswith("maseRT.steps.analysis") for module in _imported(path))
    if path.parent.name == "analysis":
        assert "maseRT.steps.analyze" not in _imported(path)
    else:
        assert uses == (path.stem == "analyze")


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
