"""Record the code, the versions and the machine that a result comes from."""

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm_lib import __version__

PACKAGES = ("torch", "monai", "lightning", "numpy", "scipy", "nibabel", "nilearn", "papermill", "pydantic")
_PROJECT = Path(__file__).parents[2]


def provenance() -> dict[str, Any]:
    """Return code, versions and machine that a result comes from."""
    return {
        "version": __version__,
        "git": _git_state(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def peak_memory_mb() -> int:
    """Return the largest resident memory that this process has had, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else kilobytes
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _git_state() -> dict[str, Any]:
    if not (_PROJECT / ".git").exists():  # an installed package
        return {"commit": "unknown", "changed_files": None}
    git = ["git", "-C", str(_PROJECT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "changed_files": None}
    return {"commit": commit, "changed_files": len(changed.splitlines())}
