"""Kill a pipeline at many moments, in five ways, and finish it by the same command each time.

The stages before the killed one are copied from an undisturbed run, since the library would skip them; so a trial costs
what comes after the kill. The moments are distributed over the whole run and drawn from the seed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from soak_runs import (
    LONGEST_S,
    PIPELINE,
    RUN,
    Process,
    Reference,
    kill,
    leftovers,
    processes,
    reference,
    results,
    start,
    unsound,
    until,
)

from ldm_lib.experiment.stages import STAGES
from ldm_lib.process_control import GRACE_S

WAYS = {"runner killed": -9, "kernel killed": 1, "SIGTERM": 143, "all killed": -9, "Ctrl-C": 130}  # and exit status
KERNEL_KILLED = "the kernel was killed (signal 9; likely out of memory)"
LEFT_BEHIND_S = 10.0  # within which every process of a run that ended must be gone
KERNEL_START_S = 30.0
SOONEST_S = 1.0  # a kill that comes too late is repeated at half its time, down to this
CACHES = {"maps": "03_conditioning", "latents": "04_training"}  # next to the stages, and made by one of them


@dataclass(frozen=True)
class Trial:
    """Describe one kill: way, stage and seconds after its start; `twice`: two runners are started at the same time."""

    number: int
    way: str
    stage: str
    after_s: float
    twice: bool


@dataclass
class Outcome:
    """Hold the outcome of a trial; it passed when nothing was found."""

    trial: Trial
    status: int | None = None
    gone_s: float | None = None  # until the last process of the run was gone
    again_s: float = 0.0  # seconds of the same command to finish
    late: bool = False  # the kernel was killed after its work, which the runner may not notice
    missed: bool = False  # the run had ended before: the machine is faster than when the undisturbed run was made
    found: list[str] = field(default_factory=list)

    def line(self, count: int) -> str:
        """Describe the outcome in one line."""
        t = self.trial
        gone = "not killed" if self.gone_s is None else f"all gone in {self.gone_s:.1f} s"
        late = ", its work done" if self.late else ""
        end = f"FOUND {'; '.join(self.found)}" if self.found else "same result"
        return (f"[{t.number + 1}/{count}] {t.stage} after {t.after_s:.1f} s: {t.way}{late}, exit {self.status}, "
                f"{gone}; {'second start rejected; ' if t.twice else ''}again {self.again_s:.0f} s: {end}")  # fmt: skip


def plan(seconds: dict[str, float], count: int, seed: int) -> list[Trial]:
    """Return `count` trials, each at a random moment of an equal part of the run; the ways take turns."""
    rng, trials = random.Random(seed), []
    for k in range(count):
        moment = sum(seconds.values()) * (k + rng.random()) / count
        for stage in STAGES:
            if moment < seconds[stage]:
                break
            moment -= seconds[stage]
        turn = k // len(WAYS) % len(WAYS)
        trials.append(Trial(k, list(WAYS)[k % len(WAYS)], stage, round(moment, 2), k % len(WAYS) == turn))
    return trials


def try_out(trial: Trial, known: Reference, folder: Path) -> Outcome:
    """Copy the earlier stages, start, kill, check, and finish by the same command."""
    outcome, run = Outcome(trial), folder / "outputs" / RUN
    shutil.rmtree(folder, ignore_errors=True)
    run.mkdir(parents=True)
    done = [stage for stage in STAGES if stage < trial.stage]
    for name in done + [cache for cache, maker in CACHES.items() if maker in done]:
        shutil.copytree(known.outputs / RUN / name, run / name)
    with tempfile.TemporaryDirectory(
        prefix="soak-", ignore_cleanup_errors=True
    ) as sockets:  # short, as paths of sockets must be
        field = Field(folder, sockets)
        try:
            _finish(field, _hit(field, outcome), outcome)
        finally:
            kill(field.processes(), signal.SIGKILL)
        if left := sorted(path.name for path in Path(sockets).iterdir() if path.name.startswith("tmp")):
            outcome.found.append(f"left among temporary files: {', '.join(left)}")
    outcome.found += unsound(run) + [f"left: {name}" for name in leftovers(run)]
    present, expected = results(run), results(known.outputs / RUN)
    outcome.found += [f"other result: {n}" for n in sorted({*present, *expected}) if present.get(n) != expected.get(n)]
    return outcome


@dataclass(frozen=True)
class Field:
    """Hold the folders of a trial: one with the outputs and the text of each start, and one for temporary files."""

    folder: Path
    temporary: str

    def start(self, name: str) -> subprocess.Popen:
        return start(self.folder / "outputs", PIPELINE, self.folder / f"{name}.txt", TMPDIR=self.temporary)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def processes(self) -> set[Process]:
        return processes(self.folder / "outputs")


def _hit(field: Field, outcome: Outcome) -> set[Process]:
    """Start, kill at the moment, and check how the runner ended; return the processes that lived at that moment."""
    trial, name = outcome.trial, "first"
    runner = field.start(name)
    if trial.twice:
        runner, name = _the_accepted_one(field, runner, outcome)
    if not until(lambda: f"{trial.stage}: running" in field.said(name), LONGEST_S):
        outcome.found.append("never began")
    over = until(lambda: runner.poll() is not None, trial.after_s)
    lived = field.processes()
    if over:
        outcome.missed = runner.returncode == 0
        outcome.found.append(f"ended with {runner.returncode} before it was killed")
        return lived
    stage = max(folder.name for folder in (field.folder / "outputs" / RUN).glob("0*"))
    outcome.late = (field.folder / "outputs" / RUN / stage / "pending.json").exists()
    killed = time.monotonic()
    _kill(trial.way, runner, field)
    outcome.status = runner.wait(LONGEST_S)
    if outcome.status != WAYS[trial.way] and not (outcome.late and outcome.status == 0):
        outcome.found.append(f"exit status {outcome.status}")
    if trial.way == "kernel killed" and outcome.status and KERNEL_KILLED not in field.said(name):
        outcome.found.append(f"said {field.said(name).splitlines()[-1]}")
    if trial.way != "runner killed":  # then the same command is given at once, as users do
        _look_for_orphans(field, killed, outcome)
    outcome.found += unsound(field.folder / "outputs" / RUN)
    return lived


def _the_accepted_one(field: Field, first: subprocess.Popen, outcome: Outcome) -> tuple[subprocess.Popen, str]:
    """Start a second runner: one of the two is rejected and names the other, which is returned."""
    second = field.start("second")
    until(lambda: first.poll() is not None or second.poll() is not None, LONGEST_S)
    name, rejected = ("second", second) if second.poll() is not None else ("first", first)
    other, process = ("first", first) if rejected is second else ("second", second)
    if rejected.returncode != 1 or f"locked by pid {process.pid} since" not in field.said(name):
        outcome.found.append(f"two at once: exit {rejected.returncode}, {field.said(name).strip()}")
    return process, other


def _kill(way: str, runner: subprocess.Popen, field: Field) -> None:
    if way == "SIGTERM":
        runner.terminate()
    elif way == "Ctrl-C":  # a terminal sends it to the whole group
        os.killpg(runner.pid, signal.SIGINT)
    elif way == "all killed":
        kill(field.processes(), signal.SIGKILL)
    elif way == "runner killed":
        runner.kill()
    else:
        until(lambda: [p for p in field.processes() if p.is_kernel], KERNEL_START_S)
        kill([p for p in field.processes() if p.is_kernel], signal.SIGKILL)


def _look_for_orphans(field: Field, killed: float, outcome: Outcome) -> None:
    """Wait for the last process of the run; those that remain are recorded and killed."""
    ended = time.monotonic()
    if not until(lambda: not field.processes(), LEFT_BEHIND_S):
        outcome.found += [f"orphan {process.command[:120]}" for process in field.processes()]
        kill(field.processes(), signal.SIGKILL)
    outcome.gone_s = time.monotonic() - killed
    if outcome.gone_s > GRACE_S + (ended - killed):
        outcome.found.append(f"gone only after {outcome.gone_s:.0f} s")


def _finish(field: Field, lived: set[Process], outcome: Outcome) -> None:
    """Run the same command again; no process of the first run may live when the second starts its work."""
    began = time.monotonic()
    runner = field.start("again")
    until(lambda: ": running" in field.said("again") or runner.poll() is not None, LONGEST_S)
    if both := field.processes() & lived:
        outcome.found += [f"still running during the next run: {process.command[:120]}" for process in both]
    elif outcome.gone_s is None:
        outcome.gone_s = time.monotonic() - began
    status = runner.wait(LONGEST_S)
    outcome.again_s = time.monotonic() - began
    if status:
        outcome.found.append(f"the same command ended with {status}: {field.said('again').strip().splitlines()[-1]}")
    _look_for_orphans(field, time.monotonic(), Outcome(outcome.trial, found=outcome.found))


# ---- all of them


def sweep(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> bool:
    """Run every trial and print a line each, then a summary; return whether all passed."""
    known = reference(folder, say)
    kept = folder / f"trials-{count}-{seed}.jsonl"
    outcomes = [_read(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for trial in plan(known.seconds, count, seed):
        if any(outcome.trial.number == trial.number for outcome in outcomes):
            continue
        place = folder / f"trial-{trial.number:02d}"
        outcome = try_out(trial, known, place)
        while outcome.missed and outcome.trial.after_s > SOONEST_S:
            outcome = try_out(replace(outcome.trial, after_s=round(outcome.trial.after_s / 2, 2)), known, place)
        outcomes.append(outcome)
        say(outcome.line(count))
        with kept.open("a") as stream:
            stream.write(json.dumps(asdict(outcome)) + "\n")
        if not outcome.found:
            shutil.rmtree(place)  # everything is kept of a trial that found something
    for line in summary(outcomes):
        say(line)
    return len(outcomes) == count and not any(outcome.found for outcome in outcomes)


def _read(line: str) -> Outcome:
    values = json.loads(line)
    return Outcome(**values | {"trial": Trial(**values["trial"])})


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Summarise a sweep."""
    bad = [outcome for outcome in outcomes if outcome.found]
    ways = Counter(outcome.trial.way for outcome in outcomes)
    stages = Counter(outcome.trial.stage for outcome in outcomes)
    gone = max((outcome.gone_s or 0.0 for outcome in outcomes), default=0.0)
    orphans = sum(found.startswith("orphan") for outcome in outcomes for found in outcome.found)
    return [
        f"{len(outcomes)} trials: {', '.join(f'{n} {way}' for way, n in ways.items())}",
        f"killed: {', '.join(f'{stages[stage]} in {stage}' for stage in STAGES)}",
        f"{len(outcomes) - len(bad)} of {len(outcomes)} finished by the same command with the same result,"
        f" {sum(outcome.trial.twice for outcome in outcomes)} second starts tried, {orphans} orphans,"
        f" the last process gone after at most {gone:.1f} s, {sum(o.again_s for o in outcomes) / 60:.0f} min of reruns",
        *(f"FOUND in trial {outcome.trial.number + 1}: {found}" for outcome in bad for found in outcome.found),
    ]
