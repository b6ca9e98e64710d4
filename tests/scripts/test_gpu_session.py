"""The script that does everything on a GPU goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_session.py"


def call(folder, *more):
    options = ["--out", folder / "out", "--work", folder / "work", "--only", "tests", "--dry-run", *more]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True)
    return done.stdout, json.loads((folder / "out" / "session.json").read_text())


def test_a_part_is_done_once(tmp_path):
    text, session = call(tmp_path)
    assert "===== tests" in text
    assert session["tests"]["done"]
    assert (tmp_path / "out" / "tests.log").read_text()
    text, again = call(tmp_path)
    assert "=====" not in text
    assert again == session


def test_another_machine_goes_on_from_what_was_left(tmp_path):
    session = {"tests": {"exit": 0, "seconds": 9, "done": True}}
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "session.json").write_text(json.dumps(session))
    assert call(tmp_path, "--previous", tmp_path / "before")[1] == session


def test_nothing_is_begun_without_time(tmp_path):
    text, session = call(tmp_path, "--budget", "30")
    assert "tests: not begun, out of time" in text
    assert session == {}
