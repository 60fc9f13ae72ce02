"""Laws of tracking: no row twice, none lost, and nothing that tells who trained where."""

import csv
import getpass
import logging
import socket
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ldm_lib.presets import resolve
from ldm_lib.tracking import EpochLog, MetricsTable, trackers


def settings(**changes):
    return resolve("smoke", {"run": "tracked", **changes})["04_training"]


def place(tmp_path):
    """The folder of stage 04 of a run."""
    folder = tmp_path / "outputs" / "tracked" / "04_training"
    folder.mkdir(parents=True)
    return folder


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.log_metrics({"val_loss": 0.25, "epoch": 0}, 9)
    assert read(table.path) == [{"step": "9", "val_loss": "0.25", "epoch": "0"}]
    table.log_metrics({"train_loss": 0.1, "epoch": 0}, 9)  # the same step: the same row
    table.log_metrics({"train_loss": 0.05, "epoch": 1}, 19)
    assert read(table.path) == [
        {"step": "9", "val_loss": "0.25", "epoch": "0", "train_loss": "0.1"},
        {"step": "19", "val_loss": "", "epoch": "1", "train_loss": "0.05"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_resumed_table_continues_and_replaces_what_is_repeated(tmp_path):
    numbers = {step: 1 / (3 + step) for step in (4, 9, 14)}
    for step, value in numbers.items():
        MetricsTable(tmp_path / "metrics.csv").log_metrics({"train_loss": value}, step)
    MetricsTable(tmp_path / "metrics.csv").log_metrics({"train_loss": numbers[9]}, 9)
    found = read(tmp_path / "metrics.csv")
    assert {int(row["step"]): float(row["train_loss"]) for row in found} == numbers  # to the last digit
    assert [row["step"] for row in found] == ["4", "9", "14"]


def test_the_table_is_always_there_and_the_others_only_if_asked(tmp_path):
    found = trackers(settings(), place(tmp_path))
    assert [type(logger).__name__ for logger in found] == ["MetricsTable"]


def test_a_line_per_validation_tells_the_time_that_is_left(caplog, monkeypatch):
    clock = iter([0.0, 60.0, 240.0])
    monkeypatch.setattr("ldm_lib.tracking.time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = SimpleNamespace(
        current_epoch=2, max_epochs=10, check_val_every_n_epoch=2, callback_metrics={"b": 2, "a": 1}
    )
    lines = EpochLog()
    with caplog.at_level(logging.INFO, "ldm_lib"):
        lines.on_train_start(trainer, None)  # resumed after two epochs
        for trainer.current_epoch in (2, 3):
            lines.on_train_epoch_end(trainer, None)
    assert [record.message for record in caplog.records] == ["epoch 4/10: a 1, b 2; 3 min left"]


@pytest.mark.slow
def test_wandb_and_mlflow_hold_the_figures_and_no_trace_of_the_machine(tmp_path):
    folder, config = place(tmp_path), settings(wandb_mode="offline", use_mlflow=True)
    for run in (1, 2):  # a second training in the same process is a run of its own
        loggers = trackers(config, folder)
        for logger in loggers:
            logger.log_hyperparams(config.model_dump())
            logger.log_metrics({"val_loss": 0.0625 * run, "epoch": 0}, 3)
            logger.finalize("success")
    assert len(read(folder / "metrics.csv")) == 1
    kept = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(kept) == 2
    synced = b"".join(path.read_bytes() for path in [*kept, *folder.glob("wandb/*/files/**/*")] if path.is_file())
    for text in ("val_loss", "0.0625", "learning_rate"):
        assert text.encode() in synced
    for secret in (
        str(tmp_path),
        str(folder.parents[3]),
        sys.executable,
        sys.prefix,
        f'"{socket.gethostname()}"',
        "host:",
    ):
        assert secret.encode() not in synced, secret
    assert not list(folder.rglob("*.nii*"))
    with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as store:
        runs = store.execute("select name, status, user_id from runs").fetchall()
        values = sorted(store.execute("select key, value, step from metrics where key = 'val_loss'").fetchall())
        parameters = dict(store.execute("select key, value from params").fetchall())
        tags = store.execute("select value from tags").fetchall()
    assert runs == [("tracked", "FINISHED", "unknown")] * 2
    assert values == [("val_loss", 0.0625, 3), ("val_loss", 0.125, 3)]
    assert parameters["base_width"] == "16" and parameters["run"] == "tracked"
    assert not {getpass.getuser(), sys.argv[0]} & {value for (value,) in tags}


OPEN_STORE = """
import sys
from pathlib import Path
from ldm_lib.presets import resolve
from ldm_lib.tracking import trackers
folder = Path(sys.argv[1]) / "04_training"
folder.mkdir(parents=True)
logger = trackers(resolve("smoke", {"run": folder.parent.name, "use_mlflow": True})["04_training"], folder)[1]
logger.log_metrics({"val_loss": 0.5}, 1)
logger.finalize("success")
"""


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_all_find_it_sound(tmp_path):
    (tmp_path / "outputs").mkdir()
    commands = [[sys.executable, "-c", OPEN_STORE, str(tmp_path / "outputs" / name)] for name in "abc"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as store:
        assert sorted(store.execute("select name from runs").fetchall()) == [("a",), ("b",), ("c",)]
