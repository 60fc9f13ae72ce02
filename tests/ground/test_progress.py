"""Progress is a bar on a terminal, plain lines in a log, with the time that is left, and nothing where it is off."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from ldm_lib import progress
from ldm_lib.progress import Progress, report, show_progress

LOOP = """
import time
from ldm_lib import progress
progress.BAR_AFTER_S, progress.REDRAW_S = {after_s}, 0.02
print("result")
with progress.Progress(4, name="case", every_s=0.0) as loop:
    for k in range(1, 4):
        time.sleep(0.1)
        loop.update(k, f"sub-0{{k}}")
    progress.report("a line above")
    time.sleep(0.1)
"""


def on_terminal(after_s):
    """What a loop writes to a terminal, and to the pipe that is its standard output."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", LOOP.format(after_s=after_s)], stdout=subprocess.PIPE,
                               stderr=child, text=True, env={**os.environ, "TERM": "xterm"})  # fmt: skip
    os.close(child)
    shown = b""
    while True:
        try:
            shown += (read := os.read(parent, 4096))
        except OSError:  # EIO: the other side is closed
            break
        if not read:
            break
    os.close(parent)
    assert process.communicate()[0] == "result\n" and process.returncode == 0
    return shown.decode()


def test_a_terminal_shows_one_bar_with_the_time_left_and_clears_it():
    shown = on_terminal(0.01)
    assert re.search(r"\rcase 2/4 \|█+ +\| 00:00, 00:00 left, sub-02", shown)
    assert shown.count("\n") == 1, "the bar stays on its line"
    assert re.search(r"\r +\ra line above\r\n", shown), "a line replaces the bar, which is drawn again"
    assert re.search(r"\r +\r$", shown), "nothing of the bar is left"
    assert "min left at most" not in shown


def test_work_that_is_short_has_no_bar():
    assert on_terminal(5.0) == "a line above\r\n"


def test_a_pipe_gets_plain_lines():
    ended = subprocess.run(
        [sys.executable, "-c", LOOP.format(after_s=0.01)], capture_output=True, text=True, check=True
    )
    *lines, last = ended.stderr.split("\n")
    assert ended.stdout == "result\n" and not last and "\r" not in ended.stderr
    assert lines == [*(f"case {k}/4: sub-0{k}; 0 min left at most" for k in (1, 2, 3)), "a line above"]


def test_where_progress_is_off_errors_are_shown_alone(capsys):
    show_progress(False)
    try:
        with Progress(2, every_s=0.0) as loop:
            loop.update(1)
        report("a line")
        report("ERROR a: b.", error=True)
    finally:
        show_progress(True)
    assert capsys.readouterr() == ("", "ERROR a: b.\n")


def test_a_receiver_gets_every_line(capsys):
    lines = []
    loop = Progress(2, name="case", say=lines.append)
    loop.update(1, "found", skipped=True)
    loop.update(2)
    assert lines == ["case 1/2: found; 0 min left at most", "case 2/2; 0 min left at most"]
    assert capsys.readouterr() == ("", "")


def test_a_line_goes_to_the_log_and_to_standard_error(caplog, capsys):
    with caplog.at_level(logging.INFO, "ldm_lib"):
        report("case 1: 50 % done")
    assert [record.getMessage() for record in caplog.records] == ["case 1: 50 % done"]
    assert capsys.readouterr() == ("", "case 1: 50 % done\n")


def test_lines_come_at_intervals_and_tell_the_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    loop = Progress(100, done=40)  # resumed after 40 steps
    for step in range(41, 51):
        clock[0] += 12
        loop.update(step, f"loss {step}")
    loop.update(50, "validated", now=True)
    assert capsys.readouterr().err.splitlines() == [
        "step 43/100: loss 43; 11 min left at most",
        "step 46/100: loss 46; 11 min left at most",
        "step 49/100: loss 49; 10 min left at most",
        "step 50/100: validated; 10 min left at most",
    ]


def test_steps_that_were_found_done_are_not_counted_as_fast_ones(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    loop = Progress(100)
    for step in range(1, 51):
        loop.update(step, skipped=True)
    clock[0] += 60
    loop.update(51)
    assert capsys.readouterr().err == "step 51/100; 49 min left at most\n"


@pytest.mark.parametrize("done", [0, 5])
def test_the_first_line_may_come_before_the_first_step(capsys, done):
    Progress(8, done=done, name="case").update(done, "starts", now=True)
    assert capsys.readouterr().err == f"case {done}/8: starts; 0 min left at most\n"
