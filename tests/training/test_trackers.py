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
    table.log({"train_loss": 0.05, "epoch": 1}, 19)
    table.log({"train_loss": 1 / 3, "epoch": 1}, 19)  # longer
    table.log({"train_loss": 0.5, "epoch": 1}, 19)  # shorter
    assert read(table.path) == [
        {"step": "9", "val_loss": "0.25", "epoch": "0", "train_loss": "0.1"},
        {"step": "19", "val_loss": "", "epoch": "1", "train_loss": "0.5"},
    ]
    assert table.rows == {
        9: {"step": 9, "val_loss": 0.25, "epoch": 0, "train_loss": 0.1},
        19: {"step": 19, "epoch": 1, "train_loss": 0.5},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_earlier_step_and_no_metrics_lose_nothing(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    for step in (4, 9, 14):
        table.log({"a": step / 7}, step)
    table.log({"a": 3.0}, 9)
    table.log({}, 20)
    table.log({"a": 4.0}, 19)
    assert {step: row["a"] for step, row in table.rows.items()} == {4: 4 / 7, 9: 3.0, 14: 2.0, 19: 4.0}


def test_a_resumed_table_drops_what_will_be_repeated_and_continues(tmp_path):
    numbers = {step: 1 / (3 + step) for step in (4, 9, 14, 19)}
    table = MetricsTable(tmp_path / "metrics.csv")
    for step, value in numbers.items():
        table.log({"train_loss": value} | ({"late": 1.0} if step > 9 else {}), step)
    again = MetricsTable(tmp_path / "metrics.csv", from_step=9)
    assert list(again.rows) == [4, 9]
    again.log({"val_loss": 2.0}, 9)  # of the step that the checkpoint was taken at
    for step in (14, 19):
        again.log({"train_loss": numbers[step]}, step)
    found = read(again.path)
    assert {int(row["step"]): float(row["train_loss"]) for row in found} == numbers  # to the last digit
    assert list(found[0]) == ["step", "train_loss", "val_loss"]
    assert list(MetricsTable(tmp_path / "metrics.csv").rows) == []  # a training from its start


@pytest.mark.parametrize("torn", ["14,0.12", "14,0.123,5", "14,0.123,5.5\n6,5.5\n", "1", "14,0.123,x\n", "14,,,,\n\n"])
def test_a_line_that_was_torn_when_a_training_was_killed_is_dropped(tmp_path, torn):
    whole = "step,a,b\n4,0.5,\n9,0.25,1\n"
    (tmp_path / "metrics.csv").write_text(whole + torn)
    table = MetricsTable(tmp_path / "metrics.csv", from_step=9)
    assert table.path.read_text() == whole
    table.log({"b": 2}, 9)
    table.log({"a": 1.0}, 14)
    assert table.path.read_text() == "step,a,b\n4,0.5,\n9,0.25,2\n14,1.0,\n"


@pytest.mark.parametrize("content", ["", "step", "step,a\n", "\x00\n\x00"])
def test_a_table_without_rows_is_a_new_one(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    table = MetricsTable(tmp_path / "metrics.csv", from_step=100)
    table.log({"a": float("nan"), "b, c": -1}, 3)
    assert table.path.read_text() == 'step,a,"b, c"\n3,nan,-1\n'
    assert table.rows[3]["b, c"] == -1 and np.isnan(table.rows[3]["a"])


def test_a_long_training_logs_as_fast_as_a_short_one(tmp_path):
    table, began = MetricsTable(tmp_path / "metrics.csv"), time.monotonic()
    for step in range(5_000):
        table.log({"train_loss": 1 / (step + 1), "learning_rate": 1e-4}, step)
        if step % 1000 == 0:
            table.log({"val_loss": 0.5}, step)  # an epoch's end
    assert time.monotonic() - began < 5
    assert len(table.rows) == 5_000 and table.rows[4_999]["train_loss"] == 1 / 5_000


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

    def panel(self, path, step):
        self._record("panel", path, step)

    def close(self, *, failed):
        self._record("close", failed)


def train(tmp_path, start, *, steps=5):
    """Log so many steps to the table and to a tracker."""
    both = Trackers(MetricsTable(tmp_path / "metrics.csv"), {"fragile": start})
    for step in range(steps):
        both.log({"train_loss": step / 7}, step)
        both.panel(tmp_path / "panel.png", step)
    both.close(failed=False)
    assert [row["train_loss"] for row in both.table.rows.values()] == [step / 7 for step in range(steps)]


@pytest.mark.parametrize("error", [OSError("first line\nsecond line"), SystemExit("first line")])
@pytest.mark.parametrize("where", ["start", "log", "panel", "close"])
def test_a_tracker_that_fails_is_disabled_after_one_warning(tmp_path, caplog, where, error):
    made = []

    def start():
        made.append(Fragile("never" if where == "start" else where, error))
        if where == "start":
            raise error
        return made[0]

    train(tmp_path, start)
    assert [record.message for record in caplog.records] == [
        f"fragile failed: {type(error).__name__}: first line; training goes on without it; metrics.csv is complete"
    ]
    names = [call[0] for call in made[0].calls]
    assert names[-1] == where and names.count(where) == 1, "it is not called again"


def test_a_tracker_gets_everything_in_order(tmp_path, caplog):
    made = Fragile("never")
    train(tmp_path, lambda: made, steps=3)
    panel = tmp_path / "panel.png"
    calls = [call for k in range(3) for call in (("log", {"train_loss": k / 7}, k), ("panel", panel, k))]
    assert made.calls == [("start",), *calls, ("close", False)]
    assert not caplog.records
