"""Score the results of one case as the challenge does, next to baselines. No network library is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ldm_lib.anatomy.tissue import WM
from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.conditioning_maps import NO_MAP, made_by
from ldm_lib.errors import InputError
from ldm_lib.evaluation.boundary import boundary_scores
from ldm_lib.evaluation.conditioning_fidelity import growth_response, tissue_by_intensity, tissue_dice
from ldm_lib.evaluation.metrics import brats_scores, mask_size_class, scores_by_tissue
from ldm_lib.images.volume import in_format_of, read_image, read_volume
from ldm_lib.inpainting.baselines import BASELINES, OF_TISSUE
from ldm_lib.inpainting.result import Inpainting, page_path

SAMPLE, MEDOID, UPPER_BOUND, TISSUE_PAINT = "sample", "medoid sample", "upper bound", "tissue paint"
ESTIMATE = "estimate"  # the mean in one evaluation, and its folder in the results of `evaluate`
UPPER_BOUND_FOLDER = "upper_bound"  # of the results of stage 05
WITH_GIVEN = ", given tissue"  # follows a method's name when it used the map that came with the case
VARIANTS = ("as used", "given", "shuffled", "empty")  # of `counterfactuals.conditioning_variants`
FIDELITY = ("psnr_01", "ssim", "dice CSF", "dice GM", "dice WM", "dice mean", "response")


def brats_metrics(prediction: ArrayLike, case: Case | CaseData) -> dict[str, float]:
    """Compute the challenge's scores of an inpainted volume on the healthy part of the mask.

    Args:
        prediction: (x, y, z) in the file's voxel order and units, such as `Inpainting.mean`.
        case: the case with its full T1n.

    Returns:
        "ssim", "psnr" in dB, and "mse", "rmse", "mae" of intensities normalised to [0, 1] (`metrics.brats_scores`).

    Raises:
        InputError: a case without its full T1n, or volumes that do not fit.

    Examples:
        >>> import ldm_lib as ldm
        >>> case = ldm.load_case(ldm.find_cases(cohort)[0])
        >>> scores = ldm.brats_metrics(case.target, case)
        >>> scores["ssim"], scores["psnr"], scores["mse"]
        (1.0, inf, 0.0)
    """
    data = load_case(case)
    if data.target is None:
        raise InputError("has no t1n to compare with", where=data.case.key, fix="give a case with its full image")
    scores = brats_scores(prediction, data.target, data.voided, data.scored, where=data.case.key)
    return {name.removesuffix("_01"): value for name, value in scores.items()}


def mean_of(samples: int) -> str:
    """Return the name of the mean of K samples in tables."""
    return f"mean of {samples}"


def result_path(results: Path, data: CaseData, name: str) -> Path:
    """Return a file of a case in the results of stage 05: "std", "nearest" or "sample-000k"."""
    return results / data.case.result_name.replace(".nii.gz", f"-{name}.nii.gz")


def read_result(results: Path, data: CaseData) -> np.ndarray:
    """Read the result of a case in stage 05: (x, y, z) in the file's voxel order and units."""
    return read_image(results / data.case.result_name).voxels


def read_sample(results: Path, data: CaseData, k: int) -> np.ndarray:
    """Read the k-th sample of a case in the results of stage 05."""
    return read_image(result_path(results, data, f"sample-{k:04d}")).voxels


def page_file(results: Path, case: Case) -> Path:
    """Return the HTML page of a case in the results of stage 05."""
    return page_path(results / case.result_name)


def write_page(path: Path, results: Path, data: CaseData, samples: int) -> Path:
    """Write an HTML page of a case from its samples in the results of stage 05, and return it."""
    values = [read_sample(results, data, k)[data.mask] for k in range(samples)]
    return Inpainting(data, np.stack(values)).page(path)


def is_unchanged_outside(case: Case, folder: Path) -> bool:
    """Read a case's result back, and return whether header and voxels outside the mask are those of the source."""
    data, result = load_case(case), read_volume(folder / case.result_name, case.read_options)
    source = in_format_of(result.path, data.source)
    same = result.raw[~data.mask].tobytes() == source.raw[~data.mask].tobytes()
    return same and result.preamble == source.preamble


def read_variants(results: Path, data: CaseData) -> dict[str, np.ndarray]:
    """Read the results of a case under the conditionings of `VARIANTS`, those that exist, by name."""
    paths = {name: conditioned_path(results, data, name) for name in VARIANTS}
    return {name: read_image(path).voxels for name, path in paths.items() if path.exists()}


