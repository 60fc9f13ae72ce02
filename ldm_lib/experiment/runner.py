"""Run stages headless: papermill executes each notebook in a kernel of its own, and only whole results are kept.

The runner holds the run's lock for its kernels, skips what is done, refuses what was made with other settings, and puts
`done.json` in place last, after the executed notebook and its report.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.data.cohort import source_digests
from ldm_lib.errors import InterruptionError, LdmError, RunError
from ldm_lib.experiment import path_aliases
from ldm_lib.experiment.presets import require_fit, resolve
from ldm_lib.experiment.run_folder import (
    SHARED_OUT,
    changes,
    is_done,
    outputs_folder,
    read_record,
    require_done,
    require_unchanged,
    upstream_digests,
    write_provenance,
)
from ldm_lib.experiment.stages import (
    STAGES,
    AuditConfig,
    AutoencoderConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)
from ldm_lib.files import digests, expand_path, markdown
from ldm_lib.locking import OWNER_VARIABLE, FolderLock
from ldm_lib.process_control import ForwardSignals

PROCESSES_LOG = "processes.txt"  # in the run's folder: what the processes of a training said

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def run(
    stages: Sequence[str],
    *,
    name: str,
    preset: str,
    overrides: dict[str, Any],
    command: Sequence[str],
    say: Callable[[str], None],
) -> Path:
    """Run stages in order and return the run's folder.

    Args:
        stages: full names; empty means all six.
        overrides: parameter -> value or text; reaches every stage that has a parameter of its name.
        say: receives one line of progress at a time.

    Raises:
        LdmError: a parameter is refused (before any kernel starts), the run is locked, a stage was made with other
            settings, or a notebook failed.
    """
    configs = resolve(preset, absolute(overrides) | {"run": name})
    if {"04_training", "05_sampling"} <= set(stages or STAGES):
        require_fit(configs)
    folder = outputs_folder() / configs["01_data_audit"].run
    lock = FolderLock(folder)
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    try:
        path_aliases.settle(folder, *(config.model_dump() for config in configs.values()))
        for stage in stages or STAGES:
            if _is_needed(stage, configs[stage], folder):
                write_provenance(folder, preset=preset, configs=configs, command=[_told(word) for word in command])
                say(f"{stage}: running, told in {folder / 'log.txt'}")
                say(_make(stage, configs[stage], folder / stage, say))
            else:
                say(f"{stage}: done already, skipped")
        _write_index(folder)
    finally:
        del os.environ[OWNER_VARIABLE]
        lock.release()
    return folder


def stage_inputs(stage: str, config: StageConfig, run_folder: Path) -> dict[str, str]:
    """What a stage is made from: the source files for the first, earlier stages' outputs and given weights after it."""
    if isinstance(config, AuditConfig):
        return source_digests(config.data_dir, config.conditioning_dir)
    weights = (config.given_weights,) if isinstance(config, AutoencoderConfig) else ()
    return upstream_digests(run_folder, stage) | digests(*weights)


def _is_needed(stage: str, config: StageConfig, run_folder: Path) -> bool:
    """Whether a stage must run; refused if it was made with other settings and may not be replaced."""
    folder = run_folder / stage
    inputs = stage_inputs(stage, config, run_folder)
    if is_done(folder, config, inputs):
        return False
    if not config.overwrite:
        require_unchanged(folder, config, inputs, fix="name another run with --run, or add --overwrite")
    return True


def _make(stage: str, config: StageConfig, folder: Path, say: Callable[[str], None]) -> str:
    """Execute a stage, write its report, and only then call it done; return a line about it."""
    shared = (folder / SHARED_OUT).exists() and not changes(folder, config, stage_inputs(stage, config, folder.parent))
    if isinstance(config, TrainingConfig | SamplingConfig) and config.devices > 1 and not shared:
        say(f"{stage}: in {config.devices} processes, told in {folder.parent / PROCESSES_LOG}")
        _share_out(stage, config.devices, folder.parent)
    _execute(stage, config, folder)
    _write_report(stage, folder)
    (folder / "pending.json").replace(folder / "done.json")
    done = read_record(folder / "done.json")
    failed = [check["check"] for check in done["checks"] if not check["passed"]]
    checks = f"{len(done['checks']) - len(failed)} of {len(done['checks'])} checks passed"
    checks += f" (not: {'; '.join(failed)})" if failed else ""
    return f"{stage}: done in {done['seconds']:.0f} s, {checks}, {done['peak_memory_mb']} MB"


