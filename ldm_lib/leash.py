"""A child that ends with its parent, however that ended.

    python -m ldm_lib.leash PARENT MODULE [ARGUMENTS]

runs a module as `python -m MODULE` does. The system keeps watch (on Linux; elsewhere it is as if there were no leash):
a thread that looks for the parent now and then, as kernels have, is never run while a busy cell holds the interpreter,
and the cell would go on writing into a run that belongs to another process by then.
"""

import ctypes
import os
import signal
import sys

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def tie(parent: int) -> None:
    """From now on this process is killed when `parent`, which started it, has ended."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the system knew
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])  # the leash stays
