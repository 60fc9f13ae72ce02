"""Run stages headless: papermill executes each notebook in a kernel of its own, and only complete results are kept.

The runner holds the run's lock for its kernels, and renames `pending.json` to `done.json` last, after the executed
notebook and its report are in place.
"""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm_lib.errors import InterruptionError, LdmError, RunError
from ldm_lib.experiment.path_aliases import (
    absolute_paths,
    command_with_aliases,
    hide_paths_in,
    remember_paths,
    with_aliases,
)
from ldm_lib.experiment.presets import DEFAULT_PRESET, require_fit, resolve
from ldm_lib.experiment.run_folder import (
    NOTEBOOKS,
    SHARED_OUT,
    changes,
    is_done,
    last_opened,
    outputs_folder,
    read_record,
    require_done,
    require_unchanged,
    restore_run_records,
    run_records,
    write_provenance,
)
from ldm_lib.experiment.stage import stage_inputs
from ldm_lib.experiment.stages import (
    STAGES,
    AuditConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
    parameter_groups,
    stage_name,
)
from ldm_lib.files import markdown
from ldm_lib.locking import FolderLock
from ldm_lib.process_control import ForwardSignals
from ldm_lib.progress import LEFT, Progress, report

PROCESSES_LOG = "processes.txt"  # in the run's folder: the output of the processes of a training


def run(stages: str | Sequence[str] = (), *, preset: str = DEFAULT_PRESET, run: str = "", **parameters: Any) -> Path:
    """Run stages in order, as `ldm run` does, and return the folder of the run.

    What is done with the same parameters is skipped; progress goes to standard error.

    Args:
        stages: such as "04" or ["01_data_audit", "02"]; empty runs all six.
        preset: "smoke", "demo", "coarse", "weights", "people" or "full".
        run: name of the run's folder in the outputs folder; empty takes the preset's name.
        parameters: by name; each reaches every stage that has it.

    Examples:
        >>> import ldm_lib as ldm
        >>> folder = ldm.run(["01", "02"], preset="smoke", seed=3)  # doctest: +SKIP
        >>> sorted(path.name for path in folder.glob("*/report.html"))  # doctest: +SKIP
    """
    stages = [stages] if isinstance(stages, str) else stages
    return run_stages(stages, run=run or preset, preset=preset, overrides=parameters, command=["ldm_lib.run"])


def run_stages(
    stages: Sequence[str],
    *,
    run: str,
    preset: str,
    overrides: Mapping[str, Any],
    command: Sequence[str],
    progress: Callable[[str], None] = report,
) -> Path:
    """Run stages in order and return the run's folder.

    Args:
        stages: names or numbers; empty means all six.
        overrides: parameter -> value or text; reaches every stage that has a parameter of its name.
        command: what is recorded as the command of this run.

    Raises:
        LdmError: a parameter is invalid (before any kernel starts), the run is locked, a stage was made with other
            settings, or a notebook failed.
    """
    stages = [stage_name(text) for text in stages] or list(STAGES)
    configs = resolve(preset, absolute_paths(overrides) | {"run": run})
    if {"04_training", "05_sampling"} <= set(stages):
        require_fit(configs)
    folder = outputs_folder() / configs["01_data_audit"].run
    from ldm_lib.experiment.front_page import write_front_page
    from ldm_lib.experiment.kernel import kernels_of

    lock = FolderLock(folder)
    stage, before, opened = stages[0], run_records(folder), last_opened(folder / stages[0])
    try:
        remember_paths(folder, *(config.model_dump() for config in configs.values()))
        with kernels_of(folder), Progress(len(stages), name="stage") as bar:
            for number, stage in enumerate(stages, start=1):
                opened = last_opened(folder / stage)
                if needed := _is_needed(stage, configs[stage], folder):
                    write_provenance(folder, preset=preset, configs=configs, command=command_with_aliases(command))
                    progress(f"{stage}: running, log in {folder / 'log.txt'}")
                    bar.update(number - 1, stage)
                    progress(_make(stage, configs[stage], folder / stage, progress))
                else:
                    progress(f"{stage}: done already, skipped")
                bar.update(number, stage, skipped=not needed)
                write_front_page(folder)
                before = run_records(folder)
    except LdmError:
        _after_failure(folder, stage, opened, before)
        raise
    finally:
        lock.release()
    return folder


