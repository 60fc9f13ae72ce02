"""Run stages headless: papermill executes each notebook in a kernel of its own, and only whole results are kept.

The runner holds the run's lock for its kernels, skips what is done, refuses what was made with other settings, and puts
`done.json` in place last, after the executed notebook and its report.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_lib.cohort import source_digests
from ldm_lib.config import STAGES, AuditConfig, StageConfig, resolve
from ldm_lib.errors import LdmError, RunError
from ldm_lib.runs import (
    OWNER_VARIABLE,
    RunLock,
    changes,
    is_done,
    outputs_folder,
    testify,
    tracked,
    upstream_digests,
)

log = logging.getLogger("ldm_lib")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(
    stages: Sequence[str],
    *,
    name: str,
    preset: str,
    overrides: dict[str, Any],
    command: Sequence[str],
    say: Any,
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
    configs = resolve(preset, _absolute(overrides) | {"run": name})
    folder = outputs_folder() / configs["01_data_audit"].run
    lock = RunLock(folder)
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    try:
        testify(folder, preset=preset, configs=configs, command=list(command))
        for stage in stages or STAGES:
            _run_stage(stage, configs[stage], folder, say)
        _write_index(folder)
    finally:
        del os.environ[OWNER_VARIABLE]
        lock.release()
    return folder


def stage_inputs(stage: str, config: StageConfig, run_folder: Path) -> dict[str, str]:
    """What a stage is made from: the source files for the first, the earlier stages' outputs for the others."""
    if isinstance(config, AuditConfig):
        return source_digests(config.data_dir, config.conditioning_dir)
    return upstream_digests(run_folder, stage)


def _run_stage(stage: str, config: StageConfig, run_folder: Path, say: Any) -> None:
    folder = run_folder / stage
    inputs = stage_inputs(stage, config, run_folder)
    if is_done(folder, config, inputs):
        say(f"{stage}: done already, skipped")
        return
    differences = changes(folder, config, inputs)
    if differences and not config.overwrite:
        raise RunError(f"was made with other settings: {'; '.join(differences)}", where=f"{run_folder.name}/{stage}",
                       fix="name another run with --run, or add --overwrite")  # fmt: skip
    say(f"{stage}: running")
    _execute(stage, config, folder)
    done = json.loads((folder / "pending.json").read_text())
    _write_report(stage, folder)
    (folder / "pending.json").replace(folder / "done.json")
    passed = sum(check["passed"] for check in done["checks"])
    say(f"{stage}: done in {done['seconds']:.0f} s, {passed} of {len(done['checks'])} checks passed, "
        f"{done['peak_memory_mb']} MB")  # fmt: skip


def _execute(stage: str, config: StageConfig, folder: Path) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from ldm_lib.kernels import PrivateKernelManager

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "notebook.partial.ipynb"
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{stage}.ipynb",
            partial,
            parameters=config.model_dump(),
            kernel_name="python3",
            kernel_manager_class=PrivateKernelManager,
            progress_bar=False,
            cwd=NOTEBOOKS,
        )
    except PapermillExecutionError as error:
        raise RunError(_told(error), where=f"{stage}, cell {error.exec_count}", fix=f"see {partial}") from error
    except DeadKernelError as error:
        raise RunError("the kernel was killed, most likely out of memory", where=stage,
                       fix="take a smaller preset or crop, or a machine with more memory") from error  # fmt: skip
    if not (folder / "pending.json").exists():
        raise RunError("the notebook ended without closing its stage", where=stage, fix=f"see {partial}")
    partial.replace(folder / "notebook.ipynb")


def _told(error: Any) -> str:
    """What a cell raised: our own refusals as they stand, anything else with its type."""
    own = {cls.__name__ for cls in LdmError.__subclasses__()}
    return error.evalue if error.ename in own else f"{error.ename}: {error.evalue}"


def _write_report(stage: str, folder: Path) -> None:
    from ldm_lib.report import write_report

    write_report(folder / "notebook.ipynb", folder / "report.html", title=f"{folder.parent.name}: {stage}")


def _write_index(run_folder: Path) -> None:
    from ldm_lib.report import write_index

    done = [json.loads(path.read_text()) for path in sorted(run_folder.glob("*/done.json"))]
    rows = [{"stage": d["stage"], "status": "done", "seconds": d["seconds"], "checks": d["checks"],
             "report": f"{d['stage']}/report.html"} for d in done]  # fmt: skip
    write_index(run_folder, rows)


def _absolute(overrides: dict[str, Any]) -> dict[str, Any]:
    """Folders given on the command line are meant from where it was typed, not from where a kernel starts."""
    folders = {"data_dir", "conditioning_dir", "autoencoder_dir"}
    return {k: str(Path(v).expanduser().resolve()) if k in folders and v else v for k, v in overrides.items()}


def describe(stage: str, preset: str) -> str:
    """The parameters of a stage under a preset, one a line, as `make params` prints them."""
    config = resolve(preset)[stage]
    values = tracked(config) | config.model_dump()
    width = max(map(len, values))
    fields = type(config).model_fields
    return "\n".join(f"{k:{width}}  {values[k]!r:14}  {fields[k].description}" for k in fields)
