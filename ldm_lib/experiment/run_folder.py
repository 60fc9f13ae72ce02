"""Run folders with provenance: inputs, parameters, outputs and completion of every stage.

`done.json` is written last: a stage without it has not finished, whatever else is in its folder. A stage that finished
with the same inputs and parameters need not run again; with different ones it is rejected unless `overwrite` is set.
"""

import logging
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm_lib.errors import RunError
from ldm_lib.experiment.path_aliases import FILE, PathHidingFormatter, with_aliases
from ldm_lib.experiment.stages import STAGES, StageConfig
from ldm_lib.files import fingerprint, now, read_json, sha256, write_json
from ldm_lib.options import names
from ldm_lib.version import __version__

log = logging.getLogger("ldm_lib")

OUTPUTS_VARIABLE = "LDM_OUTPUTS"  # the folder of runs, when it is not ./outputs
# In an installed package, else in the checkout.
_PACKAGED = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parents[1] / "notebooks"
# Figures, tables and times of a stage; later stages do not depend on them.
SHOWN_ONLY = re.compile(r"stacks-.*|(figures|checkpoints|samples|panels|wandb)/.*|.*\.csv|summary\.json")
NUMBER = (int, float)
# Keys that the records of a stage must have.
RECORD_FIELDS: dict[str, dict[str, Any]] = {
    "done.json": {"parameters": dict, "outputs": dict, "checks": list, "seconds": NUMBER, "peak_memory_mb": NUMBER,
                  "finished": str},
    "parameters.json": {"parameters": dict, "inputs": dict},
}  # fmt: skip
RUN_RECORDS = ("run.json", "config.json", FILE)
PACKAGES = ("torch", "monai", "lightning", "numpy", "scipy", "nibabel", "nilearn", "papermill", "pydantic")
_PROJECT = Path(__file__).parents[2]
SHARED_OUT = "shared_out.json"  # several processes did the work of this stage, its notebook only closes it
UNTRACKED_OUTPUTS = (SHARED_OUT, "notebook.ipynb", "notebook.partial.ipynb", "report.html", "done.json", "pending.json",
                     "parameters.json")  # fmt: skip


def outputs_folder() -> Path:
    """Return the folder of all runs: $LDM_OUTPUTS, else outputs/ of the working directory.

    A notebook that is opened in its own folder finds the runs of the folder above.
    """
    here = Path.cwd()
    return Path(os.environ.get(OUTPUTS_VARIABLE) or (here.parent if here == NOTEBOOKS else here) / "outputs").resolve()


def require_unchanged(folder: Path, config: StageConfig, inputs: dict[str, str], *, fix: str) -> None:
    """Raise an error that names every difference if a stage was started with other settings or inputs."""
    where = f"{folder.parent.name}/{folder.name}"
    if unknown := _unknown_parameters(folder, config):
        cause = f"was made by version 0.7 or before, whose parameters were called otherwise ({', '.join(unknown)})"
        raise RunError(cause, where=where, fix=fix)
    if differences := changes(folder, config, inputs, allowed=names(getattr(config, "allow_change", ""))):
        raise RunError(f"was made with other settings: {'; '.join(differences)}", where=where, fix=fix)


def tracked(config: StageConfig) -> dict[str, Any]:
    """Return the parameters that decide a stage's result, with aliases for paths."""
    return with_aliases(config.tracked())


def changes(folder: Path, config: StageConfig, inputs: dict[str, str], *, allowed: Sequence[str] = ()) -> list[str]:
    """List the differences between a stage as it was started and as it is requested.

    It is empty if there are none, or if the stage has made nothing: it was not started, or rejected at its start.
    """
    started = folder / "parameters.json"
    if not started.exists() or not ((folder / "done.json").exists() or outputs_of(folder)):
        return []
    record = read_record(started)
    before, inputs_before = record["parameters"], record["inputs"]
    requested = {k: v for k, v in tracked(config).items() if k not in allowed}
    found = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in requested.items() if before.get(k) != v]
    found += [f"{k} is no parameter any more" for k in _unknown_parameters(folder, config)]
    everything = sorted({*inputs_before, *inputs})
    return found + [f"input {name} changed" for name in everything if inputs_before.get(name) != inputs.get(name)]


def _unknown_parameters(folder: Path, config: StageConfig) -> list[str]:
    """Name the recorded parameters that only an earlier version had."""
    started = folder / "parameters.json"
    recorded = read_record(started)["parameters"] if started.exists() else {}
    return sorted(recorded.keys() - type(config).model_fields.keys())