def _after_failure(run_folder: Path, stage: str, opened: tuple[int, ...], before: dict[str, bytes]) -> None:
    """Undo what a stage that was rejected at its start has recorded, and write the front page."""
    from ldm_lib.experiment.front_page import write_front_page

    if last_opened(run_folder / stage) == opened:
        restore_run_records(run_folder, before)
    with suppress(OSError):  # of a full disk: the error itself says so
        if (run_folder / "config.json").exists():
            write_front_page(run_folder)


def _is_needed(stage: str, config: StageConfig, run_folder: Path) -> bool:
    """Return whether a stage must run, or raise an error if it was made with other settings and may not be replaced."""
    folder = run_folder / stage
    inputs = stage_inputs(stage, config, run_folder)
    if is_done(folder, config, inputs):
        return False
    if not config.overwrite:
        require_unchanged(folder, config, inputs, fix="name another run with --run, or add --overwrite")
    return True


def _make(stage: str, config: StageConfig, folder: Path, progress: Callable[[str], None]) -> str:
    """Execute a stage, write its report, and only then mark it as done; return a line about it."""
    from ldm_lib.experiment.report import write_report

    shared = (folder / SHARED_OUT).exists() and not changes(folder, config, stage_inputs(stage, config, folder.parent))
    if isinstance(config, TrainingConfig | SamplingConfig) and config.devices > 1 and not shared:
        progress(f"{stage}: in {config.devices} processes, log in {folder.parent / PROCESSES_LOG}")
        _run_processes(stage, config.devices, folder.parent)
    try:
        _execute(stage, config, folder)
    except LdmError:
        (folder / SHARED_OUT).unlink(missing_ok=True)  # next time the processes look again at what is there
        raise
    write_report(folder / "notebook.ipynb", folder / "report.html", title=f"{folder.parent.name}: {stage}")
    (folder / "pending.json").replace(folder / "done.json")
    done = read_record(folder / "done.json")
    failed = [check["check"] for check in done["checks"] if not check["passed"]]
    checks = f"{len(done['checks']) - len(failed)} of {len(done['checks'])} checks passed"
    checks += f" (not: {'; '.join(failed)})" if failed else ""
    return f"{stage}: done in {done['seconds']:.0f} s, {checks}, {done['peak_memory_mb']} MB"


def _run_processes(stage: str, devices: int, run_folder: Path) -> None:
    """Do a stage's work in one process a device; its notebook then finds the work done, and checks and records it."""
    command = [sys.executable, "-m", "ldm_lib.process_control", str(os.getpid()), "torch.distributed.run"]
    command += ["--standalone", f"--nproc-per-node={devices}", "-m", "ldm_lib.experiment.launch"]
    command += ["--", "--stage", stage[:2], "--run", run_folder.name]
    where, output = f"{run_folder.name}/{stage}", run_folder / PROCESSES_LOG
    launcher = None
    with output.open("w") as stream, ForwardSignals(lambda: launcher and launcher.pid, where=where):
        # In a process group of its own, or Ctrl-C would reach it in addition to this process.
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0)
        status = launcher.wait()
    hide_paths_in(output, run_folder)
    if status:
        errors = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("ERROR ")]
        cause = errors[0].removeprefix("ERROR ") if errors else f"one of {devices} processes died"
        raise RunError(cause, where=where, fix=f"see {output}; the same command continues from the last checkpoint")


def _execute(stage: str, config: StageConfig, folder: Path) -> None:
    from ldm_lib.experiment.kernel import RunnerKernelManager

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "notebook.partial.ipynb"
    try:
        with ForwardSignals(RunnerKernelManager.pid, where=stage):
            _run_notebook(stage, config, partial)
    finally:
        hide_paths_in(partial, folder.parent)
    if not (folder / "pending.json").exists():
        raise RunError("the notebook ended without finishing its stage", where=stage, fix=f"see {partial}")
    partial.replace(folder / "notebook.ipynb")


