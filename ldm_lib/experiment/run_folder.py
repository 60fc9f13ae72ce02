"""Run folders with provenance: inputs, parameters, outputs and completion of every stage.

`done.json` is written last: a stage without it has not finished, whatever else is in its folder. A stage that finished
with the same inputs and parameters need not run again; with different ones it is rejected unless `overwrite` is set.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_lib.errors import RunError
from ldm_lib.experiment.path_aliases import PathHidingFormatter, remember_paths, with_aliases
from ldm_lib.experiment.provenance import peak_memory_mb, provenance
from ldm_lib.experiment.stages import STAGES, StageConfig
from ldm_lib.files import fingerprint, now, read_json, sha256, write_csv, write_json
from ldm_lib.locking import OWNER_VARIABLE, FolderLock
from ldm_lib.options import names
from ldm_lib.training.options import SHARED_OUT

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
UNTRACKED_OUTPUTS = (SHARED_OUT, "notebook.ipynb", "notebook.partial.ipynb", "report.html", "done.json", "pending.json",
                     "parameters.json")  # fmt: skip


def outputs_folder() -> Path:
    """Return the folder of all runs: $LDM_OUTPUTS, else outputs/ of the working directory.

    A notebook that is opened in its own folder finds the runs of the folder above.
    """
    here = Path.cwd()
    return Path(os.environ.get(OUTPUTS_VARIABLE) or (here.parent if here == NOTEBOOKS else here) / "outputs").resolve()


@dataclass(frozen=True)
class Picture:
    """Display a saved figure in a notebook."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass
class Stage:
    """Hold one stage of a run while its notebook works: where it writes, and what it checks.

    Attributes:
        name: such as "04_training".
        config: its validated parameters.
        folder: outputs/<run>/<name>.
        inputs: name -> sha256 of what it was made from.
    """

    name: str
    config: StageConfig
    folder: Path
    inputs: dict[str, str]
    checks: list[dict[str, Any]] = field(default_factory=list)
    _lock: FolderLock | None = None
    _started: float = field(default_factory=time.monotonic)

    def previous(self, name: str) -> Path:
        """Return the folder of an earlier stage of this run, which must have finished."""
        return require_done(self.folder.parent, name)

    def figure(self, figure: Any, name: str) -> Picture:
        """Save a matplotlib figure as figures/<name>.png and return it for display."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=100, facecolor=figure.get_facecolor())
        return Picture(path)

    def table(self, rows: list[dict[str, Any]], name: str) -> Any:
        """Save rows as <name>.csv (columns in order of appearance) and return them as a DataFrame."""
        import pandas

        return pandas.DataFrame(rows, columns=write_csv(self.folder / f"{name}.csv", rows))

    def check(self, what: str, passed: bool, found: object, *, required: bool = True) -> None:
        """Record an acceptance check; `close` raises an error if a required one failed."""
        self.checks.append({"check": what, "passed": bool(passed), "found": str(found), "required": required})

    def close(self, summary: dict[str, Any]) -> Any:
        """Finish the stage: write summary.json and, last, done.json; return the checks as a table.

        Raises:
            RunError: a required check failed; the stage is not finished.
        """
        import pandas

        write_json(self.folder / "summary.json", summary)
        failed = [c for c in self.checks if c["required"] and not c["passed"]]
        if failed:
            message = "; ".join(f"{c['check']} ({c['found']})" for c in failed)
            raise RunError(f"not accepted: {message}", where=self.name, fix="see the notebook's last table")
        content = {
            "stage": self.name,
            "parameters": tracked(self.config),
            "inputs": self.inputs,
            "outputs": {name: sha256(path) for name, path in _outputs(self.folder).items()},
            "checks": self.checks,
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_memory_mb": peak_memory_mb(),
            "finished": now(),
            "made_with": provenance(),
        }
        headless = OWNER_VARIABLE in os.environ
        write_json(self.folder / ("pending.json" if headless else "done.json"), content)
        log.info("%s finished after %.0f s", self.name, content["seconds"])
        if self._lock and not headless:
            self._lock.release()
        return pandas.DataFrame(self.checks, columns=["check", "passed", "found", "required"])


def open_stage(name: str, parameters: dict[str, Any], *, inputs: dict[str, str] | None = None) -> Stage:
    """Start a stage of a run from a notebook or from Python, and return where it writes and what it records.

    Args:
        name: full name of the stage, such as "04_training".
        parameters: values by name, such as a notebook's `globals()`; names of no parameter are ignored.
        inputs: name -> digest of what the stage is made from, besides the earlier stages.

    Raises:
        ConfigError: a parameter has a wrong type or is out of range.
        RunError: the run is locked, an earlier stage is not done, or this stage was started with other settings.

    Examples:
        >>> stage = open_stage("01_data_audit", {"run": "example", "seed": 3})
        >>> stage.check("cases found", True, 12)
        >>> table = stage.close({"cases": 12})  # writes done.json
        >>> sorted(path.name for path in stage.folder.iterdir())
        ['done.json', 'parameters.json', 'summary.json']
    """
    model = STAGES[name]
    config = model.parse({key: parameters[key] for key in model.model_fields if key in parameters})
    run_folder = outputs_folder() / config.run
    folder = run_folder / name
    lock = FolderLock(run_folder)
    with ExitStack() as on_error:
        on_error.callback(lock.release)
        _log_to(run_folder / "log.txt")
        remember_paths(run_folder, config.model_dump())
        inputs = {**upstream_digests(run_folder, name), **(inputs or {})}
        _clear(folder, config, inputs)
        write_json(folder / "parameters.json", {"parameters": tracked(config), "inputs": inputs})
        on_error.pop_all()
    log.info("%s started", name)
    return Stage(name, config, folder, inputs, _lock=lock)


def _clear(folder: Path, config: StageConfig, inputs: dict[str, str]) -> None:
    """Prepare a stage's folder: it is not done any more, and results of other settings are removed or rejected."""
    if not config.overwrite:
        require_unchanged(folder, config, inputs, fix="name another run, or set overwrite to replace it")
    elif changes(folder, config, inputs):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    for marker in ("done.json", "pending.json"):
        (folder / marker).unlink(missing_ok=True)
    for partial in folder.rglob(".*.part"):  # of a process that was killed: we hold the lock of the run
        partial.unlink()


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
    """List the differences between a stage as it was started and as it is requested; empty if none or not started."""
    started = folder / "parameters.json"
    if not started.exists():
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
    files = _outputs(folder)
    return sorted(name for name, digest in recorded.items() if name not in files or sha256(files[name]) != digest)


def require_done(run_folder: Path, name: str) -> Path:
    """Return the folder of a finished stage.

    Raises:
        RunError: it has not finished.
    """
    folder = run_folder / name
    if not (folder / "done.json").exists():
        fix = f"run `make {name[:2]} RUN={run_folder.name}`"
        raise RunError("is not done", where=f"{run_folder.name}/{name}", fix=fix)
    return folder


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
    _log_to(run_folder / "log.txt")


def _outputs(folder: Path) -> dict[str, Path]:
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: p for n, p in files.items() if n not in UNTRACKED_OUTPUTS and not p.name.startswith(".")}


def _log_to(path: Path) -> None:
    if str(path) in {getattr(handler, "baseFilename", "") for handler in log.handlers}:
        return
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path)
    handler.setFormatter(PathHidingFormatter(path.parent))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
