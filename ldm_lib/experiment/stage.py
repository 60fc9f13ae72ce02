"""Open a stage of a run: what its notebook reads, writes, checks and records."""

import html
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ldm_lib.data import cohort
from ldm_lib.data.case import Case
from ldm_lib.errors import RunError
from ldm_lib.experiment.cohort_file import read_cohort, write_cohort
from ldm_lib.experiment.path_aliases import remember_paths
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.run_folder import (
    changes,
    log_to,
    outputs_folder,
    outputs_of,
    peak_memory_mb,
    provenance,
    read_record,
    require_done,
    require_unchanged,
    restore_run_records,
    run_records,
    tracked,
    upstream_digests,
)
from ldm_lib.experiment.stages import STAGES, AuditConfig, AutoencoderConfig, StageConfig, stage_name
from ldm_lib.files import digests, now, sha256, write_csv, write_json
from ldm_lib.images.options import ReadOptions
from ldm_lib.locking import OWNER_VARIABLE, FolderLock
from ldm_lib.options import DeviceOptions

if TYPE_CHECKING:
    from ldm_lib.diffusion.latents import LatentSpec

log = logging.getLogger("ldm_lib")


@dataclass(frozen=True)
class Picture:
    """Display a saved figure in a notebook."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Links:
    """Display links to pages of cases, text -> address, in a notebook and its report."""

    pages: dict[str, str]

    def _repr_html_(self) -> str:
        links = (f'<a href="{quote(address)}">{html.escape(text)}</a>' for text, address in self.pages.items())
        return f"<p>In a browser: {', '.join(links)}</p>" if self.pages else ""


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

    @property
    def run_folder(self) -> Path:
        """Return the folder of the run."""
        return self.folder.parent

    def cases(self, name: str = "", *, with_target: bool = False) -> tuple[list[Case], list[Case]]:
        """Return training and validation cases as an earlier stage, or this one, has written them.

        Args:
            name: the stage; by default this one.
            with_target: only cases with their full image, at least one on each side.
        """
        folder = self.previous(name) if name else self.folder
        train, validation = read_cohort(folder / "cohort.json", _root(folder))
        return (cohort.with_target(train), cohort.with_target(validation)) if with_target else (train, validation)

    def write_cases(self, cases: Sequence[Case], split: dict[str, list[str]]) -> None:
        """Write cases and their split into training and validation patients for the stages that follow."""
        write_cohort(self.folder / "cohort.json", cases, split, _root(self.folder))

    def write_latent_spec(self, spec: "LatentSpec") -> None:
        """Write the latent specification (settings.json) for the stages that follow."""
        write_json(self.folder / "settings.json", spec.model_dump())

    def latent_spec(self) -> "LatentSpec":
        """Return the latent specification that stage 03 has written."""
        from ldm_lib.diffusion.latents import LatentSpec

        return LatentSpec.parse(self.record("03_conditioning", "settings.json"))

    def compute(self) -> dict[str, Any]:
        """Return the device and the precision of this stage's parameters, as functions take them."""
        return _compute(self.config)

    def preset(self, name: str) -> StageConfig:
        """Return this stage's parameters in a preset."""
        return resolve(name)[self.name]

    def record(self, stage: str, name: str) -> dict[str, Any]:
        """Read a JSON file that an earlier stage has written, such as its summary.json."""
        return read_record(self.previous(stage) / name)

    def previous(self, name: str) -> Path:
        """Return the folder of an earlier stage of this run, which must have finished."""
        return require_done(self.folder.parent, name)

    def figure(self, figure: Any, name: str) -> Picture:
        """Save a matplotlib figure as figures/<name>.png and return it for display."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=100, facecolor=figure.get_facecolor())
        return Picture(path)

    def links(self, pages: Mapping[str, Path]) -> Links:
        """Return links to files of the run, text -> file, for display; those that do not exist are left out."""
        found = {text: os.path.relpath(path, self.folder) for text, path in pages.items() if path.exists()}
        return Links({text: Path(path).as_posix() for text, path in found.items()})

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
            "outputs": {name: sha256(path) for name, path in outputs_of(self.folder).items()},
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
        name: of the stage, such as "04_training" or "04".
        parameters: values by name, such as a notebook's `globals()`; names of no parameter are ignored.
        inputs: name -> digest of what else the stage is made from, besides `stage_inputs`.

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
    name = stage_name(name)
    model = STAGES[name]
    config = model.parse({key: parameters[key] for key in model.model_fields if key in parameters})
    run_folder = outputs_folder() / config.run
    folder = run_folder / name
    lock = FolderLock(run_folder)
    with ExitStack() as on_error:
        on_error.callback(lock.release)
        on_error.callback(restore_run_records, run_folder, run_records(run_folder))
        log_to(run_folder / "log.txt")
        remember_paths(run_folder, config.model_dump())
        _compute(config)  # a device or precision that is not available is rejected before results are removed
        inputs = {**stage_inputs(name, config, run_folder), **(inputs or {})}
        _clear(folder, config, inputs)
        write_json(folder / "parameters.json", {"parameters": tracked(config), "inputs": inputs})
        on_error.pop_all()
    log.info("%s started", name)
    return Stage(name, config, folder, inputs, _lock=lock)


def stage_inputs(name: str, config: StageConfig, run_folder: Path) -> dict[str, str]:
    """Return name -> digest of what a stage is made from: source files, outputs of earlier stages, given weights."""
    if isinstance(config, AuditConfig):
        return cohort.source_digests(
            config.data_dir, config.conditioning_dir, config.brains_dir, config.part(ReadOptions), config.patients_file
        )
    weights = (config.given_weights,) if isinstance(config, AutoencoderConfig) else ()
    return upstream_digests(run_folder, name) | digests(*weights)


def _compute(config: StageConfig) -> dict[str, Any]:
    if not isinstance(config, DeviceOptions):
        return {}
    from ldm_lib.devices import pick_device, pick_precision

    device = pick_device(config.device)
    return {"device": device, "precision": pick_precision(config.precision, device)}


def _root(folder: Path) -> Path:
    """Return the folder to which the paths of a stage's cases are relative: its own, or later that of the run."""
    return folder if folder.name == next(iter(STAGES)) else folder.parent


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
