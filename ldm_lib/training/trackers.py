"""Log a training's metrics: to metrics.csv always, to Weights & Biases, MLflow and Trackio if requested.

A training that cannot write metrics.csv stops. The other trackers get numbers, switches, texts of `LOGGED_TEXTS`
and small pictures, but no volumes, paths or names; one that fails is disabled, and the training goes on.
"""

import csv
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from ldm_lib.files import write_csv
from ldm_lib.training.options import TrackerOptions, TrainingOptions

log = logging.getLogger("ldm_lib")

PROJECT = "brain-mri-inpainting"
ANONYMOUS = {"mlflow.user": "unknown", "mlflow.source.name": "ldm_lib.training"}  # never the login or a script's path
PROXIED = "mlflow-artifacts:/"  # the server finds artifacts in its own folder, so the store holds no path
# Parameters that are text and cannot hold a path; another text is not logged until it is named here.
LOGGED_TEXTS = {"run", "device", "precision", "multipliers", "attention_rates", "keep_weights", "prediction",
                "schedule", "learning_rate_schedule", "allow_change", "wandb_mode"}  # fmt: skip


class MetricsTable:
    """Write metrics.csv: one row per optimiser step that logged something, on disk as soon as it is logged.

    Rows after `from_step`, from which a training is resumed, are dropped, as they will be repeated.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        self.path, self.rows, self._columns = path, _read_rows(path, from_step), []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Merge metrics into the row of a step; steps never decrease."""
        is_new = step not in self.rows
        self.rows[step] = self.rows.get(step, {"step": step}) | metrics
        if is_new and metrics.keys() <= set(self._columns):
            with self.path.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(self.rows[step])
        else:
            self._columns = write_csv(self.path, list(self.rows.values()))


def _read_rows(path: Path, last_step: int) -> dict[int, dict[str, Any]]:
    """Read the rows of a table up to a step; a line that a killed training wrote in part is left out."""
    text = path.read_text() if path.exists() else ""
    table = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    whole = [row for row in table if None not in row.values() and row.get("step", "").isdecimal()]
    rows = [{name: value for name, value in row.items() if value} for row in whole]
    return {int(row["step"]): row for row in rows if int(row["step"]) <= last_step}


def logged_parameters(config: TrainingOptions) -> dict[str, Any]:
    """Return the parameters that trackers log: numbers, switches, and the texts of `LOGGED_TEXTS`."""
    return {name: value for name, value in config.model_dump().items()
            if name in LOGGED_TEXTS or isinstance(value, int | float)}  # fmt: skip


