"""Laws of tracking: no row twice, none lost, and no tracker that fails, hangs or is slow is felt by a training."""

import csv
import logging
import threading
import time

import numpy as np
import pytest

from ldm_lib.experiment.presets import resolve
from ldm_lib.training import trackers as tracking
from ldm_lib.training.trackers import MetricsTable, Trackers, Unhurried, trackers


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
    table.panel(tmp_path / "none.png", 19)
    assert read(table.path) == [
        {"step": "9", "val_loss": "0.25", "epoch": "0", "train_loss": "0.1"},
        {"step": "19", "val_loss": "", "epoch": "1", "train_loss": "0.5"},
    ]
    assert table.rows == {
        9: {"step": 9, "val_loss": 0.25, "epoch": 0, "train_loss": 0.1},
        19: {"step": 19, "epoch": 1, "train_loss": 0.5},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_closed_table_and_an_earlier_step_lose_nothing(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    for step in (4, 9, 14):
        table.log({"a": step / 7}, step)
    table.close(failed=True)
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
    for step in range(20_000):
        table.log({"train_loss": 1 / (step + 1), "learning_rate": 1e-4}, step)
        table.log({"seconds": 0.5}, step)
    assert time.monotonic() - began < 5
    assert len(table.rows) == 20_000 and table.rows[19_999]["train_loss"] == 1 / 20_000


def test_the_table_is_always_there_and_the_others_only_if_asked(tmp_path):
    found = trackers(settings(), place(tmp_path))
    found.log({"a": np.float32(0.1), "b": np.float64(1 / 3), "c": 2}, 1)  # plain numbers reach every tracker
    found.close(failed=False)
    assert found.table.rows == {1: {"step": 1, "a": float(np.float32(0.1)), "b": 1 / 3, "c": 2}}
    assert found._all == [found.table]


class Fragile:
    """A service that does `harm` when its method `where` is called, and notes what it was told."""

    def __init__(self, where, harm):
        self.told, self.where, self.harm = [], where, harm
        self._act("make")

    def _act(self, name, *arguments):
        self.told.append((name, *arguments))
        if name == self.where:
            self.harm()

    def start(self):
        self._act("start")

    def log(self, figures, step):
        self._act("log", dict(figures), step)

    def panel(self, path, step):
        self._act("panel", path, step)

    def close(self, *, failed):
        self._act("close", failed)

    def abandon(self):
        self._act("abandon")
        raise RuntimeError("even letting go fails")


def train(tmp_path, service, *, steps=20):
    """Figures of so many steps told to the table and to a service; seconds of the slowest call."""
    table, slowest = MetricsTable(tmp_path / "metrics.csv"), 0.0
    both = Trackers(table, [Unhurried("fragile", service)])
    for step in range(steps):
        began = time.monotonic()
        both.log({"train_loss": step / 7}, step)
        both.panel(tmp_path / "panel.png", step)
        slowest = max(slowest, time.monotonic() - began)
    both.close(failed=False)
    assert [row["train_loss"] for row in table.rows.values()] == [step / 7 for step in range(steps)]
    return slowest


class Unforeseen(BaseException):
    """Of no type that anyone would name."""


def harm():
    raise Unforeseen("first line\nsecond line")


@pytest.mark.parametrize("where", ["start", "log", "panel", "close"])
def test_a_tracker_that_fails_is_warned_of_once_and_never_felt(tmp_path, caplog, where):
    made = Fragile(where, harm)
    assert train(tmp_path, lambda: made) < 0.1
    assert [record.message for record in caplog.records] == [
        "fragile failed: Unforeseen: first line; training goes on without it; metrics.csv is complete"
    ]
    names = [told[0] for told in made.told]
    assert names[-2:] == [where, "abandon"]  # and nothing after it failed


def test_a_tracker_that_cannot_be_made_is_warned_of_once(tmp_path, caplog):
    def absent():
        raise ModuleNotFoundError("No module named 'fragile'")

    assert train(tmp_path, absent) < 0.1
    assert len(caplog.records) == 1 and "No module named 'fragile'" in caplog.records[0].message


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_a_tracker_that_hangs_is_given_up(tmp_path, caplog, monkeypatch, where):
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.3)
    monkeypatch.setattr(tracking, "WAITING", 1000)
    made, began = Fragile(where, lambda: time.sleep(60)), time.monotonic()
    assert train(tmp_path, lambda: made) < 0.1
    assert time.monotonic() - began < 3
    assert [record.message for record in caplog.records] == [
        "fragile failed: TimeoutError: it did not end within 0.3 s; training goes on without it; "
        "metrics.csv is complete"
    ]
    assert made.told[-1] == ("abandon",)


def test_a_slow_tracker_misses_some_figures_and_holds_up_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "WAITING", 5)
    free = threading.Event()
    made = Fragile("start", free.wait)
    slow = Unhurried("slow", lambda: made)
    with caplog.at_level(logging.WARNING, "ldm_lib"):
        for step in range(50):
            slow.log({"a": 1.0}, step)
    threading.Timer(0.2, free.set).start()
    slow.close(failed=True)
    assert [told[2] for told in made.told if told[0] == "log"] == [0, 1, 2, 3, 4]
    assert made.told[-1] == ("close", True)  # which waits for its place in the queue
    assert [record.message for record in caplog.records] == [
        "slow is slow: 5 figures wait for it, and more are left out of it; metrics.csv is complete"
    ]


def test_a_tracker_is_told_everything_in_order(tmp_path, caplog):
    made = Fragile("never", harm)
    train(tmp_path, lambda: made, steps=3)
    panel = tmp_path / "panel.png"
    figures = [task for k in range(3) for task in (("log", {"train_loss": k / 7}, k), ("panel", panel, k))]
    assert made.told == [("make",), ("start",), *figures, ("close", False)]
    assert not caplog.records
