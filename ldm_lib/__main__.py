"""The command line: `python -m ldm_lib run | sweep | compare | inpaint | submission | prior | validate | ...`.

Exit status: 0 done, 1 refused or failed (one line), 2 wrong usage, 143 on SIGTERM, 130 on Ctrl-C.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from ldm_lib.cli.commands import COMMANDS
from ldm_lib.cli.options import build_parser, joined
from ldm_lib.errors import InputError, InterruptionError, LdmError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run one command, and turn a refusal into one line."""
    os.umask(0o077)  # what is made from patients' data is its owner's alone; kernels and other processes inherit it
    signal.signal(signal.SIGTERM, _stop)
    options = build_parser(COMMANDS).parse_args(joined(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
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
        print(f"ERROR {_refusal(error)}", file=sys.stderr)
    return 1


def _refusal(error: LdmError | MemoryError | OSError) -> LdmError:
    """What is told of an error; below our own refusals lie a full memory, a full disk, a folder without rights."""
    if isinstance(error, MemoryError):
        return InputError("not enough memory", fix="take a smaller input or fewer samples")
    if isinstance(error, OSError):
        return InputError(error.strerror or str(error), where=error.filename or "")
    return error


STOPPED = InterruptionError("stopped", fix="give the same command: what is done is not done again")


def _stop(number: int, frame: object) -> None:  # noqa: ARG001
    print(f"ERROR {STOPPED}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
