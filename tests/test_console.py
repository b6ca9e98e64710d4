"""What a person sees on a terminal, and what a pipe does not."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from maseRT.console import RichReporter, clock, reporting
from maseRT.progress import Silent

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
SHOW_CURSOR = "\x1b[?25h"

COUNTING = """
from maseRT.console import reporting
with reporting(quiet=False) as reporter:
    for epoch in reporter.track(range(1, 3), description="train", total=3, unit="epoch", done=1):
        for batch in reporter.track("ab", description=f"epoch {epoch}", total=2, unit="batch"):
            pass
        with reporter.spinner("checkpoint"):
            pass
"""


@pytest.fixture
def terminal() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(terminal: io.StringIO) -> Console:
    return Console(file=terminal, force_terminal=True, width=100, color_system=None)


@pytest.fixture
def reporter(console: Console) -> RichReporter:
    return RichReporter(console)


@pytest.fixture
def frame(terminal: io.StringIO, console: Console) -> Callable[[], list[str]]:
    """Returns the lines that are shown, once the last of them shows a text: they are drawn ten times a second."""

    def _frame(text: str = "") -> list[str]:
        lines = _drawn()
        while not lines or text not in lines[-1]:
            time.sleep(0.01)
            lines = _drawn()
        return lines

    def _drawn() -> list[str]:
        console.print("MARK")  # progress is drawn anew below whatever is printed
        shown = terminal.getvalue().rpartition("MARK\n")[2]
        return [line for line in CONTROL.sub("", shown).split("\n") if line.strip()]

    return _frame


def test_work_within_work_is_shown_below_it(frame, reporter):
    for epoch in reporter.track(range(3), description="train", total=3, unit="epoch"):
        for batch in reporter.track(range(4), description=f"epoch {epoch}", total=4, unit="batch"):
            if (epoch, batch) == (1, 3):
                with reporter.spinner("checkpoint"):
                    train, inner, spinner = frame("checkpoint")
    assert " train " in train
    assert " 1/3 " in train
    assert "/s" in train or "s/epoch" in train
    assert train.rstrip().endswith("left")
    assert "   epoch 1 " in inner
    assert " 3/4 " in inner
    assert "     checkpoint " in spinner
    assert spinner.rstrip().endswith("0:00")
    assert "/s" not in spinner


def test_what_was_done_before_counts_but_sets_no_pace(frame, reporter):
    tracked = reporter.track(range(2, 4), description="train", total=4, unit="epoch", done=2)
    next(tracked)
    (line,) = frame()
    assert " 2/4 " in line
    assert "left" not in line
    next(tracked)
    (line,) = frame(" 3/4 ")
    assert "left" in line
    tracked.close()


def test_a_narrow_terminal_gets_a_line_per_work(frame, console, reporter):
    console.width = 52
    tracked = reporter.track(range(10), description="latency, batch 64", total=10, unit="round")
    next(tracked)
    next(tracked)
    (line,) = frame(" 1/10 ")
    assert line.startswith("latency, batch 64 ", 2)
    assert line.rstrip().endswith(" left")
    tracked.close()


def test_work_of_unknown_length_shows_its_pace(frame, reporter):
    tracked = reporter.track(iter("abc"), description="read", unit="file")
    next(tracked)
    next(tracked)
    (line,) = frame(" 1/? ")
    assert "file" in line
    assert "left" not in line
    tracked.close()


def test_nothing_stays_and_the_cursor_comes_back(terminal, frame, reporter):
    with pytest.raises(ZeroDivisionError), reporter.spinner("build"):
        raise ZeroDivisionError
    assert CONTROL.sub("", terminal.getvalue().rpartition(SHOW_CURSOR)[2]) == ""
    with reporter.spinner("the next one"):
        assert len(frame()) == 1


def test_after_an_error_in_the_middle_close_takes_all_down(terminal, reporter):
    tracked = reporter.track(range(3), description="train", total=3)
    next(tracked)
    reporter.close()
    assert CONTROL.sub("", terminal.getvalue().rpartition(SHOW_CURSOR)[2]) == ""
    tracked.close()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_pipe_gets_no_progress():
    with reporting(quiet=False) as found:
        assert isinstance(found, Silent)
    environment = {**os.environ, "FORCE_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-c", COUNTING], env=environment, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")


def on_terminal(code: str, **environment: str) -> str:
    """Return what code writes to a terminal."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, **environment}
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        text += part
    os.close(ours)
    assert process.communicate()[0] == b""
    assert process.returncode == 0
    return text.decode()


def test_a_terminal_gets_progress_in_colours_unless_it_must_not():
    colourful = on_terminal(COUNTING, TERM="xterm-256color", NO_COLOR="")
    assert "train" in colourful
    assert "checkpoint" in colourful
    assert "\x1b[32m" in colourful
    plain = on_terminal(COUNTING, TERM="xterm-256color", NO_COLOR="1")
    assert "train" in plain
    assert "\x1b[3" not in plain


def test_a_terminal_that_cannot_be_drawn_on_gets_none():
    assert on_terminal(COUNTING, TERM="dumb") == ""


def test_json_keeps_its_stdout_from_everybody_else():
    code = """
import os
from maseRT.console import print_json, stdout_for_json
with stdout_for_json():
    print("a user's factory")
    os.write(1, b"a library in C\\n")
print_json("train", {"loss": 1.5})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {"schema": 1, "command": "train", "loss": 1.5}
    assert set(result.stderr.splitlines()) == {"a user's factory", "a library in C"}


def test_a_warning_in_a_pipe_is_one_line_without_colours():
    text = "a long warning with [brackets] " * 10
    code = "import logging; from maseRT.console import set_up_logging; set_up_logging()\n"
    code += f"logging.getLogger('maseRT.x').warning({text!r})"
    environment = {**os.environ, "FORCE_COLOR": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stderr == f"WARNING {text}\n"
