"""Shutdown: signals are recorded and forwarded, a child gets time to end, and a hang ends with its stacks in a file."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from ldm_lib import process_control
from ldm_lib.errors import InterruptionError, RunError
from ldm_lib.process_control import ForwardSignals, StopRequest, watchdog

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def handlers():
    return [signal.getsignal(number) for number in process_control.STOP_SIGNALS]


@pytest.mark.parametrize("number", process_control.STOP_SIGNALS)
def test_a_signal_is_recorded_and_the_handlers_are_restored(number):
    before = handlers()
    with StopRequest() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
    assert handlers() == before


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", process_control.STOP_SIGNALS)
def test_a_signal_is_forwarded_and_gives_the_exit_status(number):
    before = handlers()
    with (
        pytest.raises(InterruptionError, match=f"lab/05: stopped by {number.name}. Fix: ") as stopped,
        ForwardSignals(lambda: child.pid, where="lab/05"),
    ):
        child = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
        child.stdout.readline()
        os.kill(os.getpid(), number)
        assert child.wait(10) == -signal.SIGTERM
    assert stopped.value.status == 128 + number and handlers() == before


def test_the_message_of_the_child_is_kept():
    own = InterruptionError("asked to end by SIGTERM after step 5 of 8, saved", where="training")
    message = "lab/04: asked to end by SIGTERM after step 5 of 8, saved"
    with pytest.raises(InterruptionError, match=message), ForwardSignals(lambda: child.pid, where="lab/04"):
        child = subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL)
        signal.raise_signal(signal.SIGTERM)
        child.wait(10)
        raise own


def test_without_a_child_the_signal_stops_at_once():
    """While a kernel is being started there is nothing to wait for."""
    with (
        pytest.raises(InterruptionError, match="lab/04: stopped by SIGTERM"),
        ForwardSignals(lambda: None, where="lab/04"),
    ):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("continued")


def test_without_a_signal_nothing_changes():
    with ForwardSignals(lambda: None, where="x"):
        pass
    with pytest.raises(RunError, match="its own"), ForwardSignals(lambda: None, where="x"):
        raise RunError("its own")


def test_a_child_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(process_control, "GRACE_S", 0.3)
    ignoring = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    with pytest.raises(InterruptionError), ForwardSignals(lambda: child.pid, where="x"):
        child = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE)
        child.stdout.readline()
        signal.raise_signal(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGKILL


HANG = """
import sys, time
from pathlib import Path
from ldm_lib.process_control import watchdog
def a_step_that_hangs():
    time.sleep(60)
with watchdog(Path(sys.argv[1]), 0.5) as alive:
    for _ in range(4):
        time.sleep(0.2)
        alive()
    print("alive", flush=True)
    a_step_that_hangs()
"""


def test_a_hang_ends_with_the_stacks_in_a_file(tmp_path):
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "s.txt")], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 1 and ended.stdout == "alive\n" and time.monotonic() - started < 40
    assert "a_step_that_hangs" in (tmp_path / "s.txt").read_text()


def test_no_stacks_are_written_without_a_hang(tmp_path):
    with watchdog(tmp_path / "s.txt", 30) as alive:
        alive()
    assert not (tmp_path / "s.txt").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_is_mapped_in_order_by_any_number_of_processes(workers):
    assert list(process_control.parallel_map(abs, [-3, 2, -1], workers)) == [3, 2, 1]
    assert list(process_control.parallel_map(abs, [], workers)) == []


def test_a_script_without_its_guard_is_answered_with_what_to_do(tmp_path):
    """Each process imports the script, whose call starts processes again."""
    script = tmp_path / "script.py"
    script.write_text("from ldm_lib.process_control import parallel_map\nprint(list(parallel_map(abs, [1, 2], 2)))\n")
    ended = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    answers = [line for line in ended.stderr.splitlines() if "a worker process ended abruptly" in line]
    # Python's resource tracker may add a warning of its own after the answer of the script.
    assert ended.returncode == 1 and "__main__" in answers[-1]


def test_a_map_that_ends_early_ends_its_processes():
    before, started = set(multiprocessing.active_children()), time.monotonic()
    results = process_control.parallel_map(time.sleep, [0, 60], 2)
    assert next(results) is None
    results.close()
    assert set(multiprocessing.active_children()) <= before and time.monotonic() - started < 50