def samples_and_target(data: CaseData, results: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Read K samples (K, n) and the target (n,) at the n scored voxels of a case, in source units."""
    values = [read_sample(results, data, k)[data.scored] for k in range(samples)]
    return np.stack(values), data.target[data.scored]


def conditioned_path(results: Path, data: CaseData, variant: str) -> Path:
    """Return the file of the result of a case under another conditioning, or another guidance scale, in stage 05."""
    return results / "conditionings" / variant.replace(" ", "_") / data.case.result_name


def candidates(
    data: CaseData, results: Path, samples: int, *, baselines: bool = True, given: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Collect the volumes to score, by method: the results of stage 05, the upper bound and the baselines.

    Volumes are (x, y, z) in the file's voxel order.

    Args:
        samples: number K of samples; there is a medoid sample if it is above 1.
        baselines: compute the baselines too.
        given: second tissue map (x, y, z) to compare with `data.tissue`, which was made from the scan. It adds the
            methods "sample, given tissue", if stage 05 made it, and "tissue paint, given tissue".
    """
    files = {
        SAMPLE: result_path(results, data, "sample-0000"),
        mean_of(samples): results / data.case.result_name,
        UPPER_BOUND: results / UPPER_BOUND_FOLDER / data.case.result_name,
    }
    if given is not None and (path := conditioned_path(results, data, "given")).exists():
        files[f"{SAMPLE}{WITH_GIVEN}"] = path
    if (path := results / ESTIMATE / data.case.result_name).exists():
        files[ESTIMATE] = path
    if samples > 1:
        files[MEDOID] = result_path(results, data, "nearest")
    volumes = {name: read_image(path).voxels for name, path in files.items()}
    if not baselines:
        return volumes
    usable = [name for name in BASELINES if name not in OF_TISSUE or data.tissue is not None]
    volumes |= {name: _baseline(name, data, data.tissue) for name in usable}
    return volumes | ({} if given is None else {f"{TISSUE_PAINT}{WITH_GIVEN}": _baseline(TISSUE_PAINT, data, given)})


def _baseline(name: str, data: CaseData, tissue: np.ndarray | None) -> np.ndarray:
    geometry = {"lateral_axis": data.source.lateral_axis, "spacing_mm": data.source.mean_spacing_mm}
    return BASELINES[name](data.voided, data.mask, tissue=tissue, **geometry)


def names(data: CaseData) -> dict[str, Any]:
    """Return the first columns of a row of scores, the case and its patient."""
    return {"case": data.case.key, "patient": data.case.patient}


def fidelity_row(data: CaseData, volume: np.ndarray, *, requested: CaseData, threshold: float) -> dict[str, Any]:
    """Compute the scores of one result, and how closely it follows its tissue map and its growth map.

    Dice compares the tissue map with the labels inferred from the result's intensities, in the healthy part of the
    mask. `response` is the mean intensity inside the growth's contour less that outside it, over the case's scale, in
    the mask's white matter: other tissues have other intensities whether there is a tumour or not.

    Args:
        volume: (x, y, z), a result, or the ground truth.
        requested: the case with the maps that the result is compared with.
        threshold: concentration from which there is tumour.
    """
    row = brats_scores(volume, data.target, data.voided, data.scored, where=data.case.key)
    if requested.tissue is not None:
        growth = np.zeros(data.mask.shape) if requested.growth is None else requested.growth
        healthy = data.scored & (growth < threshold)
        found = tissue_by_intensity(volume, requested.tissue, data.mask)
        row |= {f"dice {name}": value for name, value in tissue_dice(requested.tissue, found, healthy).items()}
    if requested.growth is not None:
        white = data.mask if requested.tissue is None else data.mask & (requested.tissue == WM)
        response = growth_response(volume, requested.growth, white, threshold=threshold)
        row["response"] = response["difference"] / data.scale
    return row


def score_rows(data: CaseData, volumes: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Score volumes on the healthy mask: a row per method, and a row per method and tissue if there is a tissue map."""
    scored_mm3 = float(data.scored.sum()) * float(np.prod(data.source.spacing_mm))
    about = names(data) | {
        "mask_size": mask_size_class(scored_mm3),
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


def boundary_rows(data: CaseData, volumes: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Compute the boundary scores of volumes by method: a row for each."""
    return [
        names(data) | {"method": name} | boundary_scores(volume, data.voided, data.mask, data.scale)
        for name, volume in volumes.items()
    ]


def conditioning_rows(data: CaseData, given: CaseData, results: Path, *, threshold: float) -> list[dict[str, Any]]:
    """Compute `fidelity_row` of a case's results under different conditioning, and of the ground truth.

    `given` is the same case with the maps that came with it: the reference of "given" and of the ground truth.
    """
    volumes = read_variants(results, data)
    volumes |= {"ground truth": data.target} if volumes else {}
    rows = []
    for name, volume in volumes.items():
        requested = given if name in ("given", "ground truth") and given.tissue is not None else data
        row = fidelity_row(data, volume, requested=requested, threshold=threshold)
        rows.append(names(data) | {"conditioning": name} | row)
    return rows


def guidance_rows(data: CaseData, results: Path, *, threshold: float) -> list[dict[str, Any]]:
    """Compute `fidelity_row` of a case's results at each scale of classifier-free guidance."""
    rows = []
    for path in sorted((results / "conditionings").glob(f"guidance_*/{data.case.result_name}")):
        scale = float(path.parent.name.partition("_")[2])
        row = fidelity_row(data, read_image(path).voxels, requested=data, threshold=threshold)
        rows.append(names(data) | {"guidance": scale} | row)
    return rows
