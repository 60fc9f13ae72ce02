"""What a module does when `torchrun` starts it: one run's name in, one line for a refusal, one status out."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from ldm_lib.config import AuditConfig
from ldm_lib.errors import InterruptionError, LdmError, TrainingError
from ldm_lib.files import write_json
from ldm_lib.leash import tie
from ldm_lib.parameters import validated
from ldm_lib.processes import is_first, local_rank, world_size
from ldm_lib.runs import SHARED_OUT


def launched(work: Callable[[str], None], module: str, arguments: Sequence[str] | None = None) -> int:
    """Do this process's part of the work on `--run NAME`; only the first process speaks.

    Returns:
        0, 128 and a signal's number if asked to end by one, or 1 after an `ERROR` line.
    """
    os.umask(0o077)  # as the command line does
    if world_size() > 1:
        tie(os.getppid())
    parser = argparse.ArgumentParser(prog=f"python -m ldm_lib.{module}", description=work.__doc__)
    parser.add_argument("--run", required=True, help="run folder under outputs/, its earlier stages done")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given[1:] if given[:1] == ["--"] else given)
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s %(message)s", handlers=[handler])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere):
            work(validated(AuditConfig, {"run": options.run}).run)
    except InterruptionError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return error.status
    except (LdmError, RuntimeError) as error:
        if options.debug or not (isinstance(error, LdmError) or world_size() > 1):
            raise
        print(f"ERROR {_told(error)}", file=sys.stderr)
        return 1
    return 0


def mark_done(folder: Path) -> None:
    """Note that the work of a stage is done, for the runner, which then only closes it."""
    write_json(folder / SHARED_OUT, {"processes": world_size()})


def _told(error: LdmError | RuntimeError) -> LdmError:
    """What torch raises when another process is gone is long; its first line says enough."""
    if isinstance(error, LdmError):
        return error
    first = str(error).strip().splitlines()[0][:160]
    return TrainingError(f"this process cannot go on without the others ({first})", where=f"process {local_rank()}",
                         fix="see what the process that ended first said; the same command goes on")  # fmt: skip
