"""Files appear whole or not at all, and a run belongs to one process and one config."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maseRT.errors import ExitCode, StepError, UsageError
from maseRT.workspace import Workspace, atomic_path, read_json, write_json, write_text


def test_a_file_appears_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_an_old_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StepError, match="cannot write") as caught:
        write_text(tmp_path / "out" / "x.json", "{}")
    assert "--output" in caught.value.fix


def _write_beyond_the_limit(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_text(path, "x" * 5000)
    except StepError:
        os._exit(7)
    os._exit(0)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    path = tmp_path / "big.json"
    process = multiprocessing.get_context("fork").Process(target=_write_beyond_the_limit, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01"])
def test_damaged_json_names_the_command_that_makes_it(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(StepError, match="damaged") as caught:
        read_json(path, made_by="quantize")
    assert "masert quantize" in caught.value.fix


def test_json_refuses_what_other_readers_would_not_understand(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from maseRT.workspace import Workspace
with Workspace(Path(sys.argv[1]), "r").locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        workspace = Workspace(tmp_path, "r")
        with pytest.raises(UsageError, match="another masert process"), workspace.locked():
            pass
        (workspace.root / "cache" / ".partial-1-x").write_text("half")
        holder.kill()
        holder.wait()
        with workspace.locked():
            assert not list(workspace.root.rglob(".partial-*"))
    finally:
        holder.kill()
        holder.wait()


def test_two_configs_with_one_run_name(tmp_path):
    first, second = tmp_path / "a" / "x.toml", tmp_path / "b" / "x.toml"
    workspace = Workspace(tmp_path / "out", "x")
    workspace.claim(first, takeover=False)
    workspace.claim(first, takeover=False)
    with pytest.raises(UsageError, match="another config") as caught:
        workspace.claim(second, takeover=False)
    assert caught.value.exit_code == ExitCode.USAGE
    workspace.claim(second, takeover=True)
    workspace.claim(second, takeover=False)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b"])
def test_a_run_name_is_one_folder(tmp_path, name):
    with pytest.raises(UsageError, match="folder name"):
        Workspace(tmp_path, name)
