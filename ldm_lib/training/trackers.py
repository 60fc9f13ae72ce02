"""Where a training's figures go: into metrics.csv always, to Weights & Biases and MLflow when asked.

The table is the record, and a training that cannot write it stops. The others are a convenience behind a thread each:
whatever happens to them, a training neither waits for them nor ends with them.
"""

import csv
import io
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ldm_lib.files import replacing
from ldm_lib.training.options import TrackerOptions, TrainingOptions
from ldm_lib.training.tracker_services import MLflow, Wandb

log = logging.getLogger("ldm_lib")

WAITING = 10_000  # figures and pictures that may wait for a slow tracker before some are left out
PATIENCE_S = 30.0  # at the end of a training, for a tracker to take what is left
PARTING_S = 5.0  # for a tracker that failed to be let go of


class Tracker(Protocol):
    """What takes the figures of a training."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures by name, at an optimiser step; steps never decrease."""

    def panel(self, path: Path, step: int) -> None:
        """A small PNG of one fixed case; the file stays as it is until the tracker is closed."""

    def close(self, *, failed: bool) -> None:
        """The training is over."""


class Service(Tracker, Protocol):
    """A tracker outside of this library, which may fail in every call."""

    def start(self) -> None:
        """Make the tracker ready, however long that takes."""

    def abandon(self) -> None:
        """Let go of a tracker that failed or hangs, without waiting for it."""


class MetricsTable:
    """metrics.csv: one row per optimiser step that logged something, on disk as soon as it is logged.

    Only the last row is ever written, at its place in the file; a new column alone makes the table be written anew.

    Args:
        from_step: the step from which a training goes on; rows behind it are dropped, as they will be repeated.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        self.path, self._stream = path, None
        self._columns, self._last = ["step"], {"step": -1}
        if path.exists():
            self._write({step: row for step, row in self.rows.items() if step <= from_step})

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        """Step -> its row as it stands in the file, without empty cells; a row that is not whole is left out."""
        if not self.path.exists():
            return {}
        text = self.path.read_text()
        lines = csv.reader(text[: text.rfind("\n") + 1].splitlines())
        columns, found = next(lines, ["step"]), {}
        for cells in lines:
            with suppress(ValueError):  # the end of a longer row, left there by a training that was killed
                row = {name: _number(cell) for name, cell in zip(columns, cells, strict=True) if cell}
                found.setdefault(int(cells[0]), {}).update(row)
        return dict(sorted(found.items()))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Merge into the row of this step."""
        if not figures:
            return
        if step < self._last["step"] or not set(figures) <= set(self._columns):
            rows = self.rows
            rows[step] = rows.get(step, {"step": step}) | figures
            self._write(dict(sorted(rows.items())))
            return
        if step > self._last["step"]:
            self._offset, self._last = self._stream.seek(0, io.SEEK_END), {"step": step}
        self._last |= figures
        self._stream.seek(self._offset)
        self._stream.write(self._line(self._last.get(name, "") for name in self._columns))
        self._stream.truncate()

    def panel(self, path: Path, step: int) -> None:
        """Nothing: a table holds no pictures."""

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        """Close the file; a later row opens it again."""
        if self._stream:
            self._stream.close()
        self._stream, self._columns, self._last = None, ["step"], {"step": -1}

    def _write(self, rows: dict[int, dict[str, float]]) -> None:
        """Write the whole table, or nothing, and stand before its last row."""
        self._columns = list(dict.fromkeys(["step", *(name for row in rows.values() for name in row)]))
        lines = [self._line(row.get(name, "") for name in self._columns) for row in rows.values()]
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join([self._line(self._columns), *lines]))
        if self._stream:
            self._stream.close()
        self._stream = self.path.open("r+b", buffering=0)
        self._last = next(reversed(rows.values()), {"step": -1})
        self._offset = self._stream.seek(0, io.SEEK_END) - len(lines[-1] if lines else b"")

    @staticmethod
    def _line(cells: Iterable[object]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()


def _number(cell: str) -> float:
    """As it was logged: a whole number stays one."""
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


class Unhurried:
    """A service behind a thread and a bounded queue: a call costs microseconds, and nothing it does is ever raised.

    The service is made here, since libraries that are imported in two threads at once may find each other half made;
    it is started and used in the thread alone. It fails once, with one warning, and is told nothing after that.
    """

    def __init__(self, name: str, make: Callable[[], Service]) -> None:
        self._name, self._tasks = name, queue.Queue(WAITING)
        self._lost, self._silent = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            self._service = make()
        except Exception as error:  # noqa: BLE001 - of any type: a tracker never stops a training
            self._lose(error)
        else:
            self._thread.start()

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Leave the figures for the thread."""
        self._put(lambda: self._service.log(figures, step))

    def panel(self, path: Path, step: int) -> None:
        """Leave the picture for the thread."""
        self._put(lambda: self._service.panel(path, step))

    def close(self, *, failed: bool) -> None:
        """Wait for the thread to come to its end, but not for long."""
        until = time.monotonic() + PATIENCE_S
        with suppress(queue.Full):
            for task in (lambda: self._service.close(failed=failed), None):
                if not self._lost.is_set():
                    self._tasks.put(task, timeout=max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive() and not self._lost.is_set():
            self._lose(TimeoutError(f"it did not end within {PATIENCE_S:g} s"))

    def _put(self, task: Callable[[], None]) -> None:
        if self._lost.is_set():
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._warn(f"is slow: {WAITING} figures wait for it, and more are left out of it")

    def _work(self) -> None:
        try:
            self._service.start()
            while task := self._tasks.get():
                task()
        except BaseException as error:  # noqa: BLE001 - of any type, and nobody else sees what ends a thread
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        """Warn, forget what waits, and let the service go."""
        self._lost.set()
        what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self._warn(f"failed: {what}; training goes on without it")
        with suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        if self._thread.ident is not None:
            parting = threading.Thread(target=self._let_go, daemon=True)
            parting.start()
            parting.join(PARTING_S)

    def _let_go(self) -> None:
        with suppress(Exception, SystemExit):  # it has failed already; wandb exits as its killed process did
            self._service.abandon()

    def _warn(self, what: str) -> None:
        """Say so, once."""
        if self._silent.acquire(blocking=False):
            log.warning("%s %s; metrics.csv is complete", self._name, what)


class Trackers:
    """Several trackers as one, the table first."""

    def __init__(self, table: MetricsTable, others: list[Tracker]) -> None:
        self.table, self._all = table, [table, *others]

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Tell all of them."""
        plain = {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}
        for tracker in self._all:
            tracker.log(plain, step)

    def panel(self, path: Path, step: int) -> None:
        """Show all of them."""
        for tracker in self._all:
            tracker.panel(path, step)

    def close(self, *, failed: bool) -> None:
        """Close all of them."""
        for tracker in self._all:
            tracker.close(failed=failed)


def trackers(config: TrainingOptions, tracking: TrackerOptions, folder: Path, *, from_step: int = 0) -> Trackers:
    """The trackers of a training in `folder` = outputs/<run>/04_training, which goes on from `from_step`."""
    folder = folder.resolve()
    others: list[Tracker] = []
    if tracking.wandb_mode != "off":
        others.append(Unhurried("wandb", lambda: Wandb(config, folder, tracking.wandb_mode)))
    if tracking.use_mlflow:
        others.append(Unhurried("MLflow", lambda: MLflow(config, folder)))
    return Trackers(MetricsTable(folder / "metrics.csv", from_step=from_step), others)
