"""What surrounds a training: where its figures and checkpoints go, and when it stops.

Figures go into a CSV table and the log always, to Weights & Biases and MLflow when asked. Only parameters and figures
are tracked: no volumes, no paths.
"""

import csv
import fcntl
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ldm_lib.config import TrainingConfig
from ldm_lib.files import replacing, write_csv

log = logging.getLogger("ldm_lib")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no banner, no advertisement

PROJECT = "brain-mri-inpainting"
ANONYMOUS = {"mlflow.user": "unknown", "mlflow.source.name": "ldm_lib.training"}  # else the login and the script's path


class MetricsTable(Logger):
    """metrics.csv: one row per optimiser step that logged something; a resumed training continues it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.rows = path, {}
        if path.exists():
            with path.open(newline="") as stream:
                self.rows = {int(row["step"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(stream)}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Nothing: the parameters stand in parameters.json."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Merge into the row of this step, and write the table: a training may be killed at any time."""
        self.rows.setdefault(int(step or 0), {"step": int(step or 0)}).update(metrics)
        self.save()

    def save(self) -> None:
        """Write the table, whole or not at all."""
        write_csv(self.path, [self.rows[step] for step in sorted(self.rows)])


class FinishedWandb(WandbLogger):
    """Ends its run with the training; a second training in the same kernel would otherwise continue it."""

    def finalize(self, status: str) -> None:
        """Close the run, if one was begun."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))


class EpochLog(L.Callback):
    """One plain line per validation, with the time that is left at most."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # noqa: ARG002
        self._first, self._started = trainer.current_epoch, time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # noqa: ARG002
        epoch = trainer.current_epoch + 1
        if epoch % trainer.check_val_every_n_epoch == 0:
            told = ", ".join(f"{k} {float(v):.4g}" for k, v in sorted(trainer.callback_metrics.items()))
            per_epoch = (time.monotonic() - self._started) / (epoch - self._first)
            left = (trainer.max_epochs - epoch) * per_epoch / 60
            log.info("epoch %d/%d: %s; %.0f min left", epoch, trainer.max_epochs, told, left)


class Patience(EarlyStopping):
    """Early stopping that stays stopped when its training is resumed."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # noqa: ARG002
        trainer.should_stop = self.wait_count >= self.patience


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are on the disk whole or not at all; Lightning's own are so only if TMPDIR is on that disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ARG002
        """Write `checkpoint` to `path`, making its folder if needed."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.save(checkpoint, partial)


def trackers(config: TrainingConfig, folder: Path) -> list[Logger]:
    """The loggers of a training in `folder` = outputs/<run>/04_training."""
    folder = folder.resolve()
    found: list[Logger] = [MetricsTable(folder / "metrics.csv")]
    if config.wandb_mode != "off":
        found.append(_wandb(config, folder))
    if config.use_mlflow:
        found.append(_mlflow(config, folder.parents[1]))
    return found


def _wandb(config: TrainingConfig, folder: Path) -> WandbLogger:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    private = wandb.Settings(
        mode=config.wandb_mode,
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    return FinishedWandb(
        project=PROJECT, name=config.run, save_dir=folder, offline=config.wandb_mode == "offline", settings=private
    )


def _mlflow(config: TrainingConfig, outputs: Path) -> MLFlowLogger:
    """One sqlite store for all runs; two processes that create it at once would break it, hence the lock."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    address = f"sqlite:///{outputs / 'mlflow.db'}"
    with (outputs / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logger = MLFlowLogger(
            PROJECT, config.run, address, artifact_location=(outputs / "mlflow").as_uri(), tags=ANONYMOUS
        )
        logger.experiment.get_run(logger.run_id)
    return logger
