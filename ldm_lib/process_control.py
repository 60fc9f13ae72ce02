"""Shut down gracefully on SIGTERM and SIGINT, end processes that hang, and end children with their parent.

    python -m ldm_lib.process_control PARENT MODULE [ARGUMENTS]

runs a module as `python -m MODULE` does, and is killed when process PARENT ends (on Linux only). A thread that polls
for the parent, as kernels have, does not run while a busy cell holds the interpreter.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Self, TypeVar

from ldm_lib.errors import InterruptionError, RunError

GRACE_S = 60.0  # for a child to shut down, before it is killed
STALL_S = 1800.0  # without a step or a validated case in half an hour, something hangs
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Item = TypeVar("Item")
Result = TypeVar("Result")


class StopRequest:
    """Record SIGTERM and SIGINT within this context instead of stopping; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class ForwardSignals(StopRequest):
    """Forward SIGTERM and SIGINT to a child as SIGTERM within this context, and raise InterruptionError when it ended.

    `child` returns its process id, or None while there is none.
    """

    def __init__(self, child: Callable[[], int | None], *, where: str) -> None:
        super().__init__()
        self.child, self.where = child, where
        self._killer = threading.Timer(GRACE_S, self._send, [signal.SIGKILL])

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        self._killer.cancel()
        if not self.received:
            return
        cause = error.cause if isinstance(error, InterruptionError) else f"stopped by {self.received.name}"
        fix, status = "give the same command: it continues from there", 128 + self.received
        raise InterruptionError(cause, where=self.where, fix=fix, status=status) from error

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        first, self.received = self.received is None, signal.Signals(number)
        if self.child() is None:  # nothing to forward it to, and nothing to wait for
            raise InterruptionError(f"stopped by {self.received.name}", where=self.where)
        if first:
            self._killer.daemon = True
            self._killer.start()
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        if pid := self.child():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def watchdog(path: Path, seconds: float = STALL_S) -> Iterator[Callable[[], None]]:
    """End this process and write the stacks of its threads to a file, unless the function given is called in time.

    A rank that died or a loader that is stuck leaves the others waiting forever, without a message.
    """
    with path.open("a") as stream:  # stacks of an earlier hang are kept
        restart = partial(faulthandler.dump_traceback_later, seconds, exit=True, file=stream)
        restart()
        try:
            yield restart
        finally:
            faulthandler.cancel_dump_traceback_later()
            if not path.stat().st_size:
                path.unlink()


def die_with_parent(parent: int) -> None:
    """Kill this process when its parent process, of this id, ends for whatever reason."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of prctl(2)
    if os.getppid() != parent:  # it ended before the system knew
        os.kill(os.getpid(), signal.SIGKILL)


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, computed by some processes; 1 computes in this process.

    If this generator ends early, by an error or a signal, its processes are terminated.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    finished, others = False, set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(items)), multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),)
    )
    try:
        yield from pool.map(function, items)
        finished = True
    except BrokenProcessPool as error:
        fix = 'call it under `if __name__ == "__main__":` in a script; else take fewer workers, or more memory'
        raise RunError("a worker process ended abruptly", where=f"{workers} workers", fix=fix) from error
    finally:
        for child in () if finished else set(multiprocessing.active_children()) - others:
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    die_with_parent(parent)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])  # the death signal survives exec
