"""Measure `ldm inpaint` with the pretrained weights: whole processes, and where the seconds of one file go."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timed_command import PARTS, STARTED
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.layouts import DEFAULT_CONDITIONING
from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
from ldm_lib.errors import RunError
from ldm_lib.inpainting.tissue_maps import CACHE_VARIABLE
from ldm_lib.progress import report

CASES = 8  # of the folder
IN_ORDER = ("start", "imports", *PARTS, "other", "exit")


def bench_command(files: tuple[str, str] | None = None, *, spacing_mm: float = 1.0) -> dict[str, Any]:
    """Inpaint one file twice, the second time with its tissue map found, and then a folder of cases.

    Args:
        files: a voided T1n and its mask; None inpaints a synthetic patient.
        spacing_mm: voxel size of the synthetic patients.

    Returns:
        "command", the seconds of each part and of all ("total") for "cold" and "again", and "folder": of one case of
        eight in one process; "ratios".
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_synthetic_cohort(root, CASES, first=0, spacing_mm=spacing_mm, masks=1)
        shutil.rmtree(root / DEFAULT_CONDITIONING)  # so that tissue maps are made from the scans, as of patients
        case = find_cases(root / "data")[0]
        scan, mask = files or (str(case.t1n_voided), str(case.mask))
        one = ["inpaint", "--quiet", "--t1n-voided", scan, "--mask", mask, "--output", str(root / "one.nii.gz")]
        rows = {name: _timed(root, one) for name in ("cold", "again")}
        shutil.rmtree(root / "cache")
        many = ["inpaint", "--quiet", "--data", str(root / "data"), "--output", str(root / "filled")]
        rows["folder"] = {"total": _timed(root, many)["total"] / CASES}
    for name, row in rows.items():
        report(f"ldm inpaint, {name}: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in row.items()))
    ratios = {f"command_cold_over_{name}": rows["cold"]["total"] / rows[name]["total"] for name in ("again", "folder")}
    return {"command": rows, "ratios": ratios}


def _timed(root: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Run a command in a process of its own; return the seconds of its parts, and of all."""
    times = root / "times.json"
    # tissue maps that were made before do not count, and those of this machine's user stay as they are
    surroundings = os.environ | {CACHE_VARIABLE: str(root / "cache"), STARTED: str(time.time())}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "benchmarks.timed_command", str(times), *arguments],
                          env=surroundings, capture_output=True, text=True, check=False)  # fmt: skip
    total = time.perf_counter() - started
    if done.returncode or not times.exists():
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RunError(f"the command failed ({last})", where="bench, ldm inpaint", fix="see its message")
    parts = json.loads(times.read_text())
    times.unlink()
    parts["exit"] = total - sum(parts.values())
    return {part: parts.get(part, 0.0) for part in IN_ORDER} | {"total": total}
