"""Check whether this installation and this machine can run the library."""

import os
import shutil
from dataclasses import dataclass
from importlib import metadata

from jupyter_client.kernelspec import KernelSpecManager
from packaging.requirements import Requirement

from ldm_lib.errors import LdmError
from ldm_lib.experiment.run_folder import outputs_folder
from ldm_lib.files import require_writable

MIN_DISK_GB, MIN_MEMORY_GB = 5, 8
FIX = "run `make setup`, or `pip install .` in the checkout"


@dataclass(frozen=True)
class Check:
    """Hold what was checked, whether it is good, and what was found."""

    what: str
    good: bool
    found: str


def examine() -> list[Check]:
    """Check packages, kernel, device, reduced precision, outputs folder and memory."""
    from ldm_lib.devices import pick_device, pick_precision, probe_bf16

    kernel, device = "python3" in KernelSpecManager().find_kernel_specs(), pick_device()
    compute = f"{device.type}, precision {pick_precision('auto', device)}, {os.cpu_count()} cores"
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return [
        Check("packages", *_packages()),
        Check("Jupyter kernel", kernel, "python3" if kernel else f"none: {FIX}"),
        Check("device", True, compute),
        Check("bf16", *_bf16(*probe_bf16(device), default=pick_precision("auto", device) == "bf16")),
        Check("outputs folder", *_outputs()),
        Check("memory", memory_gb > MIN_MEMORY_GB, f"{memory_gb:.0f} GB (at least {MIN_MEMORY_GB})"),
    ]


def _bf16(error: float, speed: float, *, default: bool) -> tuple[bool, str]:
    """Describe what `probe_bf16` found; wrong gradients are bad where bf16 is the default."""
    from ldm_lib.devices import LARGEST_BF16_ERROR

    right = error <= LARGEST_BF16_ERROR
    use = "the default" if default else "used where it is asked for"
    found = f"gradients right, {use}" if right else "gradients wrong on this processor: train in float32 (precision=32)"
    return right or not default, f"{speed:.1f} times as fast as float32, {found}"


def _packages() -> tuple[bool, str]:
    """Compare the installed packages with the versions that the metadata of this project require."""
    installed = {package.name.lower().replace("_", "-"): package.version for package in metadata.distributions()}
    try:
        required = [Requirement(line) for line in metadata.requires("brain-mri-inpainting") or []]
    except metadata.PackageNotFoundError:
        return False, f"this project is not installed: {FIX}"
    required = [package for package in required if not package.marker or package.marker.evaluate({"extra": ""})]
    versions = {package: installed.get(package.name.lower().replace("_", "-"), "") for package in required}
    wrong = [f"{p} (found {v or 'none'})" for p, v in versions.items() if not (v and v in p.specifier)]
    return not wrong, f"{', '.join(wrong)}: {FIX}" if wrong else f"{len(versions)} present"


def _outputs() -> tuple[bool, str]:
    folder = outputs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_writable(folder / "probe")
    except (OSError, LdmError) as error:
        return False, f"{folder} cannot be written ({error}): set LDM_OUTPUTS to another folder"
    free_gb = shutil.disk_usage(folder).free / 1e9
    return free_gb > MIN_DISK_GB, f"{folder}, {free_gb:.0f} GB free (at least {MIN_DISK_GB})"
