"""Make the tissue map that a model needs from the scan, and keep it in the user's cache.

Maps are `tissue_maps/<key>.nii.gz` in $LDM_CACHE, else in `ldm_lib` of the platform's cache folder. The key is a digest
of the voxels, mask, affine and settings that decide the map, so that a scan is registered once. A map of
a whole head at 1 mm takes about 0.3 MB.
"""

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ldm_lib.data.case import TISSUE_LABELS, CaseData
from ldm_lib.data.conditioning_maps import make_tissue_map
from ldm_lib.errors import LdmError
from ldm_lib.files import expand_path, fingerprint, require_writable
from ldm_lib.images.masks import read_labels

log = logging.getLogger("ldm_lib")

CACHE_VARIABLE = "LDM_CACHE"


def add_tissue_map(data: CaseData, *, refine: str, device: torch.device | str = "cpu") -> CaseData:
    """Add a tissue map made from the voided scan by `make_tissue_map`; log a warning and add none if that fails."""
    where = data.case.t1n_voided or data.case.t1n
    with _map_folder() as (folder, kept):
        made = make_tissue_map(data, folder / f"{_key(data, refine, device)}.nii.gz", refine=refine, device=device)
        labels = None if made.failure else read_labels(made.path, data.source, TISSUE_LABELS)
    if labels is None:
        log.warning("%s: no tissue map: %s; inpainted without", where, made.failure)
        return data
    if made.made_now:
        place = f"; kept in {folder}" if kept else ""
        log.warning("%s: no tissue map given, made from the scan with the MNI152 atlas%s", where, place)
    else:
        log.info("%s: no tissue map given, found the one made before in %s", where, folder)
    return data.with_maps(tissue=labels)


def cache_folder() -> Path:
    """Return the cache folder of this user; RuntimeError without a home folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return expand_path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ldm_lib"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "ldm_lib"


@contextmanager
def _map_folder() -> Iterator[tuple[Path, bool]]:
    """Yield the folder of kept maps and True, or a temporary folder and False where none can be kept."""
    try:
        folder = cache_folder() / "tissue_maps"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # maps are made from patients' data
        require_writable(folder / "map.nii.gz")
        reason = ""
    except (RuntimeError, OSError, LdmError) as error:
        reason = getattr(error, "strerror", "") or str(error)
    if not reason:
        yield folder, True
        return
    log.warning("tissue maps are not kept for the next call: %s; set %s to a folder", reason, CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary), False


def _key(data: CaseData, refine: str, device: torch.device | str) -> str:
    arrays = [hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for array in (data.voided, data.mask)]
    key = {"arrays": arrays, "affine": np.asarray(data.source.affine).tolist(), "scale": data.scale, "refine": refine}
    return fingerprint(key | {"device": torch.device(device).type})[:32]
