"""Conditioning maps made from the scan alone, kept with a sidecar that says by whom, how and from what.

    <map>.nii.gz   tissue: labels uint8; growth: concentration float32, on the scan's grid
    <map>.json     made_by, from (role -> sha256), settings, found, and sha256 of the map

A map whose sidecar names the same sources, settings and code is taken as it is. A map that could not be made leaves a
sidecar that says why, and no map.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.anatomy.options import DEFAULT_RATES, GrowthRates
from ldm_lib.anatomy.registration import Registration
from ldm_lib.anatomy.tissue_segmentation import tissue_from_scan
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD, grow_tumour
from ldm_lib.data.case import TISSUE_LABELS, Case, CaseData, case_of_files, load_case
from ldm_lib.data.layouts import CONDITIONING_FOLDERS
from ldm_lib.data.map_sidecar import read_sidecar, sidecar_path
from ldm_lib.data.mask_synthesis import UNHEALTHY_MARGIN_MM, shrink_mm
from ldm_lib.data.masks import read_labels, read_mask
from ldm_lib.data.nifti import require_results_writable, require_volume_writable
from ldm_lib.data.volume import write_map
from ldm_lib.errors import InputError
from ldm_lib.files import expand_path, now, sha256, write_json

log = logging.getLogger("ldm_lib")

CODE_VERSION = 2  # raise it when a map would come out otherwise
DAYS_FROM_SEGMENTATION = 15.0  # grows a soft rim of a few millimetres, less than the margin, around what was segmented


@dataclass(frozen=True)
class ConditioningMap:
    """A map beside its sidecar.

    Attributes:
        path: of the map, which is not there if `record["refused"]` says why.
        record: the sidecar.
        made_now: False for a map that was found.
        registration: what a tissue map came from, when it was made now; else None.
    """

    path: Path
    record: dict[str, Any]
    made_now: bool
    registration: Registration | None = None

    @property
    def row(self) -> dict[str, Any]:
        """One line of a table."""
        return {"map": f"{self.path.parent.name}/{self.path.name}", "made_by": self.record["made_by"],
                **self.record["found"], "made now": self.made_now, "refused": self.refused}  # fmt: skip

    @property
    def refused(self) -> str:
        """Why there is no map; empty if there is one."""
        return self.record["refused"]


def make_tissue_map(
    data: CaseData, path: str | Path, *, lesion: np.ndarray | None = None, refine: str = "mixture"
) -> ConditioningMap:
    """Segment a case with the atlas, never looking under its mask (`segmentation.tissue_from_scan`).

    Args:
        path: .nii or .nii.gz; its folder is made if needed.
        lesion: what is no healthy tissue although it is seen, bool (x, y, z).
        refine: how what is seen is labelled: "mixture", "hmrf" or "none".

    Raises:
        InputError: the map cannot be written. A scan that cannot be registered is `refused` instead.
    """
    sources = {"scan": data.case.t1n_voided or data.case.t1n, "mask": data.case.mask}
    sidecar = _Sidecar(Path(path), "MNI152 by registration", sources, {"refine": refine}, {"lesion": lesion})
    if found := sidecar.found():
        return found
    try:
        made = tissue_from_scan(data.voided / data.scale, data.source.affine, data.mask, lesion=lesion, refine=refine)
    except InputError as error:
        return sidecar.keep(None, {}, data.source.affine, refused=str(error))
    where = made.registration
    figures = {"brain_dice": where.brain_dice, "correlation": where.correlation, "seconds": where.seconds}
    voxels = None if where.flaw else made.labels
    return replace(sidecar.keep(voxels, figures, data.source.affine, refused=where.flaw), registration=where)


def make_growth_map(
    data: CaseData,
    labels: np.ndarray,
    path: str | Path,
    *,
    seed_mm: Sequence[float] | None = None,
    segmentation: np.ndarray | None = None,
    days: float = DAYS_FROM_SEGMENTATION,
    rates: GrowthRates = DEFAULT_RATES,
) -> ConditioningMap:
    """Grow a tumour in a case's tissue (`tumour_growth.grow_tumour`).

    Args:
        labels: tissue (x, y, z) on the case's grid, 0 none, 1 CSF, 2 GM, 3 WM.
        path: .nii or .nii.gz; its folder is made if needed.
        seed_mm: where it starts, x y z in the file's world (RAS, mm).
        segmentation: where it is already; without both, the case's unhealthy mask less its margin.

    Raises:
        InputError: no start, one outside white and grey matter, or the map cannot be written.
    """
    if seed_mm is None and segmentation is None:
        segmentation = segmentation_of(data)
    settings = rates.model_dump() | {"days": days, "seed_mm": None if seed_mm is None else [float(v) for v in seed_mm]}
    volumes = {"segmentation": segmentation, "tissue": labels}
    sidecar = _Sidecar(Path(path), "Fisher-Kolmogorov", {}, settings, volumes)
    if found := sidecar.found():
        return found
    start = {"seed_mm": seed_mm, "segmentation": segmentation}
    growth = grow_tumour(labels, data.source.affine, days, rates=rates, **start)
    litre = float(np.prod(data.source.spacing_mm)) / 1000
    visible = float((growth >= GROWTH_THRESHOLD).sum() * litre)
    return sidecar.keep(growth, {"visible_ml": visible, "highest": float(growth.max())}, data.source.affine)


def add_conditioning_maps(
    case: Case, folder: str | Path, *, tissue: bool = True, growth: bool = True, refine: str = "mixture"
) -> tuple[Case, list[ConditioningMap]]:
    """Make a case's conditioning maps from its scan, and keep them in a folder.

    A map that is there already, made from the same files with the same settings, is not made again.

    Args:
        folder: takes tissue_segmentation/<case>.nii.gz and growth_model/<case>.nii.gz.
        tissue: make the tissue map, even if the case has one.
        growth: make the growth map, even if the case has one; it needs a tissue map and an unhealthy mask. A case
            without a growth map is healthy.
        refine: as in `make_tissue_map`.

    Returns:
        The case with these maps, and a record of each. A map that could not be made leaves the case without one.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ldm_lib.data.cohort import find_cases
        >>> from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
        >>> with TemporaryDirectory() as folder:
        ...     patients = make_synthetic_cohort(folder, 1, spacing_mm=8, masks=1)
        ...     case, made = add_conditioning_maps(find_cases(f"{folder}/data")[0], f"{folder}/maps", growth=False)
        >>> case.tissue.name, made[0].row["map"]
        ('Synthetic_08000-0000.nii.gz', 'tissue_segmentation/Synthetic_08000-0000.nii.gz')
    """
    if not (tissue or growth):
        return case, []
    folder, data, made, maps = expand_path(folder), load_case(case), [], {}
    labels = data.tissue
    if tissue:
        made.append(make_tissue_map(data, _place(folder, "tissue", case), refine=refine))
        maps["tissue"] = None if made[-1].refused else made[-1].path
        labels = read_labels(maps["tissue"], data.source, TISSUE_LABELS) if maps["tissue"] else None
    if growth and labels is not None and data.unhealthy is not None and data.unhealthy.any():
        try:
            made.append(make_growth_map(data, labels, _place(folder, "growth", case)))
            maps["growth"] = made[-1].path
        except InputError as error:
            log.warning("%s: no growth map: %s", case.key, error)
    return case.with_maps(**maps), made


def make_conditioning_maps(
    t1n_voided: str | Path,
    mask: str | Path,
    *,
    tissue: str | Path,
    growth: str | Path | None = None,
    seed_mm: Sequence[float] | None = None,
    segmentation: str | Path | None = None,
    days: float = DAYS_FROM_SEGMENTATION,
    rates: GrowthRates = DEFAULT_RATES,
    lesion: str | Path | None = None,
    refine: str = "mixture",
) -> list[ConditioningMap]:
    """Make the tissue map of one scan and, if asked, a growth map in it; never looks under the mask.

    Args:
        t1n_voided: skull-stripped 3D T1n.
        mask: binary, on the same grid, 1 = not known.
        tissue, growth: where the maps go, .nii or .nii.gz, each with a JSON beside it.
        seed_mm, segmentation: where the tumour starts, as in `make_growth`; one of them if there is `growth`.
        lesion: binary, on the same grid: what is seen but no healthy tissue.

    Returns:
        what was made or found; a tissue map that was refused ends the list.

    Raises:
        LdmError: an input that cannot be used, or an output that cannot be written.
    """
    if (growth is not None) != ((seed_mm is None) != (segmentation is None)):
        raise InputError("a growth map needs an output and one start", where="growth",
                         fix="give growth with either a seed point or a segmentation")  # fmt: skip
    case = case_of_files(t1n_voided, mask)
    wanted = [expand_path(path) for path in (tissue, growth) if path is not None]
    others = [expand_path(path) for path in (lesion, segmentation) if path is not None]
    for path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
    require_results_writable(wanted, [*case.files().values(), *others])
    if len(set(wanted)) < len(wanted):
        raise InputError("is to hold both maps", where=wanted[0], fix="name two files")
    data = load_case(case)
    seen = {name: None if path is None else read_mask(path, data.source)
            for name, path in (("lesion", lesion), ("segmentation", segmentation))}  # fmt: skip
    made = [make_tissue_map(data, tissue, lesion=seen["lesion"], refine=refine)]
    if growth is not None and not made[0].refused:
        labels = read_labels(made[0].path, data.source, TISSUE_LABELS)
        start = {"seed_mm": seed_mm, "segmentation": seen["segmentation"]}
        made.append(make_growth_map(data, labels, growth, days=days, rates=rates, **start))
    return made


def _place(folder: Path, kind: str, case: Case) -> Path:
    return folder / CONDITIONING_FOLDERS[kind] / f"{case.key}.nii.gz"


def segmentation_of(data: CaseData) -> np.ndarray:
    """Where a case's tumour is: its unhealthy mask less the margin that the challenge puts around a segmentation.

    Raises:
        InputError: the case has no unhealthy mask, or an empty one.
    """
    if data.unhealthy is None or not data.unhealthy.any():
        raise InputError("no unhealthy mask to start a tumour from", where=data.case.key,
                         fix="give a seed point or a segmentation")  # fmt: skip
    return shrink_mm(data.unhealthy, UNHEALTHY_MARGIN_MM, data.source.spacing_mm)


@dataclass(frozen=True)
class _Sidecar:
    """What a map is to be made from: files by role, settings, and volumes that are no files of their own."""

    path: Path
    how: str
    sources: dict[str, Path]
    settings: dict[str, Any]
    volumes: dict[str, np.ndarray | None]

    @property
    def claim(self) -> dict[str, Any]:
        """What decides the map, as the sidecar tells it."""
        files = {role: sha256(path) for role, path in self.sources.items()}
        arrays = {role: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest()
                  for role, v in self.volumes.items() if v is not None}  # fmt: skip
        return {"made_by": f"{self.how}, version {CODE_VERSION}", "from": files | arrays, "settings": self.settings}

    def found(self) -> ConditioningMap | None:
        """The map as it lies there, if it was made from all this and is whole."""
        record = read_sidecar(self.path)
        if not record or any(record.get(name) != value for name, value in self.claim.items()):
            return None
        whole = self.path.is_file() and record.get("sha256") == sha256(self.path)
        return ConditioningMap(self.path, record, made_now=False) if whole or record.get("refused") else None

    def keep(
        self, voxels: np.ndarray | None, found: dict[str, float], affine: np.ndarray, refused: str = ""
    ) -> ConditioningMap:
        """Write the map, unless it was refused, and then its sidecar."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        require_volume_writable(self.path)
        if voxels is None:
            self.path.unlink(missing_ok=True)
        else:
            write_map(self.path, voxels, affine)
        digest = sha256(self.path) if voxels is not None else ""
        record = self.claim | {"found": found, "refused": refused, "sha256": digest, "made": now()}
        write_json(sidecar_path(self.path), record)
        return ConditioningMap(self.path, record, made_now=True)
