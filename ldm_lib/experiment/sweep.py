"""Many runs, a few at a time: each is a process of its own, and the same command goes on where it stopped."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ldm_lib.errors import ConfigError, LdmError
from ldm_lib.experiment import path_aliases
from ldm_lib.experiment.run_folder import outputs_folder
from ldm_lib.experiment.stage_reuse import adopt
from ldm_lib.experiment.sweep_file import Grid, SweepRun
from ldm_lib.experiment.sweep_table import ENDED, gather, last_words, log_path, sweep_folder
from ldm_lib.files import replacing

COMMAND = (sys.executable, "-m", "ldm_lib", "run")
LOOK_EVERY_S = 0.2
PATIENCE_S = 70.0  # from SIGTERM, in which a run ends its kernel and lets its folder go, to SIGKILL
THREADS = "OMP_NUM_THREADS"


@dataclass
class _Active:
    """A run that is being worked on."""

    run: SweepRun
    place: int
    log: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def sweep(grid: Grid, *, jobs: int, only: int | None, say: Callable[[str], None]) -> dict[str, str]:
    """Run a sweep's runs, `jobs` at a time, and return those that failed with each one's last words.

    What is done is skipped by the run itself. A run that fails does not keep the others from running. However this
    ends, no run is left behind: those at work are told to end, and waited for.

    Args:
        only: the place of the one run to make, from 0; None for all.
        say: receives one line as a run starts and as it ends.

    Raises:
        ConfigError: no such place, or less than one job.
    """
    runs = list(enumerate(grid.runs))
    if only is not None and not 0 <= only < len(runs):
        raise ConfigError(f"--only {only}: the runs are 0 to {len(runs) - 1}", fix="ask --count how many there are")
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1", fix="write for example --jobs 2")
    folder = sweep_folder(grid.name)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with replacing(folder / "grid.yaml") as partial:
        partial.write_text(_without_paths(grid))
    chosen = runs if only is None else [runs[only]]
    return _work(grid, chosen, min(jobs, len(chosen)), say)


def _without_paths(grid: Grid) -> str:
    """The grid's text, its paths by their names."""
    text = grid.text
    for name, value in (pair for run in grid.runs for pair in run.values.items() if pair[0] in path_aliases.NAMES):
        text = text.replace(str(value), f"${path_aliases.NAMES[name]}")
    return text


def _work(grid: Grid, waiting: list[tuple[int, SweepRun]], jobs: int, say: Callable[[str], None]) -> dict[str, str]:
    done = {row["run"] for row in gather(grid) if row["state"] == "done"}
    active: list[_Active] = []
    failed: dict[str, str] = {}
    took: list[float] = []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(_start(grid, *waiting.pop(0), jobs))
                say(f"{_told(grid, active[-1])}: started, told in {active[-1].log}")
            for ended in [one for one in active if one.process.poll() is not None]:
                active.remove(ended)
                if why := _end(ended):
                    failed[ended.run.name] = why
                if ended.run.name not in done:  # what was done already tells nothing about the others' time
                    took.append(ended.seconds)
                left = _left(len(waiting) + len(active), took, jobs)
                say(f"{_told(grid, ended)}: {why or 'done'} after {ended.seconds:.0f} s; {left}")
            time.sleep(LOOK_EVERY_S if active else 0)
    finally:
        _stop(active)
    return failed


def _start(grid: Grid, place: int, run: SweepRun, jobs: int) -> _Active:
    log = log_path(grid, run)
    with log.open("wb", buffering=0) as told:
        _adopt(grid, run, told)
        settings = [word for name, value in run.values.items() for word in ("--set", f"{name}={value}")]
        command = [*COMMAND, *grid.stages, "--run", run.name, "--preset", grid.preset, *settings]
        # In a process group of its own, so that Ctrl-C reaches this process alone, which ends each run in good order.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT,
                                   env=_environment(jobs), process_group=0)  # fmt: skip
    return _Active(run, place, log, process)


def _adopt(grid: Grid, run: SweepRun, told: IO[bytes]) -> None:
    """Take over what other runs of the sweep have made; a refusal is the run's own to tell, in its own words."""
    folders = [outputs_folder() / other.name for other in grid.runs if other is not run]
    try:
        taken = adopt(outputs_folder() / run.name, run.configs, grid.stages, folders)
    except LdmError as error:
        taken = {"nothing": str(error)}
    told.write("".join(f"{stage}: taken over from {donor}\n" for stage, donor in taken.items()).encode())


def _environment(jobs: int) -> dict[str, str]:
    """Runs side by side share the cores, unless the user has decided."""
    ours = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # a job may hold a part of a node
    shared = {THREADS: str(max(1, len(ours(0)) // jobs))} if jobs > 1 else {}
    return shared | os.environ


def _end(ended: _Active) -> str:
    """Close a run's log, and return why it failed; empty if it did not."""
    words = last_words(ended.log, "ERROR ") or last_words(ended.log)
    status = f"{ENDED}{ended.process.returncode}"
    with ended.log.open("a") as told:
        told.write(f"{status}\n")
    path_aliases.hide(ended.log, outputs_folder() / ended.run.name)
    return "" if ended.process.returncode == 0 else f"{status} ({words})"


def _stop(active: Sequence[_Active]) -> None:
    for one in active:
        one.process.terminate()
    end = time.monotonic() + PATIENCE_S
    for one in active:
        try:
            one.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def _left(count: int, took: Sequence[float], jobs: int) -> str:
    if not (count and took):
        return f"{count} left"
    minutes = count * sum(took) / len(took) / min(jobs, count) / 60
    return f"{count} left, about {minutes:.0f} min" if minutes >= 1 else f"{count} left, less than a minute"


def _told(grid: Grid, one: _Active) -> str:
    return f"[{one.place + 1}/{len(grid.runs)}] {one.run.name}"