class _Forward(io.TextIOBase):
    """Pass on the lines of progress that a notebook writes to standard error, and nothing else of it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.endswith(LEFT):
                report(f"{self.stage}: {line}")
        return len(text)


def _run_notebook(stage: str, config: StageConfig, output: Path) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from ldm_lib.experiment.kernel import RunnerKernelManager

    RunnerKernelManager.process = None  # that of the stage before may have ended by a signal
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it would report the end of a kernel a second time
    try:
        papermill.execute_notebook(  # in the run's folder: the notebooks of an installed package may be read-only
            NOTEBOOKS / f"{stage}.ipynb", output, parameters=with_aliases(config.model_dump()), kernel_name="python3",
            kernel_manager_class=RunnerKernelManager, progress_bar=False, cwd=output.parents[1],
            stderr_file=_Forward(stage),
        )  # fmt: skip
    except PapermillExecutionError as error:
        raise _failure(error, stage, output) from error
    except RuntimeError as error:
        if death := RunnerKernelManager.death():
            fix = "take a smaller preset or crop, or a machine with more memory"
            raise RunError(death, where=stage, fix=fix) from error
        raise RunError(f"the kernel failed ({error})", where=stage, fix="run `ldm doctor`") from error


def _failure(error: Any, stage: str, notebook: Path) -> LdmError:
    """Return a cell's error in one line: those of this library unchanged, others with their type and the notebook."""
    where = f"{stage}, cell {error.exec_count}"
    if error.ename == InterruptionError.__name__:
        cause = error.evalue.partition(" Fix: ")[0].removeprefix("training: ")
        return InterruptionError(cause, where=where)  # ForwardSignals says what to do
    if error.ename in {known.__name__ for known in LdmError.__subclasses__()}:
        return RunError(error.evalue.removeprefix(f"{stage}: "), where=where)
    return RunError(f"{error.ename}: {error.evalue}".splitlines()[0], where=where, fix=f"see {notebook}")


def preset_of(run: str) -> str:
    """Return the preset that an existing run was made with, or the default one."""
    record = outputs_folder() / AuditConfig.parse({"run": run}).run / "config.json"
    return str(read_record(record)["preset"]) if record.exists() else DEFAULT_PRESET


def describe(stage: str, preset: str) -> str:
    """List the parameters of a stage under a preset by group, one a line with its allowed values in brackets."""
    config = resolve(preset)[stage]
    fields = type(config).model_fields
    width = max(map(len, fields))
    groups = []
    for heading, names in parameter_groups(type(config)):
        lines = [
            f"  {name:{width}}  {getattr(config, name)!r:14}  {fields[name].description} [{config.allowed(name)}]"
            for name in names
        ]
        groups.append("\n".join([heading, *lines]))
    return "\n\n".join(groups)


def compare(stage: str, runs: Sequence[str]) -> str:
    """Return a Markdown table that compares finished runs: the parameters of a stage that differ, then the results."""
    folders = [require_done(outputs_folder() / AuditConfig.parse({"run": run}).run, stage) for run in runs]
    records = [read_record(folder / "done.json") for folder in folders]
    parameters = [record["parameters"] for record in records]
    differing = [name for name in parameters[0] if len({str(p.get(name)) for p in parameters}) > 1]
    rows = [
        {"run": run}
        | {name: record["parameters"].get(name, "") for name in differing}
        | read_record(folder / "summary.json")
        | {"stage_s": record["seconds"], "peak_memory_mb": record["peak_memory_mb"]}
        for run, folder, record in zip(runs, folders, records, strict=True)
    ]
    values = {name: [row.get(name, "") for row in rows] for row in rows for name in row}
    texts = {name: [f"{v:.4g}" if isinstance(v, float) else str(v)[:24] for v in values[name]] for name in values}
    return markdown([[name, *given] for name, given in texts.items()])
