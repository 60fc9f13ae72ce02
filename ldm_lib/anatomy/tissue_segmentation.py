"""Segment the tissue of a voided scan: by its own intensities where it is visible, by a registered atlas elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from ldm_lib.anatomy.registration import Registration, register
from ldm_lib.anatomy.tissue import CSF, GM, WM
from ldm_lib.errors import ConfigError
from ldm_lib.geometry import Frame, bounding_box

REFINEMENTS = ("mixture", "none")
MIN_FRACTION = 0.02  # of every tissue in every voxel: the atlas is never certain
ITERATIONS = 10  # of expectation maximisation; ten more change 1 to 5 % of the voxels and take as long again
AROUND_MM = 20.0  # distance from the mask within which visible voxels set the weights of the tissues
WEIGHT_ITERATIONS = 30
MIN_VOXELS = 100  # with fewer around the mask all weights are 1


@dataclass(frozen=True)
class TissueMap:
    """Hold labels (x, y, z) uint8, 0 none, 1 CSF, 2 GM, 3 WM, and the atlas's registration to the scan in LPS order."""

    labels: np.ndarray
    registration: Registration


def tissue_from_scan(
    image: np.ndarray,
    affine: np.ndarray,
    mask: np.ndarray,
    *,
    lesion: np.ndarray | None = None,
    refine: str = "mixture",
    device: torch.device | str = "cpu",
) -> TissueMap:
    """Segment a skull-stripped T1n without reading the voxels under its mask; a registration may have a `failure`.

    The tissue fractions of the atlas are resampled to the patient linearly, and the largest gives the label; this has 1
    to 2 points of Dice more than labels resampled by nearest neighbour. Visible voxels are labelled by their own
    intensities instead, and the fractions under the mask are weighted such that they would reproduce the labels around
    it.

    Args:
        image, affine: as in `registration.register`.
        mask: bool (x, y, z), voxels to inpaint.
        lesion: bool (x, y, z), visible but abnormal tissue; labelled from the atlas like the mask.
        refine: label visible voxels by "mixture" (`mixture_labels`) or "none", the atlas alone.
        device: where the registration is computed.

    Raises:
        InputError: the scan cannot be registered at all.
    """
    if refine not in REFINEMENTS:
        removed = " ('hmrf' was removed in version 0.8)" if refine == "hmrf" else ""
        raise ConfigError(f"{refine!r} given, allowed are {', '.join(REFINEMENTS)}{removed}", where="refine")
    frame = Frame.of(affine, image.shape, 1)  # sums over the same voxels are rounded differently in another order
    stated, affine = affine, frame.lps_affine(affine, image.shape)
    image, mask = frame.to_lps(image), frame.to_lps(mask)
    hidden = mask if lesion is None else mask | frame.to_lps(lesion)
    registration = register(image, affine, hidden, stated=stated, device=device)
    labels = np.zeros(image.shape, np.uint8)
    labels[registration.box] = _labels_in_box(registration, image[registration.box], hidden[registration.box], refine)
    return TissueMap(frame.to_file(labels), registration)


def _labels_in_box(registration: Registration, image: np.ndarray, hidden: np.ndarray, refine: str) -> np.ndarray:
    """Label the registration's box."""
    fractions = registration.fractions
    visible = (image != 0) & ~hidden
    atlas_brain = registration.brain[registration.box]
    brain = visible | (hidden & atlas_brain)
    if registration.failure or refine == "none":
        return _largest(fractions, brain)
    by_intensity = mixture_labels(np.where(visible, image, 0), fractions)
    spacing_mm = np.linalg.norm(registration.affine[:3, :3], axis=0)
    distance_mm = ndimage.distance_transform_edt(~hidden, sampling=spacing_mm)
    around = visible & atlas_brain & (distance_mm <= AROUND_MM)
    fractions = fractions * tissue_weights(fractions[:, around], by_intensity[around]).reshape(3, 1, 1, 1)
    return np.where(visible, by_intensity, _largest(fractions, brain))


def mixture_labels(image: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Label CSF, GM and WM by intensity and position: (x, y, z) uint8, 0 where the image is 0.

    A mixture of one normal distribution per tissue, whose proportions in a voxel are the atlas's fractions there, is
    fitted by expectation maximisation (Ashburner & Friston 1997, NeuroImage 6:209). The position separates what has the
    same intensity, such as ventricles and cortex in a scan of low contrast. The fractions are CSF, GM, WM (3, x, y, z).
    """
    visible = image != 0
    values, prior = image[visible].astype(np.float64), fractions[:, visible].astype(np.float64) + MIN_FRACTION
    prior /= prior.sum(0)
    posterior = prior
    for _ in range(ITERATIONS):
        weight = posterior.sum(1)
        mean = posterior @ values / weight
        variance = np.maximum((posterior * (values - mean[:, None]) ** 2).sum(1) / weight, 1e-9)
        misfit = (values - mean[:, None]) ** 2 / variance[:, None] + np.log(variance[:, None])
        posterior = prior * np.exp(-(misfit - misfit.min(0)) / 2)
        posterior /= posterior.sum(0)
    labels = np.zeros(image.shape, np.uint8)
    labels[visible] = CSF + posterior.argmax(0)
    return labels


def tissue_weights(fractions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return factors (3,) on fractions (3, n) with which the largest gives each tissue as often as labels (n,) have it.

    An atlas and a patient's intensities draw the borders between tissues differently; the difference is estimated
    where both are known.
    """
    weights = np.ones(3)
    if labels.size < MIN_VOXELS:
        return weights
    target = np.bincount(labels, minlength=4)[1:] / labels.size
    for _ in range(WEIGHT_ITERATIONS):
        found = np.bincount((fractions * weights[:, None]).argmax(0), minlength=3) / labels.size
        weights *= np.sqrt(np.maximum(target, 1e-3) / np.maximum(found, 1e-3))
    return weights / weights.max()


def nearest_tissue(image: np.ndarray, labels: np.ndarray, mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Label the voxels of a mask by the tissue whose mean intensity around the mask is nearest; return all labels.

    The means are those of at least 100 labelled voxels within 20 mm of the mask, else of all labelled voxels outside
    it. Voxels of the mask that are 0 have no label. Labels outside the mask are returned as they are.

    Args:
        image: (x, y, z), known outside the mask and filled inside it.
        labels: (x, y, z), 0 none, 1 CSF, 2 GM, 3 WM; those under the mask are not read.
        mask: bool (x, y, z).
        spacing_mm: of the voxels along each axis.
    """
    known, box = ~mask, bounding_box(mask, math.ceil(AROUND_MM / min(spacing_mm)))
    near = np.zeros_like(mask)
    near[box] = known[box] & (ndimage.distance_transform_edt(known[box], sampling=spacing_mm) <= AROUND_MM)
    means = {}
    for tissue in (CSF, GM, WM):
        voxels = (labels == tissue) & known
        around = voxels & near
        if voxels.any():
            means[tissue] = image[around if np.count_nonzero(around) >= MIN_VOXELS else voxels].mean(dtype=np.float64)
    filled, inside = labels.copy(), image[mask]
    distances = np.abs(inside - np.array([*means.values()])[:, None])
    filled[mask] = np.where(inside == 0, 0, np.array([*means])[distances.argmin(0)]) if means else 0
    return filled


def _largest(fractions: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Return the tissue with the largest fraction, or CSF where there is brain but the atlas has none."""
    return np.where(brain, np.where(fractions.any(0), CSF + fractions.argmax(0), CSF), 0).astype(np.uint8)
