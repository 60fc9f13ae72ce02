"""Jupyter kernels of the runner: they talk through sockets in the file system, not through the network."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

SOCKETS = "ldm-"  # then the process that made the folder


def _clear_dead() -> None:
    """Remove the folders of sockets whose makers were killed; another user's stay."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SOCKETS}[0-9]*-*"):
        owner = folder.name.removeprefix(SOCKETS).partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


class PrivateKernelManager(AsyncKernelManager):
    """A kernel of this Python that only this user can reach, and that needs no network interface, not even loopback.

    By default the sockets would lie in the working directory, where two runs that start together take each other's, and
    the kernel called python3 may be another environment's.
    """

    latest: ClassVar["PrivateKernelManager | None"] = None
    status: int | None = None  # with which the kernel ended: minus the signal's number if one killed it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PrivateKernelManager.latest = self

    @classmethod
    def pid(cls) -> int | None:
        """The process of the kernel that was started last, if it runs."""
        provisioner = cls.latest and cls.latest.provisioner
        return getattr(provisioner, "pid", None) if provisioner and provisioner.has_process else None

    async def is_alive(self) -> bool:
        """Whether the kernel runs; how it ended is noted, for it is forgotten with the kernel."""
        alive, process = await super().is_alive(), getattr(self.provisioner, "process", None)
        if not alive and process is not None:
            self.status = process.returncode
        return alive

    @classmethod
    def was_killed(cls) -> bool:
        """Whether a signal ended the latest kernel, be it while it started."""
        status = cls.latest and cls.latest.status
        return status is not None and status < 0

    @classmethod
    def told_end(cls) -> str:
        """How the latest kernel ended."""
        status = cls.latest and cls.latest.status
        if not cls.was_killed():
            return f"the kernel ended with status {status}"
        return f"the kernel was killed (signal {-status}{', most likely out of memory' if status == -9 else ''})"

    @default("transport")
    def _default_transport(self) -> str:
        return "ipc"

    @default("ip")
    def _ip_default(self) -> str:
        """Not an address here: the path that each socket's begins with."""
        _clear_dead()
        return str(Path(tempfile.mkdtemp(prefix=f"{SOCKETS}{os.getpid()}-")) / "kernel")

    @default("connection_file")
    def _default_connection_file(self) -> str:
        """Beside the sockets, so that it goes with them."""
        return f"{self.ip}.json"

    @property
    def kernel_spec(self) -> KernelSpec:
        """The command that starts the kernel; what a cell raises reaches its notebook whatever the log's level."""
        command = [sys.executable, "-m", "ldm_lib.process_control", str(os.getpid()), "ipykernel_launcher"]
        command += ["-f", "{connection_file}", "--log-level=CRITICAL"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")

    def cleanup_ipc_files(self) -> None:
        """Remove the sockets with their folder."""
        shutil.rmtree(Path(self.ip).parent, ignore_errors=True)
