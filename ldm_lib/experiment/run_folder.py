"""A run folder that can testify: who made what, from which inputs, with which settings, and whether it ended.

`done.json` is written last. A stage without it never ended, whatever else lies in its folder. A stage that is done with
the same inputs and parameters need not run again; with different ones it is refused until it is told to overwrite.
"""

import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm_lib.errors import RunError
from ldm_lib.experiment.path_aliases import HidingFormatter, named, settle
from ldm_lib.experiment.stages import STAGES, StageConfig
from ldm_lib.files import fingerprint, now, read_json, sha256, write_csv, write_json
from ldm_lib.locking import OWNER_VARIABLE, FolderLock
from ldm_lib.options import names
from ldm_lib.training.options import SHARED_OUT

log = logging.getLogger("ldm_lib")

OUTPUTS_VARIABLE = "LDM_OUTPUTS"  # the folder of runs, when it is not ./outputs
# What a stage only shows or times; the stages after it are not made from these.
SHOWN_ONLY = re.compile(r"stacks-.*|(figures|checkpoints|samples|panels|wandb)/.*|.*\.csv|summary\.json")
NUMBER = (int, float)
# What the records of a stage hold at least.
RECORD_FIELDS: dict[str, dict[str, Any]] = {
    "done.json": {"parameters": dict, "outputs": dict, "checks": list, "seconds": NUMBER, "peak_memory_mb": NUMBER,
                  "finished": str},
    "parameters.json": {"parameters": dict, "inputs": dict},
}  # fmt: skip
UNTRACKED_OUTPUTS = (SHARED_OUT, "notebook.ipynb", "notebook.partial.ipynb", "report.html", "done.json", "pending.json",
                     "parameters.json")  # fmt: skip
PACKAGES = ("torch", "monai", "lightning", "numpy", "scipy", "nibabel", "nilearn", "papermill", "pydantic")


def outputs_folder() -> Path:
    """Where runs live: $LDM_OUTPUTS, else outputs/ of the project the library was installed from."""
    return Path(os.environ.get(OUTPUTS_VARIABLE) or Path(__file__).parents[2] / "outputs").resolve()


@dataclass(frozen=True)
class Picture:
    """A saved figure that a notebook shows as it stands on disk."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass
class Stage:
    """One open stage of a run: where its notebook writes, and what it must answer for.

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
        """The folder of an earlier stage of this run, which must be done."""
        return require_done(self.folder.parent, name)

    def figure(self, figure: Any, name: str) -> Picture:
        """Save a matplotlib figure as figures/<name>.png and show it."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=100, facecolor=figure.get_facecolor())
        return Picture(path)

    def table(self, rows: list[dict[str, Any]], name: str) -> Any:
        """Save rows as <name>.csv (columns in order of appearance) and return them as a DataFrame."""
        import pandas

        return pandas.DataFrame(rows, columns=write_csv(self.folder / f"{name}.csv", rows))

    def check(self, what: str, passed: bool, found: object, *, required: bool = True) -> None:
        """Note an acceptance check; a required one that failed keeps the stage from closing."""
        self.checks.append({"check": what, "passed": bool(passed), "found": str(found), "required": required})

    def close(self, summary: dict[str, Any]) -> Any:
        """Write summary.json and, last, done.json; return the checks as a table.

        Raises:
            RunError: a required check failed; the stage stays open.
        """
        import pandas

        write_json(self.folder / "summary.json", summary)
        failed = [c for c in self.checks if c["required"] and not c["passed"]]
        if failed:
            told = "; ".join(f"{c['check']} ({c['found']})" for c in failed)
            raise RunError(f"not accepted: {told}", where=self.name, fix="see the notebook's last table")
        content = {
            "stage": self.name,
            "parameters": tracked(self.config),
            "inputs": self.inputs,
            "outputs": {name: sha256(path) for name, path in _outputs(self.folder).items()},
            "checks": self.checks,
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "finished": now(),
            "made_with": provenance(),
        }
        headless = OWNER_VARIABLE in os.environ
        write_json(self.folder / ("pending.json" if headless else "done.json"), content)
        log.info("%s closed after %.0f s", self.name, content["seconds"])
        if self._lock and not headless:
            self._lock.release()
        return pandas.DataFrame(self.checks, columns=["check", "passed", "found", "required"])


def open_stage(name: str, parameters: dict[str, Any], *, inputs: dict[str, str] | None = None) -> Stage:
    """Open a stage from a notebook: `open_stage("04_training", globals())` takes the parameters by name.

    Raises:
        ConfigError: a parameter of a wrong type or out of range.
        RunError: the run is locked, an earlier stage is not done, or this stage was begun with other settings.
    """
    model = STAGES[name]
    config = model.parse({key: parameters[key] for key in model.model_fields if key in parameters})
    run_folder = outputs_folder() / config.run
    folder = run_folder / name
    lock = FolderLock(run_folder)
    with ExitStack() as refused:
        refused.callback(lock.release)
        _log_to(run_folder / "log.txt")
        settle(run_folder, config.model_dump())
        inputs = {**upstream_digests(run_folder, name), **(inputs or {})}
        _make_room(folder, config, inputs)
        write_json(folder / "parameters.json", {"parameters": tracked(config), "inputs": inputs})
        refused.pop_all()
    log.info("%s opened", name)
    return Stage(name, config, folder, inputs, _lock=lock)


def _make_room(folder: Path, config: StageConfig, inputs: dict[str, str]) -> None:
    """A stage that is open is not done; what was made with other settings goes, or keeps it from opening."""
    if not config.overwrite:
        require_unchanged(folder, config, inputs, fix="name another run, or set overwrite to replace it")
    elif changes(folder, config, inputs):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    for marker in ("done.json", "pending.json"):
        (folder / marker).unlink(missing_ok=True)
    for left in folder.rglob(".*.part"):  # half-written by a process that was killed; the run is ours alone
        left.unlink()


def require_unchanged(folder: Path, config: StageConfig, inputs: dict[str, str], *, fix: str) -> None:
    """Refuse a stage that was begun with other settings or inputs, naming each that may not change."""
    if differences := changes(folder, config, inputs, allowed=names(getattr(config, "allow_change", ""))):
        where = f"{folder.parent.name}/{folder.name}"
        raise RunError(f"was made with other settings: {'; '.join(differences)}", where=where, fix=fix)


def tracked(config: StageConfig) -> dict[str, Any]:
    """The parameters that decide a stage's result."""
    return named(config.tracked())


