"""Run the command line: `ldm run | sweep | compare | inpaint | ...`, or `python -m ldm_lib ...`.

Exit status: 0 done, 1 rejected or failed (one line), 2 wrong usage, 143 on SIGTERM, 130 on Ctrl-C.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from ldm_lib.cli.arguments import ARGUMENTS
from ldm_lib.cli.commands import COMMANDS
from ldm_lib.cli.options import RENAMED_COMMANDS, build_parser, joined
from ldm_lib.errors import InputError, InterruptionError, LdmError

STOPPED = InterruptionError("stopped", fix="give the same command again: finished work is not repeated")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; an error that users can fix is printed as one line."""
    os.umask(0o077)  # files made from patients' data belong to their owner alone; kernels and processes inherit this
    words = joined(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(COMMANDS, ARGUMENTS)
    for name in words[:1]:
        if name in RENAMED_COMMANDS:
            parser.error(f"no command {name!r}: {RENAMED_COMMANDS[name]}")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.misused(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return options.command(options)
    except InterruptionError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"ERROR {STOPPED}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        sys.stdout = None
        return 0
    except (LdmError, MemoryError, OSError) as error:
        if options.debug:
            raise
        print(f"ERROR {_readable(error)}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return 1


def _readable(error: LdmError | MemoryError | OSError) -> LdmError:
    """Return an error of the system, such as a full disk or full memory, as one of ours."""
    if isinstance(error, MemoryError):
        return InputError("not enough memory", fix="take a smaller input or fewer samples")
    if isinstance(error, OSError):
        return InputError(error.strerror or str(error), where=error.filename or "")
    return error


def _stop(number: int, frame: object) -> None:  # noqa: ARG001
    print(f"ERROR {STOPPED}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
