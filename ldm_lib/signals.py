"""Signals and silence: a training that is asked to end does so between two steps, and one that hangs is ended."""

import faulthandler
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

STALL_S = 1800.0  # without a step or a validated case in half an hour, something hangs
WISHES = (signal.SIGTERM, signal.SIGINT)


class Wishes:
    """Within this context SIGTERM and SIGINT are noted, not obeyed; a second SIGINT is obeyed at once.

    Attributes:
        received: the signal that asks for an end, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._before = {number: signal.signal(number, self._note) for number in WISHES}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class Watchdog:
    """Ends this process with the stacks of its threads in a file, unless it is told in time that work goes on.

    A rank that died or a loader that is stuck leaves the others waiting for ever, without a message.
    """

    def __init__(self, path: Path, seconds: float = STALL_S) -> None:
        self.path, self.seconds = path, seconds
        self._stream: IO[str] | None = None

    def __enter__(self) -> Self:
        self._stream = self.path.open("w")
        self.alive()
        return self

    def alive(self) -> None:
        """Work goes on: count from now."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._stream)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._stream.close()
        if not self.path.stat().st_size:
            self.path.unlink()
