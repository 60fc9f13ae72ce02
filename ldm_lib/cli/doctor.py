"""Is this installation and machine fit to run? One finding a line, each with what to do when it is not."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

from jupyter_client.kernelspec import KernelSpecManager
from packaging.requirements import Requirement

from ldm_lib.experiment.run_folder import outputs_folder

ROOM_GB, MEMORY_GB = 5, 8


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is good, and what was found."""

    what: str
    good: bool
    found: str


def examine() -> list[Finding]:
    """Python, packages, kernel, devices, disk, memory and the outputs folder."""
    return [_python(), _packages(), _kernel(), _device(), _outputs(), _memory()]


def _python() -> Finding:
    version = sys.version.split()[0]
    return Finding("Python", sys.version_info >= (3, 11), f"{version} (3.11 or newer)")


def _packages() -> Finding:
    """Whether what pyproject.toml asks for is installed, in the versions it asks for."""
    try:
        lines = metadata.requires("brain-mri-inpainting") or []
    except metadata.PackageNotFoundError:
        return Finding("packages", False, "this project is not installed: run `make setup`")
    needed = [Requirement(line) for line in lines]
    needed = [package for package in needed if not package.marker or package.marker.evaluate({"extra": ""})]
    versions = {package: _version(package.name) for package in needed}
    unfit = [f"{p} (found {v or 'none'})" for p, v in versions.items() if not (v and v in p.specifier)]
    found = f"{', '.join(unfit)}: run `make setup`" if unfit else f"{len(versions)} present, torch {_version('torch')}"
    return Finding("packages", not unfit, found)


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
