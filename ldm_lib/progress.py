"""Report progress in plain lines, since the widgets of progress bars are blank in a notebook that ran headless."""

import logging
import sys
import time

log = logging.getLogger("ldm_lib")

REPORT_EVERY_S = 30.0


def report(line: str) -> None:
    """Write one line to the log and to standard error, so that standard output holds results alone."""
    log.info("%s", line)
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Report the progress of a loop with the time that is left, at most once in an interval.

    Args:
        total: steps of the whole work.
        done: steps that were done before this process began, as when a training is resumed.
        name: what the lines begin with, such as "step" in "step 12/80: loss 0.31; 4 min left at most".
        every_s: seconds between two lines.
    """

    def __init__(self, total: int, *, done: int = 0, name: str = "step", every_s: float = REPORT_EVERY_S) -> None:
        self.total, self.name, self.every_s = total, name, every_s
        self._first, self._began, self._reported = done, time.monotonic(), time.monotonic()

    def update(self, done: int, text: str, *, now: bool = False) -> None:
        """Report that so many steps are done, if a line is due.

        Args:
            text: what to report of the latest step.
            now: whether to report whatever the time.
        """
        clock = time.monotonic()
        if not now and clock - self._reported < self.every_s:
            return
        self._reported = clock
        left_s = (self.total - done) * (clock - self._began) / max(done - self._first, 1)
        report(f"{self.name} {done}/{self.total}: {text}; {left_s / 60:.0f} min left at most")
