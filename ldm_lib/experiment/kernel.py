"""Start the Jupyter kernels in which notebooks are executed headless."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE
from ldm_lib.locking import OWNER_VARIABLE


class RunnerKernelManager(AsyncKernelManager):
    """Start a kernel of this Python interpreter, which ends with this process.

    The kernel called python3 may be that of another environment. Sockets are files in a private folder: they need no
    network interface, and no other user can reach them.
    """

    process: ClassVar[subprocess.Popen[bytes] | None] = None  # of the kernel that was started last

    def __init__(self, **kwargs: Any) -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="ldm-")
        folder = self._sockets.name
        super().__init__(transport="ipc", ip=f"{folder}/kernel", connection_file=f"{folder}/kernel.json", **kwargs)

    @property
    def kernel_spec(self) -> KernelSpec:
        """The command that starts the kernel; errors are in the notebook already, not logged a second time."""
        command = [sys.executable, "-m", "ldm_lib.process_control", str(os.getpid()), "ipykernel_launcher"]
        command += ["-f", "{connection_file}", "--log-level=CRITICAL"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")

    async def start_kernel(self, **kwargs: Any) -> None:
        """Start the kernel, and keep its process to know how it ends."""
        await super().start_kernel(**kwargs)
        RunnerKernelManager.process = self.provisioner.process

    @classmethod
    def pid(cls) -> int | None:
        """Return the process id of the latest kernel while it runs."""
        return cls.process.pid if cls.process and cls.process.poll() is None else None

    @classmethod
    def death(cls) -> str:
        """Describe which signal killed the latest kernel; empty if none did."""
        status = cls.process.poll() if cls.process else None
        memory = "; likely out of memory" if status == -9 else ""
        return f"the kernel was killed (signal {-status}{memory})" if status and status < 0 else ""


@contextmanager
def kernels_of(run_folder: Path) -> Iterator[None]:
    """Set the variables by which kernels know the owner of the lock and the folder of the runs."""
    variables = {OWNER_VARIABLE: str(os.getpid()), OUTPUTS_VARIABLE: str(run_folder.parent)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
