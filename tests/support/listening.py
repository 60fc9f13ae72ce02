"""Where processes listen, as the kernel reports it in /proc."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LISTENS, LOOPBACK = "0A", "0100007F"


def addresses(group: int) -> set[str]:
    """The addresses, without ports, on which the processes of a group listen by TCP, as /proc/net writes them."""
    owned = {target for process in Path("/proc").glob("[0-9]*") for target in _open_files(process, group)}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    listening = [words for words in lines if words[3] == LISTENS and f"socket:[{words[9]}]" in owned]
    return {words[1].partition(":")[0] for words in listening}


def _open_files(process: Path, group: int) -> Iterator[str]:
    """What a process of the group has open; what ends or is closed meanwhile is passed over."""
    with suppress(OSError):
        if os.getpgid(int(process.name)) == group:
            for place in (process / "fd").iterdir():
                with suppress(OSError):
                    yield str(place.readlink())