def _share_out(stage: str, devices: int, run_folder: Path) -> None:
    """Do a stage's work in one process a device; its notebook then finds it done, looks at it and closes the stage."""
    command = [sys.executable, "-m", "ldm_lib.process_control", str(os.getpid()), "torch.distributed.run", "--standalone",
               f"--nproc-per-node={devices}", "-m", "ldm_lib.experiment.launch", "--", "--stage", stage[:2], "--run", run_folder.name]  # fmt: skip
    where, told = f"{run_folder.name}/{stage}", run_folder / PROCESSES_LOG
    launcher = None
    with told.open("w") as stream, ForwardSignals(lambda: launcher and launcher.pid, where=where):
        # In a group of its own, or Ctrl-C would reach it beside us.
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0)
        status = launcher.wait()
    path_aliases.hide(told, run_folder)
    if status:
        words = [line for line in told.read_text(errors="replace").splitlines() if line.startswith("ERROR ")]
        cause = words[0].removeprefix("ERROR ") if words else f"one of {devices} processes died"
        raise RunError(cause, where=where, fix=f"see {told}; the same command goes on from what is done")


def _execute(stage: str, config: StageConfig, folder: Path) -> None:
    from ldm_lib.experiment.kernel import PrivateKernelManager

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "notebook.partial.ipynb"
    try:
        with ForwardSignals(PrivateKernelManager.pid, where=stage):
            _run_notebook(stage, config, partial)
    finally:
        path_aliases.hide(partial, folder.parent)
    if not (folder / "pending.json").exists():
        raise RunError("the notebook ended without closing its stage", where=stage, fix=f"see {partial}")
    partial.replace(folder / "notebook.ipynb")


def _run_notebook(stage: str, config: StageConfig, written: Path) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from ldm_lib.experiment.kernel import PrivateKernelManager

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # of a kernel's end it would tell a second time
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{stage}.ipynb",
            written,
            parameters=path_aliases.named(config.model_dump()),
            kernel_name="python3",
            kernel_manager_class=PrivateKernelManager,
            progress_bar=False,
            cwd=NOTEBOOKS,
        )
    except PapermillExecutionError as error:
        raise _failure(error, stage, written) from error
    except RuntimeError as error:
        if isinstance(error, DeadKernelError) or PrivateKernelManager.was_killed():
            raise RunError(PrivateKernelManager.told_end(), where=stage,
                           fix="take a smaller preset or crop, or a machine with more memory") from error  # fmt: skip
        raise RunError(f"the kernel did not start ({error})", where=stage, fix="run `make doctor`") from error


def _failure(error: Any, stage: str, notebook: Path) -> LdmError:
    """What a cell raised, in one line: our refusals as they stand, anything else with its type and where to look."""
    where = f"{stage}, cell {error.exec_count}"
    if error.ename == InterruptionError.__name__:
        cause = error.evalue.partition(" Fix: ")[0].removeprefix("training: ")
        return InterruptionError(cause, where=where)  # what to do is said by who handed the signal on
    if error.ename in {known.__name__ for known in LdmError.__subclasses__()}:
        return RunError(error.evalue.removeprefix(f"{stage}: "), where=where)
    return RunError(f"{error.ename}: {error.evalue}".splitlines()[0], where=where, fix=f"see {notebook}")


def _write_report(stage: str, folder: Path) -> None:
    from ldm_lib.experiment.report import write_report

    write_report(folder / "notebook.ipynb", folder / "report.html", title=f"{folder.parent.name}: {stage}")


def _write_index(run_folder: Path) -> None:
    from ldm_lib.experiment.report import write_index

    done = [read_record(path) for path in sorted(run_folder.glob("*/done.json"))]
    write_index(run_folder, [{"status": "done", **record} for record in done])


def absolute(overrides: dict[str, Any]) -> dict[str, Any]:
    """Paths given on the command line are meant from where it was typed, not from where a kernel starts."""
    return {k: str(expand_path(v).resolve()) if k in path_aliases.NAMES and v else v for k, v in overrides.items()}


def _told(word: str) -> str:
    """A word of the command line, a path in it by its name."""
    name, equals, value = word.partition("=")
    return f"{name}=${path_aliases.NAMES[name]}" if equals and value and name in path_aliases.NAMES else word


def describe(stage: str, preset: str) -> str:
    """The parameters of a stage under a preset, one a line, as `make params` prints them."""
    config = resolve(preset)[stage]
    fields = type(config).model_fields
    width = max(map(len, fields))
    return "\n".join(f"{k:{width}}  {getattr(config, k)!r:14}  {fields[k].description}" for k in fields)


def compare(stage: str, runs: Sequence[str]) -> str:
    """A Markdown table of finished runs side by side: the parameters of a stage that differ, then what each found.

    Raises:
        ConfigError: a run's name that is no name.
        RunError: a run has not finished this stage.
    """
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
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown([[name, *(_short(row.get(name, "")) for row in rows)] for name in names])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:24]
