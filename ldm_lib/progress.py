"""Show progress on standard error: a bar on a terminal, plain lines in a log or a notebook, nothing where it is off.

Standard output holds results alone. The widgets of progress bars would be blank in a notebook that ran headless.
"""

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Self

from tqdm import tqdm

log = logging.getLogger("ldm_lib")

REPORT_EVERY_S = 30.0
LEFT = "min left at most"
BAR_AFTER_S, REDRAW_S = 5.0, 0.5  # work that is shorter has no bar
BAR = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}, {remaining} left{postfix}"
_shown = True
_open: "weakref.WeakSet[Progress]" = weakref.WeakSet()


def show_progress(shown: bool) -> None:
    """Show progress from now on, or not; errors and results are not affected."""
    global _shown
    _shown = shown


def report(line: str, *, error: bool = False) -> None:
    """Write one line to the log and to standard error, above the bars; an error also where progress is off."""
    log.info("%s", line)
    if _shown or error:
        AboveBars().write(f"{line}\n")


class AboveBars:
    """Stand for standard error where bars may be shown: text goes above them."""

    def write(self, text: str) -> None:
        """Write text that ends with a line."""
        if sys.stderr:
            try:
                tqdm.write(text, file=sys.stderr, end="")
                sys.stderr.flush()
            except BrokenPipeError:  # the reader, such as `head`, has left: the work continues
                sys.stderr = None

    def flush(self) -> None:
        """Do nothing: every text is flushed."""


def close_bars() -> None:
    """Remove all bars, as before a last line."""
    for progress in list(_open):
        progress.close()


class Progress:
    """Show the progress of a loop with the time that is left: a bar, or a line at most once in an interval.

    The bar goes when all is done, at the end of a `with` block, or when this object is released.

    Args:
        total: steps of the whole work.
        done: steps that were done before this process began, as when a training is resumed.
        name: what the lines begin with, such as "step" in "step 12/80: loss 0.31; 4 min left at most".
        every_s: seconds between two lines.
        say: receives every line instead; there is no bar then.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        name: str = "step",
        every_s: float = REPORT_EVERY_S,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.total, self.name, self.every_s, self.say = total, name, every_s, say
        self._first, self._began, self._reported = done, time.monotonic(), time.monotonic()
        self._shown, self._closed, self._thread = {"n": done, "initial": done, "text": ""}, threading.Event(), None
        if _shown and not say and sys.stderr and sys.stderr.isatty():
            arguments = (self._shown, self._closed, {"total": total, "desc": name, "file": sys.stderr})
            self._thread = threading.Thread(target=_draw, args=arguments, daemon=True)
            self._thread.start()
            _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        self._closed.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)

    def update(self, done: int, text: str = "", *, now: bool = False, skipped: bool = False) -> None:
        """Show that so many steps are done; a line is written if it is due.

        Args:
            text: what to show of the latest step.
            now: whether to write a line whatever the time.
            skipped: whether the latest step was found done, so that it says nothing about the time left.
        """
        self._first += skipped
        if self._thread:
            self._shown.update(n=done, initial=self._first, text=text)
            if done >= self.total:
                self.close()
            return
        clock = time.monotonic()
        if not now and not self.say and clock - self._reported < self.every_s:
            return
        self._reported = clock
        left_s = (self.total - done) * (clock - self._began) / max(done - self._first, 1)
        shown = f": {text}" if text else ""
        (self.say or report)(f"{self.name} {done}/{self.total}{shown}; {left_s / 60:.0f} {LEFT}")


def _draw(shown: dict[str, Any], closed: threading.Event, settings: dict[str, Any]) -> None:
    """Draw a bar until it is closed, again and again, so that its times go on while a step takes long."""
    began = time.time()
    if closed.wait(BAR_AFTER_S):
        return
    with tqdm(**settings, leave=False, dynamic_ncols=True, bar_format=BAR, delay=1e-6) as bar:
        bar.start_t, finished = began, False
        while not finished:
            bar.n, bar.initial = shown["n"], shown["initial"]
            bar.set_postfix_str(shown["text"], refresh=True)
            finished = closed.wait(REDRAW_S)