def read_record(path: Path) -> dict[str, Any]:
    """Read one of the JSON files that a stage leaves.

    Raises:
        RunError: it cannot be read, or lacks a key.
    """
    try:
        record = read_json(path)
        for name, kind in RECORD_FIELDS.get(path.name, {}).items():
            if not isinstance(record.get(name), kind):
                raise ValueError(f"{name} is {record.get(name)!r:.40}")
    except ValueError as error:
        raise RunError(f"is damaged ({error})", where=path, fix="remove its folder and run the stage again") from error
    return record


def is_done(folder: Path, config: StageConfig, inputs: dict[str, str]) -> bool:
    """Return whether a stage finished with these settings and inputs, and its outputs are unchanged byte for byte."""
    return (folder / "done.json").exists() and not changes(folder, config, inputs) and not damaged(folder)


def damaged(folder: Path) -> list[str]:
    """List the outputs of a finished stage that are missing or have changed."""
    recorded = read_record(folder / "done.json")["outputs"]
    files = outputs_of(folder)
    return sorted(name for name, digest in recorded.items() if name not in files or sha256(files[name]) != digest)


def run_records(run_folder: Path) -> dict[str, bytes]:
    """Return name -> content of the records of a run, as `restore_run_records` takes them."""
    return {name: path.read_bytes() for name in RUN_RECORDS if (path := run_folder / name).is_file()}


def restore_run_records(run_folder: Path, before: dict[str, bytes]) -> None:
    """Undo the changes of a call that was rejected before it made anything."""
    for name, content in run_records(run_folder).items():
        if name not in before:
            (run_folder / name).unlink()
        elif content != before[name]:
            (run_folder / name).write_bytes(before[name])


def last_opened(folder: Path) -> tuple[int, ...]:
    """Return numbers that change whenever a stage is opened."""
    path = folder / "parameters.json"
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else ()


def require_done(run_folder: Path, name: str) -> Path:
    """Return the folder of a finished stage.

    Raises:
        RunError: it has not finished.
    """
    folder = run_folder / name
    if not (folder / "done.json").exists():
        fix = f"run `ldm run {name[:2]} --run {run_folder.name}`"
        raise RunError("is not done", where=f"{run_folder.name}/{name}", fix=fix)
    return folder


def require_as_made(run_folder: Path, configs: Mapping[str, StageConfig], given: Iterable[str], stage: str) -> None:
    """Raise an error if a given parameter of earlier stages alone is not the one that they were made with."""
    for earlier in (name for name in STAGES if name < stage):
        made, requested = read_record(require_done(run_folder, earlier) / "done.json"), tracked(configs[earlier])
        for name in (name for name in given if name in requested and name not in type(configs[stage]).model_fields):
            if (before := made["parameters"].get(name)) != requested[name]:
                cause = f"was made with other settings: {name} was {before!r}, now {requested[name]!r}"
                fix = f"leave out {name}, or make the stage again with it"
                raise RunError(cause, where=f"{run_folder.name}/{earlier}", fix=fix)


def upstream_digests(run_folder: Path, name: str) -> dict[str, str]:
    """Return for each earlier stage, all of which must be done, the digest of the outputs that later ones depend on."""
    return {stage: _results_digest(require_done(run_folder, stage)) for stage in STAGES if stage < name}


def _results_digest(folder: Path) -> str:
    outputs = read_record(folder / "done.json")["outputs"]
    return fingerprint({name: digest for name, digest in outputs.items() if not SHOWN_ONLY.fullmatch(name)})


def write_provenance(run_folder: Path, *, preset: str, configs: dict[str, StageConfig], command: list[str]) -> None:
    """Write run.json (code, versions, machine, command) and config.json (every parameter of every stage)."""
    write_json(run_folder / "run.json", {"command": command, "created": now(), **provenance()})
    write_json(
        run_folder / "config.json", {"preset": preset, **{k: with_aliases(v.model_dump()) for k, v in configs.items()}}
    )
    log_to(run_folder / "log.txt")


def provenance() -> dict[str, Any]:
    """Return code, versions and machine that a result comes from."""
    return {
        "version": __version__,
        "git": _git_state(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def peak_memory_mb() -> int:
    """Return the largest resident memory that this process has had, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else kilobytes
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _git_state() -> dict[str, Any]:
    if not (_PROJECT / ".git").exists():  # an installed package
        return {"commit": "unknown", "changed_files": None}
    git = ["git", "-C", str(_PROJECT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "changed_files": None}
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def outputs_of(folder: Path) -> dict[str, Path]:
    """List the files that a stage has written, by name: not its records, notebook and hidden files."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: p for n, p in files.items() if n not in UNTRACKED_OUTPUTS and not p.name.startswith(".")}


def log_to(path: Path) -> None:
    """Append the library's log to this file, without paths of the machine."""
    if str(path) in {getattr(handler, "baseFilename", "") for handler in log.handlers}:
        return
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path)
    handler.setFormatter(PathHidingFormatter(path.parent))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
