"""Run a sweep: each run is a process of its own, a few at a time; the same command continues where it stopped.

Stages that another run of the sweep has finished are copied with their `done.json` instead of being run again.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm_lib.errors import ConfigError, LdmError
from ldm_lib.experiment.path_aliases import hide_paths_in
from ldm_lib.experiment.run_folder import changes, is_done, outputs_folder
from ldm_lib.experiment.stage import stage_inputs
from ldm_lib.experiment.stages import StageConfig
from ldm_lib.experiment.sweep_file import Sweep, SweepRun
from ldm_lib.experiment.sweep_table import ENDED, last_line, log_path, sweep_folder
from ldm_lib.locking import FolderLock
from ldm_lib.progress import Progress

COMMAND = (sys.executable, "-m", "ldm_lib", "run")
POLL_S = 0.2
PATIENCE_S = 70.0  # from SIGTERM, in which a run ends its kernel and releases its folder, to SIGKILL
THREADS = "OMP_NUM_THREADS"
# Folders next to a stage's that go with it. Latents are named after their inputs: those that do not fit are not used.
COMPANIONS = {"03_conditioning": ("maps", "latents")}
# Files that are never written in place, only replaced by renaming: a hard link is as good as a copy.
LINKED = (".nii.gz", ".safetensors", ".ckpt")


@dataclass
class _Active:
    """Hold a run in progress; `label` begins the lines about it."""

    run: SweepRun
    label: str
    log: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


def run_sweep(sweep: Sweep, *, jobs: int, only: int | None, progress: Callable[[str], None]) -> dict[str, str]:
    """Run a sweep's runs, `jobs` at a time, and return name -> reason of those that failed.

    A finished run skips its stages; a run that fails does not stop the others; `only` is the index, from 0, of a single
    run. However this function ends, no process is left behind: those that are running are terminated and waited for.
    """
    if only is not None and not 0 <= only < len(sweep.runs):
        raise ConfigError(f"--only {only}: the runs are 0 to {len(sweep.runs) - 1}", fix="see --count for their number")
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1", fix="write for example --jobs 2")
    (sweep_folder(sweep.name) / "logs").mkdir(parents=True, exist_ok=True)
    chosen = range(len(sweep.runs)) if only is None else [only]
    return _run_all(sweep, list(chosen), min(jobs, len(chosen)), progress)


def _run_all(sweep: Sweep, waiting: list[int], jobs: int, progress: Callable[[str], None]) -> dict[str, str]:
    active: list[_Active] = []
    failed, total = {}, len(waiting)
    bar = Progress(total, name="run")
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(_start(sweep, waiting.pop(0), jobs))
                progress(f"{active[-1].label}: started, log in {active[-1].log}")
            for ended in [one for one in active if one.process.poll() is not None]:
                active.remove(ended)
                seconds = time.monotonic() - ended.started
                if reason := _finish(ended):
                    failed[ended.run.name] = reason
                left = len(waiting) + len(active)
                progress(f"{ended.label}: {reason or 'done'} after {seconds:.0f} s; {left} left")
                bar.update(total - left, ended.run.name)
            time.sleep(POLL_S if active else 0)
    finally:
        bar.close()
        _stop([one.process for one in active])
    return failed


def _start(sweep: Sweep, index: int, jobs: int) -> _Active:
    run = sweep.runs[index]
    log = log_path(sweep, run)
    others = [outputs_folder() / other.name for other in sweep.runs if other is not run]
    with log.open("wb", buffering=0) as stream:
        try:
            reused = reuse_stages(outputs_folder() / run.name, run.configs, sweep.stages, others)
        except LdmError as error:  # the run itself will fail with it
            reused = {}
            stream.write(f"no stage is reused: {error}\n".encode())
        stream.write("".join(f"{stage}: reused from {source}\n" for stage, source in reused.items()).encode())
        settings = [word for name, value in run.values.items() for word in ("--set", f"{name}={value}")]
        command = [*COMMAND, *sweep.stages, "--run", run.name, "--preset", sweep.preset, *settings]
        # In a process group of its own, so that Ctrl-C reaches this process alone, which then ends the runs.
        # The cores, of which a job may hold a part, are divided, unless the user has set the number of threads.
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        threads = {THREADS: str(max(1, len(cores(0)) // jobs))} if jobs > 1 else {}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                   env=threads | os.environ, process_group=0)  # fmt: skip
    return _Active(run, f"[{index + 1}/{len(sweep.runs)}] {run.name}", log, process)


def _finish(ended: _Active) -> str:
    """Complete a run's log, and return why it failed; empty if it did not."""
    reason = ""
    if status := ended.process.returncode:
        reason = f"{ENDED}{status} ({last_line(ended.log, 'ERROR ') or last_line(ended.log)})"
        with ended.log.open("a") as stream:
            stream.write(f"{reason}\n")
    hide_paths_in(ended.log, outputs_folder() / ended.run.name)
    return reason


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE_S
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def reuse_stages(
    run_folder: Path, configs: Mapping[str, StageConfig], stages: Sequence[str], sources: Sequence[Path]
) -> dict[str, str]:
    """Copy the stages that this run would make identically, and return stage -> name of the run it came from.

    Stages are copied in order from the first source, a folder of a run, that fits, up to the first that must be made. A
    stage that was started is left to the runner.
    """
    lock, reused = FolderLock(run_folder), {}
    try:
        for stage in (name for name in stages if not (run_folder / name / "done.json").exists()):
            folder = run_folder / stage
            if folder.exists():
                break
            inputs = stage_inputs(stage, configs[stage], run_folder)
            source = next((run for run in sources if _copy_stage(run / stage, folder, configs[stage], inputs)), None)
            if not source:
                break
            reused[stage] = source.name
    finally:
        lock.release()
    return reused


def _copy_stage(source: Path, folder: Path, config: StageConfig, inputs: dict[str, str]) -> bool:
    """Copy a stage that fits; the copy is what is checked, since the source may change meanwhile."""
    if source == folder or not (source / "done.json").exists() or changes(source, config, inputs):
        return False
    with TemporaryDirectory(dir=folder.parent, prefix=".reusing-") as temporary:
        copy = Path(temporary) / folder.name
        try:
            _copy(source, copy)
            if not is_done(copy, config, inputs):
                return False
            for companion in COMPANIONS.get(folder.name, ()):
                if (source.parent / companion).is_dir():
                    _copy(source.parent / companion, folder.parent / companion)
        except OSError:  # the source is being replaced, or the disk is full, which the run itself will report
            return False
        copy.rename(folder)
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a folder without unfinished files; existing files stay."""
    unfinished = shutil.ignore_patterns(".*.part", ".claims", ".locks")
    shutil.copytree(source, target, symlinks=True, ignore=unfinished, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    if Path(target).exists():
        return
    with suppress(OSError):  # another file system, or one without links
        if source.endswith(LINKED):
            os.link(source, target)
            return
    shutil.copy2(source, target)
