"""Jupyter kernels of the runner: they talk through sockets in the file system, not through the network."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets import default


class PrivateKernelManager(AsyncKernelManager):
    """A kernel of this Python that only this user can reach, and that needs no network interface, not even loopback.

    By default the sockets would lie in the working directory, where two runs that start together take each other's, and
    the kernel called python3 may be another environment's.
    """

    latest: ClassVar["PrivateKernelManager | None"] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PrivateKernelManager.latest = self

    @classmethod
    def pid(cls) -> int | None:
        """The process of the kernel that was started last, if it runs."""
        provisioner = cls.latest and cls.latest.provisioner
        return getattr(provisioner, "pid", None) if provisioner and provisioner.has_process else None

    @default("transport")
    def _default_transport(self) -> str:
        return "ipc"

    @default("ip")
    def _ip_default(self) -> str:
        """Not an address here: the path that each socket's begins with."""
        return str(Path(tempfile.mkdtemp(prefix="ldm-")) / "kernel")

    @property
    def kernel_spec(self) -> KernelSpec:
        """The command that starts the kernel; what a cell raises reaches its notebook whatever the log's level."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")

    def cleanup_ipc_files(self) -> None:
        """Remove the sockets with their folder."""
        shutil.rmtree(Path(self.ip).parent, ignore_errors=True)
