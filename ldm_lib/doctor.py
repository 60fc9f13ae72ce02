"""Is this installation and machine fit to run? One finding a line, each with what to do when it is not."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

from jupyter_client.kernelspec import KernelSpecManager

from ldm_lib.runs import outputs_folder

ROOM_GB, MEMORY_GB = 5, 8


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is good, and what was found."""

    what: str
    good: bool
    found: str


def examine() -> list[Finding]:
    """Python, packages, kernel, devices, disk, memory and the outputs folder."""
    return [_python(), *_packages(), _kernel(), _device(), _outputs(), _memory()]


def _python() -> Finding:
    version = sys.version.split()[0]
    return Finding("Python", sys.version_info >= (3, 11), f"{version} (3.11 or newer)")


def _packages() -> list[Finding]:
    needed = [line.split(";")[0] for line in metadata.requires("brain-mri-inpainting") or [] if "extra ==" not in line]
    names = [text.split("[")[0].rstrip("=<>!~.*,0123456789 ") for text in needed]
    present = {name: version for name in names if (version := _version(name))}
    missing = sorted(set(names) - set(present))
    found = f"missing {', '.join(missing)}: run `make setup`" if missing else f"{len(present)} present"
    return [Finding("packages", not missing, found), Finding("torch", "torch" in present, present.get("torch", "none"))]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _kernel() -> Finding:
    specs = KernelSpecManager().find_kernel_specs()
    return Finding("Jupyter kernel", "python3" in specs, "python3" if "python3" in specs else "none: run `make setup`")


def _device() -> Finding:
    from ldm_lib.devices import pick_device, pick_precision

    device = pick_device()
    return Finding("device", True, f"{device.type}, precision {pick_precision('auto', device)}, {os.cpu_count()} cores")


def _outputs() -> Finding:
    folder = outputs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return Finding("outputs folder", False, f"cannot be written ({error.strerror})")
    free = shutil.disk_usage(folder).free / 1e9
    return Finding("outputs folder", free > ROOM_GB, f"writable, {free:.0f} GB free (at least {ROOM_GB})")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Finding("memory", total > MEMORY_GB, f"{total:.0f} GB (at least {MEMORY_GB})")