def changes(folder: Path, config: StageConfig, inputs: dict[str, str], *, allowed: Sequence[str] = ()) -> list[str]:
    """What differs between a stage as it was begun and as it is asked for now; empty if nothing or not begun."""
    begun = folder / "parameters.json"
    if not begun.exists():
        return []
    record = read_record(begun)
    was, made_from = record["parameters"], record["inputs"]
    now = {k: v for k, v in tracked(config).items() if k not in allowed}
    told = [f"{k} was {was.get(k)!r}, now {v!r}" for k, v in now.items() if was.get(k) != v]
    names = sorted({*made_from, *inputs})
    return told + [f"input {name} changed" for name in names if made_from.get(name) != inputs.get(name)]


def read_record(path: Path) -> dict[str, Any]:
    """One of the JSON files that a stage leaves.

    Raises:
        RunError: it cannot be read as what it was written as.
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
    """Whether a stage ended with these settings and inputs and all it wrote is still there, byte for byte."""
    return (folder / "done.json").exists() and not changes(folder, config, inputs) and not damaged(folder)


def damaged(folder: Path) -> list[str]:
    """Outputs of a done stage that are missing or not what they were."""
    recorded = read_record(folder / "done.json")["outputs"]
    files = _outputs(folder)
    return sorted(name for name, digest in recorded.items() if name not in files or sha256(files[name]) != digest)


def require_done(run_folder: Path, name: str) -> Path:
    """The folder of a done stage, or a refusal that says which stage to run."""
    folder = run_folder / name
    if not (folder / "done.json").exists():
        raise RunError(
            "is not done", where=f"{run_folder.name}/{name}", fix=f"run `make {name[:2]} RUN={run_folder.name}`"
        )
    return folder


def upstream_digests(run_folder: Path, name: str) -> dict[str, str]:
    """Each earlier stage -> digest of the outputs that later ones are made from; every one must be done."""
    return {stage: _results_digest(require_done(run_folder, stage)) for stage in STAGES if stage < name}


def _results_digest(folder: Path) -> str:
    outputs = read_record(folder / "done.json")["outputs"]
    return fingerprint({name: digest for name, digest in outputs.items() if not SHOWN_ONLY.fullmatch(name)})


def write_provenance(run_folder: Path, *, preset: str, configs: dict[str, StageConfig], command: list[str]) -> None:
    """Write run.json (code, versions, machine, command) and config.json (every parameter of every stage)."""
    write_json(run_folder / "run.json", {"command": command, "created": now(), **provenance()})
    write_json(run_folder / "config.json", {"preset": preset, **{k: named(v.model_dump()) for k, v in configs.items()}})
    _log_to(run_folder / "log.txt")


def provenance() -> dict[str, Any]:
    """The code, the versions and the machine that a result comes from."""
    return {
        "git": _git_state(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _outputs(folder: Path) -> dict[str, Path]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    named = {p.relative_to(folder).as_posix(): p for p in files}
    return {n: p for n, p in named.items() if n not in UNTRACKED_OUTPUTS and not p.name.startswith(".")}


def _git_state() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    try:
        ask = ["git", "-C", str(root)]
        commit = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "changed_files": None}
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def _log_to(path: Path) -> None:
    known = {getattr(handler, "baseFilename", "") for handler in log.handlers}
    if str(path) not in known:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        handler = logging.FileHandler(path)
        handler.setFormatter(HidingFormatter(path.parent))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
