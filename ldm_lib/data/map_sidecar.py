"""The JSON beside a map that this library made: by whom, from what, with which settings, and the sha256 of the map."""

from pathlib import Path
from typing import Any

from ldm_lib.data.nifti import stem
from ldm_lib.files import read_json, sha256

NO_MAP, GIVEN = "none", "given"


def sidecar_path(path: Path) -> Path:
    """`<map>.nii.gz` -> `<map>.json`."""
    return path.with_name(f"{stem(path)}.json")


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The sidecar of a map, or None where there is none, or somebody else's."""
    try:
        record = read_json(sidecar_path(path))
    except ValueError:
        return None
    return record if {"made_by", "sha256"} <= set(record) else None


def made_by(path: Path | None) -> str:
    """Where a map comes from: "none", "given", or how this library made it, if its sidecar speaks of these bytes."""
    if path is None:
        return NO_MAP
    record = read_sidecar(path)
    return str(record["made_by"]) if record and record["sha256"] == sha256(path) else GIVEN
