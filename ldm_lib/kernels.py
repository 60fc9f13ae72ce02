"""Jupyter kernels of the runner: they talk through sockets in the file system, not through the network."""

from jupyter_client.manager import AsyncKernelManager
from traitlets import default


class PrivateKernelManager(AsyncKernelManager):
    """A kernel that only this user can reach, and that needs no network interface, not even loopback."""

    @default("transport")
    def _default_transport(self) -> str:
        return "ipc"