class Wandb:
    """Hold a run of Weights & Biases in `folder`/wandb; offline runs take pictures too, which `wandb sync` uploads."""

    def __init__(self, config: TrainingOptions, folder: Path, mode: str) -> None:
        self._folder, self._offline = folder, mode == "offline"
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_NOTEBOOK_NAME": "."}
        import wandb

        private = wandb.Settings(
            mode=mode, root_dir=str(folder), console="off", host="", silent=True, symlink=False,
            reinit="create_new", disable_code=True, disable_git=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self._image = wandb.Image
        self._run = wandb.init(
            project=PROJECT, name=folder.parent.name, config=logged_parameters(config), settings=private
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics; wandb merges those of one step."""
        self._run.log(dict(metrics), step=step)

    def panel(self, path: Path, step: int) -> None:
        """Log a picture, in an offline run."""
        if self._offline:
            self._run.log({"panel": self._image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        """End the run, and remove wandb's debug logs, which hold absolute paths and the login."""
        try:
            self._run.finish(exit_code=int(failed))
        finally:
            for folder in self._folder.glob("wandb/*run-*/logs"):
                shutil.rmtree(folder, ignore_errors=True)
            for link in self._folder.glob("wandb/debug*.log"):
                link.unlink(missing_ok=True)


class MLflow:
    """Hold a run in the sqlite store of all runs, `outputs`/mlflow.db; pictures are in `outputs`/mlflow."""

    def __init__(self, config: TrainingOptions, folder: Path) -> None:
        self._outputs = outputs = folder.parents[1]
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow import MlflowClient, entities
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        for noisy in ("mlflow.store.db", "alembic"):  # they log a new store's tables, and errors we report
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self._metric, address = entities.Metric, f"sqlite:///{outputs / 'mlflow.db'}"
        with FileLock(outputs / ".mlflow.lock"):  # two processes that create a store at once break it
            SqlAlchemyStore(address, PROXIED)  # MlflowClient would give the default experiment an absolute path
            self._client = MlflowClient(address)
            known = self._client.get_experiment_by_name(PROJECT)
            experiment = known.experiment_id if known else self._client.create_experiment(PROJECT, PROXIED)
            self._run = self._client.create_run(experiment, tags=ANONYMOUS, run_name=folder.parent.name).info.run_id
        params = [entities.Param(name, str(value)) for name, value in logged_parameters(config).items()]
        self._client.log_batch(self._run, params=params, synchronous=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step, in one transaction."""
        now_ms = time.time_ns() // 1_000_000
        rows = [self._metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=rows, synchronous=True)

    def panel(self, path: Path, step: int) -> None:
        """Copy a picture to where `make mlflow` serves it; the client would need that server to be running."""
        folder = self._outputs / "mlflow" / self._run / "artifacts" / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{step}.png")

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Trackio:
    """Hold a run in the store of all runs, `outputs`/trackio; neither it nor its dashboard needs a network."""

    def __init__(self, config: TrainingOptions, folder: Path) -> None:
        store = folder.parents[1] / "trackio"
        if not find_spec("trackio"):
            raise ImportError("not installed; `pip install trackio`")
        os.environ["TRACKIO_DIR"] = str(store)  # is read when trackio is imported
        import trackio

        if store != trackio.TRACKIO_DIR:
            raise ValueError("this process logs to another outputs folder; start a new one")

        class Private(trackio.Run):
            """A run that does not look up the user's name; `trackio.init` could also choose a server."""

            def _get_username(self) -> None:
                return None

        self._image = trackio.Image
        self._run = Private(None, PROJECT, None, name=folder.parent.name, config=logged_parameters(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step; they are on disk within a second."""
        self._run.log(dict(metrics), step=step)

    def panel(self, path: Path, step: int) -> None:
        """Log a picture."""
        self._run.log({"panel": self._image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - Trackio knows no failed runs
        """Wait until everything is on disk."""
        with redirect_stdout(io.StringIO()):  # it speaks of uploading
            self._run.finish()


class Trackers:
    """Log to metrics.csv, and to others, which are started by functions, each until it fails for the first time."""

    def __init__(self, table: MetricsTable, others: Mapping[str, Callable[[], Any]]) -> None:
        self.table, self._running = table, {}  # a tracker that fails is removed
        self._running = {name: tracker for name, start in others.items() if (tracker := self._safely(name, start))}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics by name as plain numbers at an optimiser step; steps never decrease."""
        plain = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        self.table.log(plain, step)
        self._each("log", plain, step)

    def panel(self, path: Path, step: int) -> None:
        """Log a small PNG of one fixed case."""
        self._each("panel", path, step)

    def close(self, *, failed: bool) -> None:
        """End the runs."""
        self._each("close", failed=failed)

    def _each(self, method: str, *arguments: Any, **options: Any) -> None:
        for name, tracker in list(self._running.items()):
            self._safely(name, getattr(tracker, method), *arguments, **options)

    def _safely(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a tracker; if it fails, warn and disable it: a training never ends with a tracker."""
        try:
            return call(*arguments, **options)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - of any type
            self._running.pop(name, None)
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            log.warning("%s failed: %s; training goes on without it; metrics.csv is complete", name, reason)
            return None


def trackers(config: TrainingOptions, tracking: TrackerOptions, folder: Path, *, from_step: int = 0) -> Trackers:
    """Start the trackers of a training in `folder` = outputs/<run>/04_training, which is resumed from `from_step`."""
    folder, others = folder.resolve(), {}
    if tracking.wandb_mode != "off":
        others["wandb"] = partial(Wandb, config, folder, tracking.wandb_mode)
    if tracking.use_mlflow:
        others["MLflow"] = partial(MLflow, config, folder)
    if tracking.use_trackio:
        others["Trackio"] = partial(Trackio, config, folder)
    return Trackers(MetricsTable(folder / "metrics.csv", from_step=from_step), others)
