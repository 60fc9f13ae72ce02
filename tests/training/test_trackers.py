"""Metrics are logged once and in order, and no tracker that fails disturbs a training."""

import csv
import time

import numpy as np
import pytest

from ldm_lib.experiment.presets import resolve
from ldm_lib.training.trackers import MetricsTable, Trackers, trackers


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
    table.log({"val_loss": 0.25, "epoch": 0}, 9)
    assert read(table.path) == [{"step": "9", "val_loss": "0.25", "epoch": "0"}]
    table.log({"train_loss": 0.1, "epoch": 0}, 9)  # the same step: the same row
    table.log({"train_loss": 1 / 3, "epoch": 1}, 19)
    table.log({"train_loss": float("nan")}, 29)
    assert read(table.path) == [
        {"step": "9", "val_loss": "0.25", "epoch": "0", "train_loss": "0.1"},
        {"step": "19", "val_loss": "", "epoch": "1", "train_loss": str(1 / 3)},
        {"step": "29", "val_loss": "", "epoch": "", "train_loss": "nan"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("torn", ["", "14,0.12", "14,0.123,5", "14,0.123,5.5\n6,5.5\n", "1", "14,,,,\n\n"])
def test_a_resumed_table_drops_what_will_be_repeated_or_was_torn_and_continues(tmp_path, torn):
    whole = f"step,a,b\n4,{1 / 3},\n9,0.25,1\n"
    (tmp_path / "metrics.csv").write_text(whole + "11,5,5\n" + torn)
    table = MetricsTable(tmp_path / "metrics.csv", from_step=9)
    table.log({"b": 2}, 9)  # of the step that the checkpoint was taken at
    table.log({"a": 1.0}, 14)
    assert table.path.read_text() == whole.replace(",1\n", ",2\n") + "14,1.0,\n"


@pytest.mark.parametrize("content", ["", "step", "step,a\n", "\x00\n\x00", "4,5\n"])
def test_a_table_without_rows_is_a_new_one(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    table = MetricsTable(tmp_path / "metrics.csv", from_step=100)
    table.log({"a": float("nan"), "b, c": -1}, 3)
    assert table.path.read_text() == 'step,a,"b, c"\n3,nan,-1\n'


def test_the_table_is_always_there_and_the_others_only_if_requested(tmp_path):
    found = trackers(settings(), settings(), place(tmp_path))
    found.log({"a": np.float32(0.1), "b": np.float64(1 / 3), "c": 2}, 1)  # plain numbers reach every tracker
    found.close(failed=False)
    assert found.table.rows == {1: {"step": 1, "a": float(np.float32(0.1)), "b": 1 / 3, "c": 2}}
    assert not found._running


class Fragile:
    """A tracker that fails when its method `where` is called, and records the calls."""

    def __init__(self, where, error=None):
        self.calls, self.where, self.error = [], where, error
        self._record("start")

    def _record(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.where:
            raise self.error

    def log(self, metrics, step):
        self._record("log", dict(metrics), step)

    def close(self, *, failed):
        self._record("close", failed)


@pytest.mark.parametrize("error", [OSError("first line\nsecond line"), SystemExit("first line")])
@pytest.mark.parametrize("where", ["never", "log", "close", "start"])
def test_a_tracker_gets_everything_in_order_until_it_fails_and_is_disabled_after_one_warning(
    tmp_path, caplog, where, error
):
    made = []

    def start():
        made.append(Fragile("never" if where == "start" else where, error))
        if where == "start":
            raise error
        return made[0]

    both = Trackers(MetricsTable(tmp_path / "metrics.csv"), {"fragile": start})
    for step in range(3):
        both.log({"train_loss": step / 7}, step)
    both.close(failed=False)
    assert [row["train_loss"] for row in both.table.rows.values()] == [step / 7 for step in range(3)]
    warning = (
        f"fragile failed: {type(error).__name__}: first line; training goes on without it; metrics.csv is complete"
    )
    assert [record.message for record in caplog.records] == [warning] * (where != "never")
    logs = [("log", {"train_loss": k / 7}, k) for k in range(3)]
    expected = [("start",), *logs[: {"log": 1, "start": 0}.get(where, 3)]]
    assert made[0].calls == expected + [("close", False)] * (where in ("never", "close"))


def test_a_long_training_logs_as_fast_as_a_short_one(tmp_path):
    table, began = MetricsTable(tmp_path / "metrics.csv"), time.monotonic()
    for step in range(5_000):
        table.log({"train_loss": 1 / (step + 1), "learning_rate": 1e-4}, step)
        if step % 1000 == 0:
            table.log({"val_loss": 0.5}, step)  # an epoch's end
    assert time.monotonic() - began < 5
    assert len(table.rows) == 5_000 and table.rows[4_999]["train_loss"] == 1 / 5_000
