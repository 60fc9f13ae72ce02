"""Lock a folder for one process."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO, ClassVar

from ldm_lib.errors import RunError
from ldm_lib.files import now

OWNER_VARIABLE = "LDM_RUN_OWNER"  # process id of the runner that holds the lock for its kernels


class FolderLock:
    """Reserve a folder for one process; the system releases the lock when its owner ends.

    A kernel works under the lock of the runner that started it, and a notebook may start its stage again.

    Raises:
        RunError: another process holds the lock, or the folder cannot be written.
    """

    # Not filelock's: that removes or truncates the file in which the next process reads who holds the lock.
    _held: ClassVar[dict[Path, IO[str]]] = {}  # of this process: a lock outlives the stage object that took it

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        if self.path in self._held:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            stream = os.fdopen(os.open(self.path, flags, 0o600), "a+")
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RunError("is a link, and its target would be overwritten", where=self.path,
                               fix="remove it") from error  # fmt: skip
            fix = "choose another outputs folder"
            raise RunError(f"cannot be written ({error.strerror})", where=folder, fix=fix) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stream:
                stream.seek(0)
                owner, runner = stream.read(), os.environ.get(OWNER_VARIABLE)
            if runner and owner.startswith(f"pid {runner} "):
                return
            raise RunError(f"locked by {owner}", where=folder, fix="wait for it, or name another run") from None
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} since {now()}")
        stream.flush()
        self._held[self.path] = stream

    def release(self) -> None:
        """Release the lock, even while a forked loader process still has the file open."""
        if stream := self._held.pop(self.path, None):
            fcntl.flock(stream, fcntl.LOCK_UN)
            stream.close()
