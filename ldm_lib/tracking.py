"""Where a training's figures go: a CSV table always, Weights & Biases and MLflow when asked.

Only names and numbers are tracked: no volumes, no paths.
"""

import csv
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from ldm_lib.config import TrainingConfig

PROJECT = "brain-mri-inpainting"


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
        """The parameters stand in parameters.json."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Merge into the row of this step."""
        self.rows.setdefault(int(step or 0), {"step": int(step or 0)}).update(metrics)

    def forget_after(self, step: int) -> None:
        """Drop rows of steps that a resumed training will repeat."""
        self.rows = {k: row for k, row in self.rows.items() if k <= step}

    def save(self) -> None:
        """Write the table atomically."""
        rows = [self.rows[step] for step in sorted(self.rows)]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        partial = self.path.with_name(f".{self.path.name}.part")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)

    def finalize(self, status: str) -> None:  # noqa: ARG002 - Lightning's signature
        self.save()


def trackers(config: TrainingConfig, folder: Path) -> list[Logger]:
    """The loggers of a training in `folder` = outputs/<run>/04_training."""
    found: list[Logger] = [MetricsTable(folder / "metrics.csv")]
    if config.wandb_mode != "off":
        found.append(_wandb(config, folder))
    if config.use_mlflow:
        found.append(_mlflow(config, folder.parents[1]))
    return found


def _wandb(config: TrainingConfig, folder: Path) -> WandbLogger:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    private = wandb.Settings(
        mode=config.wandb_mode,
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )
    return WandbLogger(
        project=PROJECT, name=config.run, save_dir=folder, offline=config.wandb_mode == "offline", settings=private
    )


def _mlflow(config: TrainingConfig, outputs: Path) -> MLFlowLogger:
    """One sqlite store for all runs; two processes that create it at once would break it, hence the lock."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    address = f"sqlite:///{outputs / 'mlflow.db'}"
    with (outputs / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logger = MLFlowLogger(PROJECT, config.run, address, artifact_location=(outputs / "mlflow").as_uri())
        logger.experiment.get_run(logger.run_id)
    return logger
