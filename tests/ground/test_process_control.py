"""Laws of ends: a wish is noted, a child gets its time, and silence is ended with the stacks on record."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ldm_lib import process_control as signals
from ldm_lib.errors import InterruptionError, RunError
from ldm_lib.process_control import ForwardSignals, StopRequest, Watchdog

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def handlers():
    return [signal.getsignal(number) for number in signals.STOP_SIGNALS]


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_wish_is_noted_and_the_handlers_are_put_back(number):
    before = handlers()
    with StopRequest() as wishes:
        assert wishes.received is None
        signal.raise_signal(number)
        assert wishes.received == number
    assert handlers() == before


def test_a_second_interrupt_is_obeyed():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_child_is_told_to_end_and_then_we_end_with_the_signals_status(number):
    before = handlers()
    with (
        pytest.raises(InterruptionError, match=f"lab/05: stopped by {number.name}. Fix: ") as told,
        ForwardSignals(lambda: child.pid, where="lab/05"),
    ):
        child = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
        child.stdout.readline()
        os.kill(os.getpid(), number)
        assert child.wait(10) == -signal.SIGTERM
    assert told.value.status == 128 + number and handlers() == before


def test_what_the_child_said_on_its_way_out_is_kept():
    own = InterruptionError("asked to end by SIGTERM after step 5 of 8, saved", where="training")
    said = "lab/04: asked to end by SIGTERM after step 5 of 8, saved"
    with pytest.raises(InterruptionError, match=said), ForwardSignals(lambda: child.pid, where="lab/04"):
        child = subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL)
        signal.raise_signal(signal.SIGTERM)
        child.wait(10)
        raise own


def test_without_a_child_there_is_nothing_to_wait_for():
    """As while a kernel is being started: the signal is obeyed there and then, not remembered."""
    with (
        pytest.raises(InterruptionError, match="lab/04: stopped by SIGTERM"),
        ForwardSignals(lambda: None, where="lab/04"),
    ):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")


def test_without_a_signal_nothing_changes():
    with ForwardSignals(lambda: None, where="x"):
        pass
    with pytest.raises(RunError, match="its own"), ForwardSignals(lambda: None, where="x"):
        raise RunError("its own")


def test_a_child_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_S", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with pytest.raises(InterruptionError), ForwardSignals(lambda: child.pid, where="x"):
        child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
        child.stdout.readline()
        signal.raise_signal(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGKILL


HANG = """
import sys, time
from pathlib import Path
from ldm_lib.process_control import Watchdog
def a_step_that_hangs():
    time.sleep(60)
with Watchdog(Path(sys.argv[1]), 0.5) as watchdog:
    for _ in range(4):
        time.sleep(0.2)
        watchdog.alive()
    print("alive", flush=True)
    a_step_that_hangs()
"""


def test_a_hang_is_ended_with_the_stacks_in_a_file(tmp_path):
    started = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "s.txt")], capture_output=True, text=True, timeout=50
    )
    assert told.returncode == 1 and told.stdout == "alive\n" and time.monotonic() - started < 40
    assert "a_step_that_hangs" in (tmp_path / "s.txt").read_text()


def test_no_stacks_are_left_where_nothing_hung(tmp_path):
    with Watchdog(tmp_path / "s.txt", 30) as watchdog:
        watchdog.alive()
    assert not (tmp_path / "s.txt").exists()
