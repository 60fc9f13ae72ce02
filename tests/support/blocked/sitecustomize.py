"""Python without a network: a folder for PYTHONPATH, so that every Python started by a test, kernels too, loads this.

Each process writes a line to the file in $SOCKETS_LOG when it starts, and one for whatever it asks of the network,
which fails as it does on a machine without one.
"""

import errno
import os
import socket
import sys


def tell(*words):
    """One line, whole even when several processes write at once."""
    line = " ".join([str(os.getpid()), *map(repr, words)]) + "\n"
    place = os.open(os.environ["SOCKETS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(place, line.encode(errors="backslashreplace"))
    os.close(place)


def rejecting(name):
    """The method of this name, for sockets of the file system only."""
    original = getattr(socket.socket, name)

    def method(self, *words):
        if self.family == socket.AF_UNIX:
            return original(self, *words)
        tell("asked", name, words)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    return method


def unknown(*words, **_):
    """No name is looked up."""
    tell("asked", "a name", words)
    raise socket.gaierror(socket.EAI_AGAIN, "names are not looked up here")


tell("started", sys.orig_argv[1:4])
for method in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, method, rejecting(method))
for function in ("getaddrinfo", "gethostbyname", "gethostbyaddr"):
    setattr(socket, function, unknown)
