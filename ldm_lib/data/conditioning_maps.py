"""Make conditioning maps from a scan, and keep them in files with their provenance.

The JSON file next to a map holds made_by, from (role -> sha256), settings, found, and sha256 of the map. A map whose
JSON file names the same sources, settings and code version is not made again; one that could not be made leaves a JSON
file that says why.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_lib.anatomy.options import DEFAULT_RATES, GrowthRates
from ldm_lib.data.case import TISSUE_LABELS, Case, CaseData, case_of_files, load_case
from ldm_lib.data.layouts import CONDITIONING_FOLDERS
from ldm_lib.data.mask_synthesis import UNHEALTHY_MARGIN_MM, shrink_mm
from ldm_lib.errors import InputError
from ldm_lib.files import expand_path, now, read_json, sha256, write_json
from ldm_lib.images.image_files import require_results_writable, stem
from ldm_lib.images.masks import read_labels, read_mask
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.volume import write_map

if TYPE_CHECKING:  # torch and scipy take seconds to load: they are imported where a map is made
    import torch

    from ldm_lib.anatomy.registration import Registration

log = logging.getLogger("ldm_lib")

CODE_VERSION = 6  # raise it when a map would come out differently
DAYS_FROM_SEGMENTATION = 15.0  # grows a soft rim of a few millimetres, less than the margin, around a segmentation
NO_MAP, GIVEN = "none", "given"


@dataclass(frozen=True)
class ConditioningMap:
    """Hold where a map is, and how it was made."""

    path: Path  # the map's file, which does not exist if there is a `failure`
    record: dict[str, Any]  # content of the JSON file next to it
    made_now: bool  # False for a map that was found
    registration: "Registration | None" = None  # of a tissue map that was made now

    @property
    def row(self) -> dict[str, Any]:
        """One line of a table."""
        return {"map": f"{self.path.parent.name}/{self.path.name}", "made_by": self.record["made_by"],
                **self.record["found"], "made now": self.made_now, "failure": self.failure}  # fmt: skip

    @property
    def failure(self) -> str:
        """Why there is no map; empty if there is one."""
        return self.record["refused"]


def made_by(path: Path | None) -> str:
    """Return how a map was made: "none" without a map, "given" if this library did not make this very file."""
    if path is None:
        return NO_MAP
    record = _read_record(path)
    return str(record["made_by"]) if record and record["sha256"] == sha256(path) else GIVEN


def _record_path(path: Path) -> Path:
    return path.with_name(f"{stem(path)}.json")


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a map, or None where there is none, or one of another program."""
    try:
        record = read_json(_record_path(path))
    except ValueError:
        return None
    return record if {"made_by", "sha256"} <= set(record) else None


def _claim(
    method: str, sources: dict[str, Path], settings: dict[str, Any], **volumes: np.ndarray | None
) -> dict[str, Any]:
    """Describe what decides a map, the part of its record that must be equal for the map to be used again.

    Args:
        sources: role -> source file.
        volumes: arrays that have no file of their own.
    """
    digests = {role: sha256(path) for role, path in sources.items()}
    for role, volume in volumes.items():
        if volume is not None:
            digests[role] = hashlib.sha256(np.ascontiguousarray(volume).tobytes()).hexdigest()
    return {"made_by": f"{method}, version {CODE_VERSION}", "from": digests, "settings": settings}


def _found(path: Path, claim: dict[str, Any]) -> ConditioningMap | None:
    """Return the map that exists, if it was made from all this and is undamaged."""
    record = _read_record(path)
    if not record or any(record.get(name) != value for name, value in claim.items()):
        return None
    undamaged = path.is_file() and record["sha256"] == sha256(path)
    return ConditioningMap(path, record, made_now=False) if undamaged or record.get("refused") else None


