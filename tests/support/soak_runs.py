"""Start the commands under test as a user does, watch them from outside, and find what they leave.

Every process of a run has the run's outputs folder in its environment, whatever its parent; so processes that should
have ended are found. Linux only.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines import TINY

from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE, SHOWN_ONLY, damaged, read_record
from ldm_lib.experiment.stages import STAGES
from ldm_lib.inpainting.folder import RECORDS

ROOT = Path(__file__).parents[2]
RUN = "soak"  # name of the run in every outputs folder
SETTINGS = TINY | {"num_workers": 2}  # loader processes, so that the kernel of 04 has children
PIPELINE = ["run", "--preset", "smoke", "--run", RUN]
PIPELINE += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
LONGEST_S = 3600.0  # a command that takes longer hangs
LEFTOVERS = (".*.part", "*.partial.*", "pending.json")  # of unfinished work


def start(outputs: Path, words: Iterable[object], output: Path, **more: str) -> subprocess.Popen:
    """Start `python -m ldm_lib`, as the leader of a process group, with both streams in the file `output`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), OUTPUTS_VARIABLE: str(outputs), **more}
    with output.open("w") as stream:
        return subprocess.Popen([sys.executable, "-m", "ldm_lib", *map(str, words)], env=environment, cwd=ROOT,
                                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0)  # fmt: skip


def until(holds: Callable[[], object], seconds: float, step_s: float = 0.02) -> bool:
    """Wait for a condition; return whether it held in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(step_s)
    return True


@dataclass(frozen=True)
class Process:
    """Describe a living process; its start time distinguishes it from a later one with the same number."""

    pid: int
    started: str
    command: str

    @property
    def is_kernel(self) -> bool:
        return "ipykernel" in self.command


def processes(outputs: Path) -> set[Process]:
    """Return the processes that work for an outputs folder, without zombies."""
    mark, found = f"{OUTPUTS_VARIABLE}={outputs}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                started = (folder / "stat").read_text().rpartition(")")[2].split()[19]
                found.add(Process(int(folder.name), started, command.strip()))
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


def kill(those: Iterable[Process], number: int) -> None:
    """Send a signal to each that still lives."""
    for process in those:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


# ---- an undisturbed run


@dataclass(frozen=True)
class Reference:
    """Hold one undisturbed run: its outputs folder, and stage -> seconds from its "running" line to its "done" line."""

    outputs: Path
    seconds: dict[str, float]


def reference(folder: Path, say: Callable[[str], None]) -> Reference:
    """Make the undisturbed run in a folder, or return the existing one."""
    outputs, kept = folder / "reference", folder / "reference.json"
    if kept.exists():
        say(f"undisturbed run: found in {outputs}; remove {folder} to make it again")
        return Reference(outputs, json.loads(kept.read_text()))
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir(parents=True)
    output, began, seconds = folder / "reference.txt", {}, {}
    process = start(outputs, PIPELINE, output)
    while process.poll() is None:
        text = output.read_text()
        began |= {s: time.monotonic() for s in STAGES if f"{s}: running" in text and s not in began}
        seconds |= {s: time.monotonic() - began[s] for s in began if f"{s}: done in" in text and s not in seconds}
        time.sleep(0.02)
    if process.returncode or set(seconds) != set(STAGES):
        raise SystemExit(f"the undisturbed run ended with {process.returncode}: see {output}")
    kept.write_text(json.dumps(seconds, indent=1) + "\n")
    say(f"undisturbed run: {sum(seconds.values()):.0f} s")
    return Reference(outputs, seconds)


def results(run: Path) -> dict[str, str]:
    """Return name -> digest of all that a later stage or a user takes from a run, without times and pictures."""
    found = {}
    for stage in STAGES:
        for name, digest in read_record(run / stage / "done.json")["outputs"].items():
            scores = (stage, name) == ("06_evaluation", "metrics.csv")
            timed = SHOWN_ONLY.fullmatch(name) or name.startswith(f"{RECORDS}/")
            found[f"{stage}/{name}"] = "shown" if timed and not scores else digest
    return found


def unsound(run: Path) -> list[str]:
    """List what stages that pass for done lack: an output that does not verify, a notebook or a report."""
    wrong = []
    for stage in STAGES:
        folder = run / stage
        if (folder / "done.json").exists():
            missing = [name for name in ("notebook.ipynb", "report.html") if not (folder / name).exists()]
            wrong += [f"{stage} passes for done: {name}" for name in damaged(folder) + missing]
    return wrong


def leftovers(run: Path) -> list[str]:
    """List the files of unfinished work."""
    return sorted(str(path.relative_to(run)) for pattern in LEFTOVERS for path in run.rglob(pattern))
