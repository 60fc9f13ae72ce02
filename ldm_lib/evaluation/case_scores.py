"""One case's candidates for the hole, each scored as the challenge scores. No network library is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.anatomy.tissue import WM
from ldm_lib.data.case import CaseData
from ldm_lib.data.conditioning_maps import NO_MAP, made_by
from ldm_lib.data.volume import read_volume
from ldm_lib.evaluation.conditioning_fidelity import growth_response, tissue_by_intensity, tissue_dice
from ldm_lib.evaluation.metrics import brats_scores, hole_size_class, scores_by_tissue
from ldm_lib.inpainting.baselines import BASELINES, OF_TISSUE

ONE_SAMPLE, NEAREST, UPPER_BOUND, TISSUE_PAINT = "one sample", "nearest to the mean", "ceiling", "tissue paint"
WITH_GIVEN = ", given tissue"  # what follows a method's name when it saw the map that came with the case
VARIANTS = ("as used", "given", "shuffled", "empty")  # as stage 05 names them, `counterfactuals.tellings`
OBEDIENCE = ("psnr_01", "ssim", "dice CSF", "dice GM", "dice WM", "dice mean", "response")


def mean_of(samples: int) -> str:
    """Names the mean of K samples in tables."""
    return f"mean of {samples}"


def sample_path(results: Path, data: CaseData, k: int) -> Path:
    """Where stage 05 wrote the k-th sample of a case."""
    return _beside(results, data, f"sample-{k:04d}")


def spread_path(results: Path, data: CaseData) -> Path:
    """Where stage 05 wrote the standard deviation of several samples of a case."""
    return _beside(results, data, "std")


def _beside(results: Path, data: CaseData, name: str) -> Path:
    return results / data.case.result_name.replace(".nii.gz", f"-{name}.nii.gz")


def samples_and_truth(data: CaseData, results: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """What K samples (K, n) and the truth (n,) hold at the n scored voxels of a case, in source units."""
    volumes = (read_volume(sample_path(results, data, k)).voxels for k in range(samples))
    return np.stack([volume[data.scored] for volume in volumes]), data.target[data.scored]


def conditioned_path(results: Path, data: CaseData, telling: str) -> Path:
    """Where stage 05 wrote the fill of a case that was told otherwise (`counterfactuals.tellings`, or a scale)."""
    return results / "conditionings" / telling.replace(" ", "_") / data.case.result_name


def candidates(
    data: CaseData, results: Path, samples: int, *, baselines: bool = True, given: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Method -> filled volume (x, y, z) in the file's order: ours, the autoencoder's ceiling and the baselines.

    Args:
        given: tissue labels that came with the case, when it was filled with others: what they would have given is
            told as well, by names that say so.
    """
    files = {
        ONE_SAMPLE: sample_path(results, data, 0),
        mean_of(samples): results / data.case.result_name,
        UPPER_BOUND: results / "ceiling" / data.case.result_name,
    }
    if given is not None and (told := conditioned_path(results, data, "given")).exists():
        files[f"{ONE_SAMPLE}{WITH_GIVEN}"] = told
    if samples > 1:
        files[NEAREST] = _beside(results, data, "nearest")
    volumes = {name: read_volume(path).voxels for name, path in files.items()}
    if not baselines:
        return volumes
    usable = [name for name in BASELINES if name not in OF_TISSUE or data.tissue is not None]
    volumes |= {name: _baseline(name, data, data.tissue) for name in usable}
    return volumes | ({} if given is None else {f"{TISSUE_PAINT}{WITH_GIVEN}": _baseline(TISSUE_PAINT, data, given)})


def _baseline(name: str, data: CaseData, tissue: np.ndarray | None) -> np.ndarray:
    how = {"lateral_axis": data.lateral_axis, "spacing_mm": data.cube_mm}
    return BASELINES[name](data.voided, data.mask, tissue=tissue, **how)


def fidelity_row(data: CaseData, volume: np.ndarray, *, asked: CaseData, threshold: float) -> dict[str, Any]:
    """Scores of one fill, how far it holds the tissues that were asked for, and how it answers to the growth.

    Dice is of the tissues asked for against those told from the fill's intensities, in the healthy part of the hole.
    `response` is the mean intensity inside the growth's contour less that outside it, over the case's scale, in the
    hole's white matter, where a tumour shows: other tissues have other intensities whether there is a tumour or not.

    Args:
        volume: (x, y, z), one fill, or the truth.
        asked: the case with the maps that the fill is held against.
        threshold: concentration from which there is tumour.
    """
    row = brats_scores(volume, data.target, data.voided, data.scored, where=data.case.key)
    if asked.tissue is not None:
        growth = np.zeros(data.mask.shape) if asked.growth is None else asked.growth
        healthy = data.scored & (growth < threshold)
        found = tissue_by_intensity(volume, asked.tissue, data.mask)
        row |= {f"dice {name}": value for name, value in tissue_dice(asked.tissue, found, healthy).items()}
    if asked.growth is not None:
        white = data.mask if asked.tissue is None else data.mask & (asked.tissue == WM)
        row["response"] = growth_response(volume, asked.growth, white, threshold=threshold)["difference"] / data.scale
    return row


def score_rows(data: CaseData, volumes: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores on the healthy mask: a row per method, and a row per method and tissue (none without a tissue map)."""
    hole_mm3 = float(data.scored.sum()) * float(np.prod(data.source.spacing_mm))
    about = {
        "case": data.case.key,
        "patient": data.case.patient,
        "hole": hole_size_class(hole_mm3),
        "tissue_map": NO_MAP if data.tissue is None else made_by(data.case.tissue),
    }
    rows, by_tissue = [], []
    for method, volume in volumes.items():
        scored = (volume, data.target, data.voided, data.scored)
        rows.append(about | {"method": method} | brats_scores(*scored, where=data.case.key))
        if data.tissue is not None:
            found = scores_by_tissue(*scored, data.tissue, where=data.case.key)
            by_tissue += [about | {"method": method} | row for row in found]
    return rows, by_tissue
