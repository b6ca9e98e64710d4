"""Every shipped config loads, says how to run it, and those on embedded data run."""

from pathlib import Path

import pytest

from maseRT.config_file import load_config
from maseRT.progress import Silent
from maseRT.steps.pipeline import Run
from maseRT.workspace import Workspace

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
EMBEDDED = [path for path in CONFIGS if path.name.startswith("digits_")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_first_line_is_its_command(path):
    load_config(path)
    assert path.read_text().startswith(f"# masert transform --config configs/{path.name}")


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.stem)
def test_a_config_on_embedded_data_runs(path, tmp_path):
    config = load_config(path, ["train.epochs=2", "analyze.iterations=2", "analyze.warmup=0", "run.device=cpu"])
    outcomes = Run(config, path, Workspace(tmp_path, path.stem), Silent()).transform(last="export")
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert outcomes[-1].summary["checks"]["quantized"]["disabled"]["label_agreement"] > 0.9
