"""Run the command line: `ldm run | sweep | compare | inpaint | ...`, or `python -m ldm_lib ...`.

Exit status: 0 done, 1 rejected or failed (one line), 2 wrong usage, 143 on SIGTERM, 130 on Ctrl-C.
"""

import argparse
import atexit
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from ldm_lib.cli.arguments import ARGUMENTS
from ldm_lib.cli.commands import COMMANDS
from ldm_lib.cli.options import RENAMED_COMMANDS, build_parser, joined
from ldm_lib.errors import InputError, InterruptionError, LdmError
from ldm_lib.progress import AboveBars, close_bars, report, show_progress

FINISHED = {"run": "stages", "sweep": "runs", "cohort": "scans", "evaluate": "cases", "inpaint": "cases"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; an error that users can fix is printed as one line."""
    atexit.register(gc.freeze)  # so that no garbage is looked for among torch's objects at the end, which takes 0.6 s
    os.umask(0o077)  # files made from patients' data belong to their owner alone; kernels and processes inherit this
    words = joined(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(COMMANDS, ARGUMENTS)
    for name in words[:1]:
        if name in RENAMED_COMMANDS:
            parser.error(f"no command {name!r}: {RENAMED_COMMANDS[name]}")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.misused(f"unrecognized arguments: {' '.join(unknown)}")
    handler = logging.StreamHandler(AboveBars())
    handler.setLevel(logging.ERROR if options.quiet else logging.WARNING)
    logging.basicConfig(format="%(levelname)s %(message)s", handlers=[handler])
    show_progress(not options.quiet)
    before = signal.signal(signal.SIGTERM, partial(_stop, options))
    try:
        return options.command(options)
    except InterruptionError as error:
        report(f"ERROR {error}", error=True)
        return error.status
    except KeyboardInterrupt:
        close_bars()
        report(f"ERROR {stopped(options)}", error=True)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        sys.stdout = None
        return 0
    except (LdmError, MemoryError, OSError) as error:
        if options.debug:
            raise
        report(f"ERROR {_readable(error)}", error=True)
    finally:
        close_bars()
        show_progress(True)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return 1


def _readable(error: LdmError | MemoryError | OSError) -> LdmError:
    """Return an error of the system, such as a full disk or full memory, as one of ours."""
    if isinstance(error, MemoryError):
        return InputError("not enough memory", fix="take a smaller input or fewer samples")
    if isinstance(error, OSError):
        return InputError(error.strerror or str(error), where=error.filename or "")
    return error


def stopped(options: argparse.Namespace) -> InterruptionError:
    """Return the line about a command that was stopped: how to go on."""
    kept = FINISHED.get(options.command.__name__, "")
    if not kept or getattr(options, "t1n_voided", None):
        fix = "give the same command again: it starts over"
    else:
        fix = f"give the same command again: it continues, finished {kept} are not repeated"
    return InterruptionError("stopped", fix=fix)


def _stop(options: argparse.Namespace, number: int, frame: object) -> None:  # noqa: ARG001
    close_bars()
    report(f"ERROR {stopped(options)}", error=True)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
