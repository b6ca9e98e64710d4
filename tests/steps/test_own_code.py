"""A result depends on all of a user's code, not only on the file that the config names."""

import os

import pytest
from projects import CONFIG, new_project, working_in

NET = "import own_blocks\ndef make():\n    return own_blocks.make()\n"
BLOCKS = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"


@pytest.fixture
def project(tmp_path):
    with working_in(tmp_path, own_net=NET, own_blocks=BLOCKS):
        config = CONFIG.replace('"digits-cnn"', '"own_net:make"').replace("epochs = 2", "epochs = 1")
        yield new_project(tmp_path, config)


def test_an_edit_of_what_the_factory_imports_makes_its_result_stale(project):
    project.transform(last="train")
    assert project.transform(last="train")["train"].status == "cached"
    (project.folder / "own_blocks.py").write_text(BLOCKS.replace("nn.Flatten(),", "nn.Flatten(), nn.ReLU(),"))
    (outcome,) = project.run().preview(last="train")
    assert outcome.status == "would run"
    assert "own_blocks.py changed" in outcome.why


def test_an_edit_while_a_run_goes_on_counts_for_the_next_one(project):
    run, blocks = project.run(), project.folder / "own_blocks.py"
    run.transform(last="train", on_outcome=lambda outcome: blocks.write_text(BLOCKS + "\n"))
    run.transform(first="quantize", last="quantize")
    outcomes = project.run().preview(last="quantize")
    assert [outcome.status for outcome in outcomes] == ["would run", "would run"]
    (quantize,) = project.run().preview(first="quantize", last="quantize")
    assert "own_blocks.py changed" in quantize.why


def test_a_project_may_move_with_its_output(project, tmp_path):
    project.transform(last="train")
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    os.chdir(moved)
    (outcome,) = type(project)(moved).run().preview(last="train")
    assert outcome.status == "cached", outcome.why
