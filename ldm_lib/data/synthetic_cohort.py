"""Make a synthetic cohort: brains deformed from the MNI152 templates, each with a tumour grown in its own tissue.

Everything random is drawn in millimetres from (seed, patient): a patient is the same at any voxel size, up to sampling.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.anatomy.mri_simulation import RANDOMISATIONS, simulate_scan
from ldm_lib.anatomy.synthetic_brain import brats_grid, make_brain
from ldm_lib.anatomy.synthetic_tumour import from_growth_grid, synthetic_tumour
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD
from ldm_lib.data.layouts import CONDITIONING_FOLDERS, DEFAULT_CONDITIONING
from ldm_lib.data.mask_synthesis import UNHEALTHY_MARGIN_MM, dilate_mm, healthy_mask, void
from ldm_lib.errors import ConfigError
from ldm_lib.images.volume import write_map
from ldm_lib.options import nearest
from ldm_lib.process_control import parallel_map

# Disjoint ranges: no training patient is used in a demo or for testing.
TRAINING_PATIENTS = range(0, 8000)  # split into training and validation by patient
DEMO_PATIENTS = range(8000, 9000)
TEST_PATIENTS = range(9000, 10000)

ANATOMY, TUMOUR, CONTRAST, NOISE, MASKS, DONORS = range(6)  # streams of random numbers; each donor takes two
DEFORMATION, REGISTRATION = 1000, 1001  # beyond all donors
PATIENT_PARAMETERS = ("masks", "deformation", "domain_randomisation", "tissue_map")  # of `make_patient`, for a cohort


@dataclass(frozen=True)
class SyntheticPatient:
    """Hold one synthetic patient; all volumes (x, y, z) on one grid, axes towards left, posterior, superior."""

    t1n: np.ndarray  # int16, above 0 in the brain and exactly 0 outside
    tissue: np.ndarray  # uint8, 0 background, 1 CSF, 2 GM, 3 WM: the healthy brain, also beneath the tumour
    growth: np.ndarray  # float32 tumour cell concentration in [0, 1]
    segmentation: np.ndarray  # bool, the visible tumour, where growth is at least 0.2
    masks: tuple[tuple[np.ndarray, np.ndarray], ...]  # pairs of healthy and unhealthy mask, bool
    affine: np.ndarray  # voxel to world (RAS, mm), 4 x 4


def make_patient(
    seed: int,
    patient: int,
    *,
    spacing_mm: float = 1.0,
    masks: int = 3,
    deformation: float = 1.0,
    domain_randomisation: str = "narrow",
    tissue_map: str = "exact",
) -> SyntheticPatient:
    """Make one patient: a function of (seed, patient), with the same anatomy at any voxel size.

    Args:
        seed, patient: numbers of cohort and patient, 0 or more; see TRAINING_PATIENTS and its neighbours.
        spacing_mm: isotropic voxel size; 1 is the BraTS grid 240 x 240 x 155.
        masks: number of pairs of masks.
        deformation: scale of the atlas's deformation; from about 2 on it folds tissue.
        domain_randomisation: "narrow" or "wide" ranges of `mri_simulation`.
        tissue_map: "exact", or "registered": with simulated registration error.

    Raises:
        ConfigError: a number is out of range, or a word is unknown.
        InputError: there is no place for a healthy mask.
    """
    if min(seed, patient, masks, deformation) < 0 or not 0.5 <= spacing_mm <= 12:
        given = f"seed {seed}, patient {patient}, masks {masks}, spacing_mm {spacing_mm:g}, deformation {deformation:g}"
        raise ConfigError(f"{given} given; allowed are 0 or more, and 0.5 to 12 mm", where="make_patient")
    if domain_randomisation not in RANDOMISATIONS or tissue_map not in ("exact", "registered"):
        given = f"domain_randomisation {domain_randomisation!r}, tissue_map {tissue_map!r} given; allowed are "
        raise ConfigError(f"{given}{', '.join(RANDOMISATIONS)}; exact, registered", where="make_patient")
    grid, rng, ranges = brats_grid(spacing_mm), partial(stream_of, seed, patient), RANDOMISATIONS[domain_randomisation]
    deformation *= rng(DEFORMATION).uniform(*ranges.deformation)
    brain = make_brain(rng(ANATOMY), grid, deformation)
    growth = from_growth_grid(synthetic_tumour(rng(ANATOMY), rng(TUMOUR), deformation), grid) * brain.inside
    segmentation = growth >= GROWTH_THRESHOLD
    unhealthy = dilate_mm(segmentation, UNHEALTHY_MARGIN_MM, spacing_mm)
    pairs, places, options = [], rng(MASKS), {"spacing_mm": spacing_mm, "scale": ranges.mask_scale}
    for k in range(DONORS, DONORS + 2 * masks, 2):  # a donor is a patient of no cohort
        donor = from_growth_grid(synthetic_tumour(rng(k), rng(k + 1), deformation), grid) >= GROWTH_THRESHOLD
        pairs.append((healthy_mask(brain.inside, unhealthy, donor, places, **options), unhealthy))
    t1n = simulate_scan(brain, growth, grid, ranges, rng(CONTRAST), rng(NOISE))
    if tissue_map == "registered":
        brain = make_brain(rng(ANATOMY), grid, deformation, registration_rng=rng(REGISTRATION))
    return SyntheticPatient(t1n, brain.labels, growth, segmentation, tuple(pairs), grid.affine)


def stream_of(seed: int, patient: int, stream: int) -> np.random.Generator:
    """Return one stream of random numbers of one patient."""
    return np.random.default_rng([seed, patient, stream])


def write_patient(folder: str | Path, seed: int, patient: int, **patient_kwargs: Any) -> str:
    """Make one patient (`make_patient`), write it below `folder` in the training layout and return its id.

    Files are `data/<ID>/<ID>-t1n.nii.gz` and, for each mask k, `-t1n-voided-000k`, `-mask-000k`, `-mask-healthy-000k`,
    `-mask-unhealthy-000k`; `conditioning_data/{growth_model,tissue_segmentation}/<ID>.nii.gz`. On one
    machine the bytes are always the same; another processor may round a few voxels differently. The t1n is written
    last: a patient that has one is complete, and is not made again, even with other parameters.
    """
    case = f"Synthetic_{patient:05d}"
    if (Path(folder) / "data" / case / f"{case}-t1n.nii.gz").exists():
        return case
    write_training_files(folder, case, make_patient(seed, patient, **patient_kwargs))
    return case


def write_training_files(folder: str | Path, case: str, made: SyntheticPatient) -> list[Path]:
    """Write a patient below `folder` in the training layout, the t1n last, and return the files."""
    data, conditioning, volumes = Path(folder) / "data" / case, Path(folder) / DEFAULT_CONDITIONING, {}
    for k, (healthy, unhealthy) in enumerate(made.masks):
        masks = {"mask": healthy | unhealthy, "mask-healthy": healthy, "mask-unhealthy": unhealthy}
        roles = {"t1n-voided": void(made.t1n, masks["mask"])} | {n: m.astype(np.uint8) for n, m in masks.items()}
        volumes |= {data / f"{case}-{role}-{k:04d}.nii.gz": volume for role, volume in roles.items()}
    for kind, name in CONDITIONING_FOLDERS.items():
        volumes[conditioning / name / f"{case}.nii.gz"] = getattr(made, kind)
    volumes[data / f"{case}-t1n.nii.gz"] = made.t1n
    for path, volume in volumes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_map(path, volume, made.affine)
    return list(volumes)


def make_synthetic_cohort(
    folder: str | Path,
    n_patients: int = 4,
    *,
    first: int = DEMO_PATIENTS.start,
    seed: int = 0,
    spacing_mm: float = 4.0,
    workers: int = 1,
    **patient_kwargs: Any,
) -> list[str]:
    """Write a cohort of synthetic patients and return their ids.

    The cases are in `<folder>/data`, their growth and tissue maps in `<folder>/conditioning_data`. A patient that is
    already there is not made again.

    Args:
        first: number of the first patient; see TRAINING_PATIENTS, DEMO_PATIENTS and TEST_PATIENTS.
        spacing_mm: isotropic voxel size; 1 is the BraTS grid of 240 x 240 x 155 voxels.
        workers: processes that make the patients; 1 makes them in this process. The files do not depend on it.
        patient_kwargs: `masks`, `deformation`, `domain_randomisation` and `tissue_map` of `make_patient`.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     make_synthetic_cohort(folder, 2, spacing_mm=8, masks=1)
        ['Synthetic_08000', 'Synthetic_08001']
    """
    if min(n_patients, workers) < 1:
        given = f"n_patients {n_patients}, workers {workers} given; allowed are 1 or more of each"
        raise ConfigError(given, where="make_synthetic_cohort")
    if unknown := [name for name in patient_kwargs if name not in PATIENT_PARAMETERS]:
        fix = nearest(unknown[0], PATIENT_PARAMETERS, f"allowed are {', '.join(PATIENT_PARAMETERS)}")
        raise ConfigError(f"unknown parameter {unknown[0]!r}", where="make_synthetic_cohort", fix=fix)
    make = partial(write_patient, folder, seed, spacing_mm=spacing_mm, **patient_kwargs)
    return list(parallel_map(make, range(first, first + n_patients), workers))
