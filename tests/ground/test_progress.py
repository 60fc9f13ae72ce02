"""Progress is reported in plain lines, with the time that is left, and not more often than asked."""

import logging

import pytest

from ldm_lib import progress
from ldm_lib.progress import Progress, report


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


@pytest.mark.parametrize("done", [0, 5])
def test_the_first_line_may_come_before_the_first_step(capsys, done):
    Progress(8, done=done, name="case").update(done, "starts", now=True)
    assert capsys.readouterr().err == f"case {done}/8: starts; 0 min left at most\n"
