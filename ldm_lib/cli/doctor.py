"""Check whether this installation and this machine can run the library."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

from jupyter_client.kernelspec import KernelSpecManager
from packaging.requirements import Requirement

from ldm_lib.experiment.run_folder import outputs_folder

MIN_DISK_GB, MIN_MEMORY_GB = 5, 8
FIX = "run `make setup`, or `pip install .` in the checkout"


@dataclass(frozen=True)
class Finding:
    """Hold what was checked, whether it is good, and what was found."""

    what: str
    good: bool
    found: str


def examine() -> list[Finding]:
    """Check Python, packages, kernel, device, outputs folder and memory."""
    checks = {"Python": _python, "packages": _packages, "Jupyter kernel": _kernel, "device": _device,
              "outputs folder": _outputs, "memory": _memory}  # fmt: skip
    return [Finding(what, *check()) for what, check in checks.items()]


def _python() -> tuple[bool, str]:
    return sys.version_info >= (3, 11), f"{sys.version.split()[0]} (3.11 or newer)"


def _packages() -> tuple[bool, str]:
    """Compare the installed packages with the versions that the metadata of this project require."""
    try:
        required = [Requirement(line) for line in metadata.requires("brain-mri-inpainting") or []]
    except metadata.PackageNotFoundError:
        return False, f"this project is not installed: {FIX}"
    required = [package for package in required if not package.marker or package.marker.evaluate({"extra": ""})]
    versions = {package: _version(package.name) for package in required}
    wrong = [f"{p} (found {v or 'none'})" for p, v in versions.items() if not (v and v in p.specifier)]
    return not wrong, f"{', '.join(wrong)}: {FIX}" if wrong else f"{len(versions)} present, torch {_version('torch')}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _kernel() -> tuple[bool, str]:
    good = "python3" in KernelSpecManager().find_kernel_specs()
    return good, "python3" if good else f"none: {FIX}"


def _device() -> tuple[bool, str]:
    from ldm_lib.devices import pick_device, pick_precision

    device = pick_device()
    return True, f"{device.type}, precision {pick_precision('auto', device)}, {os.cpu_count()} cores"


def _outputs() -> tuple[bool, str]:
    folder = outputs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return False, f"{folder} cannot be written ({error.strerror}): set LDM_OUTPUTS to another folder"
    free = shutil.disk_usage(folder).free / 1e9
    return free > MIN_DISK_GB, f"{folder}, {free:.0f} GB free (at least {MIN_DISK_GB})"


def _memory() -> tuple[bool, str]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return total > MIN_MEMORY_GB, f"{total:.0f} GB (at least {MIN_MEMORY_GB})"
