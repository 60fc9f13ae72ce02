"""Make a training patient of a healthy person's scan: on the BraTS grid, with a tumour grown in this tissue, and masks.

scan => register the atlas => turn and move to the BraTS grid => segment => grow a tumour in this tissue, draw it
     => place healthy masks => register the atlas again, without any masked voxel => tissue map for conditioning
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.mri_simulation import draw_tumour
from ldm_lib.anatomy.registration import Registration, register
from ldm_lib.anatomy.synthetic_brain import EXTENT_MM, Grid, as_volume
from ldm_lib.anatomy.synthetic_tumour import from_growth_grid, grow_in_brain, synthetic_tumour, to_growth_grid
from ldm_lib.anatomy.tissue import CSF, GM, WM, smooth_field
from ldm_lib.anatomy.tissue_segmentation import mixture_labels, tissue_from_scan
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD
from ldm_lib.data.alignment import Alignment, align
from ldm_lib.data.mask_synthesis import UNHEALTHY_MARGIN_MM, dilate_mm, healthy_mask, void
from ldm_lib.data.synthetic_cohort import CONTRAST, DONORS, MASKS, TUMOUR, SyntheticPatient, stream_of
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box, cropped_affine
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.volume import LARGEST_BRAIN_L, intensity_scale, read_image

MASK_ML = (10.0, 120.0)  # volume of a healthy mask, drawn log-uniformly
DONORS_PER_MASK = 12  # shapes and sizes that are tried before placing a mask fails
SMALLEST_BRAIN_L = 0.6
MOST_NEGATIVE = 0.05  # fraction of the voxels that are not 0
MOST_CUT_CM2 = 15.0  # brain on the faces of the scan's grid; a brain stem has about 10
MOST_OUTSIDE = 0.01  # fraction of the brain outside the BraTS grid
MARGIN = 6  # voxels around the brain that are kept of a scan
BRIGHT = 1000.0  # intensity that the 99.5th percentile of a scan becomes
STRIP = "strip the skull, for example with SynthStrip or HD-BET"


@dataclass(frozen=True)
class Head:
    """Hold a skull-stripped scan, cropped to the brain."""

    image: np.ndarray  # float32 (x, y, z), source units, above 0 in the brain and 0 outside
    affine: np.ndarray  # voxel to world (RAS, mm), 4 x 4
    facts: dict[str, Any]  # what a table shows of the scan

    def register(self) -> Registration:
        """Register the atlas to the whole scan."""
        nothing = np.zeros(self.image.shape, bool)
        return register(self.image / intensity_scale(self.image, nothing), self.affine, nothing)


def read_head(path: Path, read_options: ReadOptions = READ_STRICTLY) -> Head:
    """Read a skull-stripped scan: its largest connected part above 0; further parts are left by the strip.

    Raises:
        InputError: the file is rejected, or it does not hold a whole skull-stripped brain; with the numbers.
    """
    volume = read_image(path, read_options)
    voxels, sizes = volume.voxels, np.array(volume.spacing_mm)
    voxel_l, visible = float(np.prod(sizes)) / 1e6, np.count_nonzero(voxels)
    if (litres := visible * voxel_l) > LARGEST_BRAIN_L:
        raise InputError(f"not skull-stripped: {litres:.2f} litres are not 0, a brain has at most {LARGEST_BRAIN_L:g}",
                         where=path, fix=STRIP)  # fmt: skip
    if (negative := np.count_nonzero(voxels < 0) / visible) > MOST_NEGATIVE:
        cause = f"{negative:.0%} of the voxels that are not 0 are negative, at most {MOST_NEGATIVE:.0%} are read as 0"
        raise InputError(cause, where=path, fix="give intensities above 0 in the brain, and 0 outside")
    parts, _ = ndimage.label(voxels > 0)
    brain = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    if (litres := np.count_nonzero(brain) * voxel_l) < SMALLEST_BRAIN_L:
        raise InputError(f"{litres:.2f} litres of brain, expected at least {SMALLEST_BRAIN_L:g}", where=path,
                         fix="check the skull-stripping and the voxel size")  # fmt: skip
    extent = "x".join(f"{mm:.0f}" for mm in sizes * volume.shape)
    faces = (np.take(brain, (0, -1), axis).sum() * np.prod(sizes) / sizes[axis] for axis in range(3))
    if (cut := sum(faces) / 100) > MOST_CUT_CM2:
        cause = f"the field of view of {extent} mm is too small: {cut:.0f} cm2 of the brain lie on its faces"
        raise InputError(f"{cause}, at most {MOST_CUT_CM2:g} are a brain stem", where=path, fix="give the whole brain")
    box = bounding_box(brain, MARGIN)
    facts = {"spacing_mm": "x".join(f"{mm:.3g}" for mm in sizes), "orientation": volume.orientation}
    return Head(
        np.where(brain, voxels, 0)[box], cropped_affine(volume.affine, box), facts | {"brain_ml": round(litres * 1000)}
    )


def align_head(head: Head, registration: Registration, grid: Grid, *, where: Path) -> Alignment:
    """Bring a scan to the BraTS grid.

    Raises:
        InputError: the registration failed, or the grid cuts the brain off; with the numbers.
    """
    if registration.failure:
        raise InputError(f"the atlas does not fit: {registration.failure}", where=where,
                         fix=f"see the picture; check its orientation, or {STRIP}")  # fmt: skip
    aligned = align(head.image, registration, grid)
    if aligned.outside > MOST_OUTSIDE:
        cause = f"the grid of 240x240x155 mm cuts the brain: {aligned.outside:.1%} of it lie outside"
        fix = "see the picture; remove what is not brain"
        raise InputError(f"{cause}, at most {MOST_OUTSIDE:.0%} may", where=where, fix=fix)
    return aligned


def make_person(
    aligned: Alignment, identity: str, grid: Grid, *, seed: int, masks: int
) -> tuple[SyntheticPatient, Registration]:
    """Make a training patient of a person, and register the atlas without the voxels under all the masks.

    Everything random is drawn from (seed, identity). The tissue map is made by this registration, from what is visible
    outside all masks alone.

    Raises:
        InputError: there is no place for a tumour or a healthy mask, or the second registration failed.
    """
    rng = partial(stream_of, seed, int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big"))
    t1n = aligned.image * (BRIGHT / intensity_scale(aligned.image, np.zeros(grid.shape, bool)))
    inside = t1n > 0
    labels = mixture_labels(t1n, aligned.registration.to_patient(aligned.registration.atlas.fractions))
    brain = to_growth_grid(inside, grid) >= 0.5
    grey, white = (to_growth_grid(labels == tissue, grid) for tissue in (GM, WM))
    grown = grow_in_brain(brain, grey, white, rng(TUMOUR))
    growth = from_growth_grid(grown, grid) * inside
    segmentation = growth >= GROWTH_THRESHOLD
    unhealthy = dilate_mm(segmentation, UNHEALTHY_MARGIN_MM, grid.spacing_mm)
    healthy = _healthy_masks(inside, unhealthy, grid, rng, masks)
    t1n = _with_tumour(t1n, labels, growth, grid, rng(CONTRAST))
    hidden = np.any([unhealthy, *healthy], axis=0)
    voided = void(t1n, hidden)
    map_ = tissue_from_scan(voided / intensity_scale(voided, hidden), grid.affine, hidden, refine="none")
    if failure := map_.registration.failure:
        raise InputError(f"the atlas does not fit without the voxels under the masks: {failure}", where=identity,
                         fix="see the picture; take fewer masks")  # fmt: skip
    pairs = tuple((mask, unhealthy) for mask in healthy)
    return SyntheticPatient(t1n, map_.labels, growth, segmentation, pairs, grid.affine), map_.registration


def _with_tumour(
    t1n: np.ndarray, labels: np.ndarray, growth: np.ndarray, grid: Grid, rng: np.random.Generator
) -> np.ndarray:
    """Draw a tumour into a scan, relative to the mean intensities of the person's own tissues: int16."""
    inside = labels > 0
    csf, gm, wm = (float(t1n[labels == tissue].mean()) for tissue in (CSF, GM, WM))
    texture = smooth_field(rng, grid.positions_mm, 2.5, EXTENT_MM)[inside]
    values = draw_tumour(t1n[inside] / wm, growth[inside], texture, csf / wm, gm / wm, rng) * wm
    return as_volume(inside, np.clip(np.rint(values), 1, 32000), np.int16)


