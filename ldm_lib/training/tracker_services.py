"""Weights & Biases and MLflow, each told figures, parameters and small pictures: no volumes, no paths, no names.

Both libraries take seconds to load and may hang, fail or vanish at any moment; `tracking` keeps that from a training.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_lib.files import replacing
from ldm_lib.training.options import TrainingOptions

PROJECT = "brain-mri-inpainting"
ANONYMOUS = {
    "mlflow.user": "unknown",
    "mlflow.source.name": "ldm_lib.training",
}  # never the login or a script's path
PROXIED = "mlflow-artifacts:/"  # the server finds artifacts in its own folder, so the store holds no path
# Parameters that are text and cannot hold a path; another text is not told until it is named here.
TOLD_TEXTS = {"run", "device", "precision", "multipliers", "attention_rates", "keep_weights", "prediction",
              "schedule", "allow_change", "wandb_mode"}  # fmt: skip
# What leads wandb to its server; any other WANDB_* variable could rename, redirect or annotate a run.
CONNECTION = {f"WANDB_{name}" for name in (
    "API_KEY", "BASE_URL", "ENTITY", "IDENTITY_TOKEN_FILE", "CREDENTIALS_FILE", "HTTP_PROXY", "HTTPS_PROXY",
    "CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "SERVICE", "ERROR_REPORTING")}  # fmt: skip


def told_parameters(config: TrainingOptions) -> dict[str, Any]:
    """The parameters that trackers are told: numbers, switches, and the texts of `TOLD_TEXTS`."""
    return {name: value for name, value in config.model_dump().items()
            if name in TOLD_TEXTS or isinstance(value, int | float)}  # fmt: skip


class Wandb:
    """A run of Weights & Biases in `folder`/wandb, of its own even if the process has others.

    Pictures are kept in offline runs only: nothing here uploads one.
    """

    def __init__(self, config: TrainingOptions, folder: Path, mode: str) -> None:
        self._config, self._folder, self._mode = config, folder, mode
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        with _hidden_variables(WANDB_MODE=mode, WANDB_SILENT="true", WANDB_NOTEBOOK_NAME="."):
            import wandb
            from wandb.sdk import wandb_setup

            _ = wandb_setup.singleton().settings  # reads the variables, once in a process
        self._wandb, self._setup = wandb, wandb_setup

    def start(self) -> None:
        """Begin the run; starts wandb's own process if there is none."""
        offline = self._mode == "offline"
        private = self._wandb.Settings(
            mode=self._mode,
            root_dir=str(self._folder),
            console="off",
            host="",
            silent=True,
            symlink=False,
            reinit="create_new",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            **({"entity": ""} if offline else {}),
        )
        names = {"project": PROJECT, "name": self._config.run}
        self._run = self._wandb.init(**names, config=told_parameters(self._config), settings=private)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of a step; wandb merges those of one step."""
        self._run.log(dict(figures), step=step)

    def panel(self, path: Path, step: int) -> None:
        """A picture, in an offline run."""
        if self._mode == "offline":
            self._run.log({"panel": self._wandb.Image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        """End the run; a second training in the same process would otherwise continue it."""
        self._run.finish(exit_code=int(failed))
        self._forget_logs()

    def abandon(self) -> None:
        """End wandb's process, for which the interpreter would otherwise wait at its end, for ever if it hangs."""
        self._forget_logs()
        connection = self._setup.singleton()._connection
        if connection and connection._proc:
            connection._proc._process.kill()
        self._wandb.teardown()

    def _forget_logs(self) -> None:
        """wandb's debug logs hold absolute paths and the login; a run can be synchronised without them."""
        for folder in self._folder.glob("wandb/*run-*/logs"):
            shutil.rmtree(folder, ignore_errors=True)
        for link in self._folder.glob("wandb/debug*.log"):
            link.unlink(missing_ok=True)


@contextmanager
def _hidden_variables(**given: str) -> Iterator[None]:
    """Without the user's WANDB_* variables but `CONNECTION`, and with those given, while wandb reads them."""
    hidden = {name: value for name, value in os.environ.items()
              if name.startswith("WANDB_") and name not in CONNECTION}  # fmt: skip
    for name in hidden:
        del os.environ[name]
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)
        os.environ.update(hidden)


class MLflow:
    """A run in the one sqlite store of all runs, `outputs`/mlflow.db; pictures lie in `outputs`/mlflow."""

    def __init__(self, config: TrainingOptions, folder: Path) -> None:
        self._config, self._outputs, self._name = config, folder.parents[1], folder.parent.name
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow import MlflowClient, entities
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        self._client_type, self._store_type, self._entities = MlflowClient, SqlAlchemyStore, entities
        for noisy in ("mlflow.store.db", "alembic"):  # they tell of a new store's tables, and of errors we report
            logging.getLogger(noisy).setLevel(logging.CRITICAL)

    def start(self) -> None:
        """Open or create the store, and begin a run in it."""
        address = f"sqlite:///{self._outputs / 'mlflow.db'}"
        with _alone(self._outputs / ".mlflow.lock"):
            self._store_type(address, PROXIED)  # MlflowClient would give the default experiment an absolute path
            self._client = self._client_type(address)
            known = self._client.get_experiment_by_name(PROJECT)
            place = known.experiment_id if known else self._client.create_experiment(PROJECT, PROXIED)
            self._run = self._client.create_run(place, tags=ANONYMOUS, run_name=self._name).info.run_id
        told = told_parameters(self._config)
        params = [self._entities.Param(name, str(value)) for name, value in told.items()]
        self._client.log_batch(self._run, params=params, synchronous=True)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of a step, in one transaction."""
        now_ms = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(name, float(value), now_ms, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics, synchronous=True)

    def panel(self, path: Path, step: int) -> None:
        """A picture, where `make mlflow` serves it: the client itself would need that server to be running."""
        folder = self._outputs / "mlflow" / self._run / "artifacts" / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{step}.png") as partial:
            shutil.copyfile(path, partial)

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def abandon(self) -> None:
        """Nothing: a store is a file."""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; two that create a store at once break it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a loader process forked meanwhile has the file open for longer