def _keep(
    path: Path, claim: dict[str, Any], voxels: np.ndarray | None, found: dict[str, float], affine: np.ndarray,
    failure: str = "",
) -> ConditioningMap:  # fmt: skip
    """Write the map, unless making it failed, and then its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    require_results_writable([path])
    if voxels is None:
        path.unlink(missing_ok=True)
    else:
        write_map(path, voxels, affine)
    digest = sha256(path) if voxels is not None else ""
    record = claim | {"found": found, "refused": failure, "sha256": digest, "made": now()}
    write_json(_record_path(path), record)
    return ConditioningMap(path, record, made_now=True)


def make_tissue_map(
    data: CaseData,
    path: str | Path,
    *,
    lesion: np.ndarray | None = None,
    refine: str = "mixture",
    device: "torch.device | str" = "cpu",
) -> ConditioningMap:
    """Segment a case with the atlas, without the voxels under its mask; see `tissue_from_scan`.

    If the scan cannot be registered, the `failure` of the map says why. The folder of `path` is made if needed.
    """
    from ldm_lib.anatomy.tissue_segmentation import tissue_from_scan

    sources = {"scan": data.case.t1n_voided or data.case.t1n, "mask": data.case.mask}
    arrays = {"lesion": lesion, "brain": data.brain}
    path, claim = Path(path), _claim("MNI152 by registration", sources, {"refine": refine}, **arrays)
    if found := _found(path, claim):
        return found
    try:
        made = tissue_from_scan(
            data.voided / data.scale, data.affine, data.mask, lesion=lesion, refine=refine, device=device
        )
    except InputError as error:
        return _keep(path, claim, None, {}, data.affine, failure=str(error))
    fit = made.registration
    figures = {"brain_dice": fit.brain_dice, "correlation": fit.correlation, "seconds": fit.seconds}
    voxels = None if fit.failure else made.labels
    return replace(_keep(path, claim, voxels, figures, data.affine, failure=fit.failure), registration=fit)


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
    """Grow a tumour in a case's tissue; see `grow_tumour`.

    Args:
        labels: tissue (x, y, z) on the case's grid, 0 none, 1 CSF, 2 GM, 3 WM.
        path: .nii, .nii.gz, .mgh or .mgz; its folder is made if needed.
        seed_mm, segmentation: where the tumour starts; without both, in the case's unhealthy mask less the margin that
            the challenge puts around a segmentation.
    """
    from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD, grow_tumour

    if seed_mm is None and segmentation is None:
        if data.unhealthy is None or not data.unhealthy.any():
            raise InputError("no unhealthy mask to start a tumour from", where=data.case.key,
                             fix="give a seed point or a segmentation")  # fmt: skip
        segmentation = shrink_mm(data.unhealthy, UNHEALTHY_MARGIN_MM, data.source.spacing_mm)
    settings = rates.model_dump() | {"days": days, "seed_mm": None if seed_mm is None else [float(v) for v in seed_mm]}
    path, claim = Path(path), _claim("Fisher-Kolmogorov", {}, settings, segmentation=segmentation, tissue=labels)
    if found := _found(path, claim):
        return found
    growth = grow_tumour(labels, data.affine, days, seed_mm=seed_mm, segmentation=segmentation, rates=rates)
    voxel_ml = float(np.prod(data.source.spacing_mm)) / 1000
    figures = {"visible_ml": float((growth >= GROWTH_THRESHOLD).sum() * voxel_ml), "highest": float(growth.max())}
    return _keep(path, claim, growth, figures, data.affine)


def add_conditioning_maps(
    case: Case, folder: str | Path, *, tissue: bool = True, growth: bool = True, refine: str = "mixture"
) -> tuple[Case, list[ConditioningMap]]:
    """Make a case's conditioning maps from its scan, and keep them in a folder.

    A map that is there already, made from the same files with the same settings, is not made again.

    Args:
        folder: takes tissue_segmentation/<case>.nii.gz and growth_model/<case>.nii.gz.
        tissue, growth: make this map, even if the case has one. A growth map needs a tissue map and an unhealthy mask;
            a case without one is healthy.
        refine: as in `tissue_from_scan`.

    Returns:
        The case with these maps, and a record of each; without a map that could not be made.

    Examples:
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
    paths = {kind: expand_path(folder) / name / f"{case.key}.nii.gz" for kind, name in CONDITIONING_FOLDERS.items()}
    data, made, maps = load_case(case), [], {}
    labels = data.tissue
    if tissue:
        made.append(make_tissue_map(data, paths["tissue"], refine=refine))
        maps["tissue"] = None if made[-1].failure else made[-1].path
        labels = read_labels(maps["tissue"], data.source, TISSUE_LABELS) if maps["tissue"] else None
    if growth and labels is not None and data.unhealthy is not None and data.unhealthy.any():
        try:
            made.append(make_growth_map(data, labels, paths["growth"]))
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
    read_options: ReadOptions = READ_STRICTLY,
) -> list[ConditioningMap]:
    """Make the tissue map of one scan and, if requested, a growth map in it, without the voxels under the mask.

    Args:
        t1n_voided, mask: 3D T1n, skull-stripped unless `read_options` strip it, and binary mask on its grid.
        tissue, growth: files of the maps, .nii, .nii.gz, .mgh or .mgz, each with a JSON file next to it.
        seed_mm, segmentation: where the tumour starts, as in `make_growth_map`; one of them if there is `growth`.
        lesion: binary, on the same grid: visible tissue that is not healthy.

    Returns:
        The maps that were made or found; a tissue map with a `failure` is the last.
    """
    if (growth is not None) != ((seed_mm is None) != (segmentation is None)):
        raise InputError("a growth map needs an output and one start", where="growth",
                         fix="give --growth with either --seed-mm or --segmentation")  # fmt: skip
    case = case_of_files(t1n_voided, mask, read_options=read_options)
    outputs = [expand_path(path) for path in (tissue, growth) if path is not None]
    others = [expand_path(path) for path in (lesion, segmentation) if path is not None]
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    require_results_writable(outputs, [*case.files().values(), *others])
    if len(set(outputs)) < len(outputs):
        raise InputError("would hold both maps", where=outputs[0], fix="name two files")
    data = load_case(case)
    lesion, segmentation = (
        None if path is None else read_mask(path, data.source, read_options, labelled=False)
        for path in (lesion, segmentation)
    )
    made = [make_tissue_map(data, tissue, lesion=lesion, refine=refine)]
    if growth is not None and not made[0].failure:
        labels, start = read_labels(made[0].path, data.source, TISSUE_LABELS), {"seed_mm": seed_mm}
        start |= {"segmentation": segmentation, "days": days, "rates": rates}
        made.append(make_growth_map(data, labels, growth, **start))
    return made