def _healthy_masks(
    brain: np.ndarray, unhealthy: np.ndarray, grid: Grid, rng: partial[np.random.Generator], masks: int
) -> list[np.ndarray]:
    """Place masks whose volumes are log-uniform in MASK_ML, in the shape of tumours of patients of no cohort."""
    places, found, voxel_ml = rng(MASKS), [], grid.spacing_mm**3 / 1000
    low, high = MASK_ML
    for donor in range(DONORS, DONORS + 2 * DONORS_PER_MASK * masks, 2):
        shape = from_growth_grid(synthetic_tumour(rng(donor), rng(donor + 1), 1.0), grid) >= GROWTH_THRESHOLD
        target_ml = np.exp(places.uniform(np.log(low), np.log(high)))
        scale = float(np.cbrt(target_ml / max(shape.sum() * voxel_ml, voxel_ml)))
        try:
            mask = healthy_mask(brain, unhealthy, shape, places, spacing_mm=grid.spacing_mm, scale=(scale, scale))
        except InputError:  # too large for this brain: the next donor has another shape and size
            continue
        if low <= mask.sum() * voxel_ml <= high:
            found.append(mask)
        if len(found) == masks:
            return found
    raise InputError(f"{len(found)} of {masks} healthy masks of {low:g} to {high:g} mL have a place", where="masks",
                     fix="take fewer masks")  # fmt: skip
