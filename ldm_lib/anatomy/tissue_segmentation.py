"""Tissue of a scan with a hole: the patient's own intensities where something was seen, the atlas where nothing was."""

import warnings
from dataclasses import dataclass

import numpy as np
from dipy.segment.tissue import TissueClassifierHMRF
from scipy import ndimage

from ldm_lib.anatomy.registration import Registration, register
from ldm_lib.anatomy.tissue import CSF, TISSUES
from ldm_lib.errors import ConfigError

REFINEMENTS = ("mixture", "hmrf", "none")
LEAST_SHARE = 0.02  # of every tissue everywhere: the atlas is never quite sure
SMOOTHNESS = 0.1  # weight of the neighbours in the Markov random field
ITERATIONS = 10  # of expectation and maximisation; ten more change 1 to 5 % of the voxels and take as long again
FAINTEST = 0.01  # of the intensity scale: brain is told from air by this
AROUND_MM = 20.0  # of the hole: there its shares are weighted by what is seen
WEIGHT_ITERATIONS = 30
AIR_NOISE = 3e-3  # a background of one value has no variance, and all labels would be NaN


@dataclass(frozen=True)
class TissueMap:
    """Labels (x, y, z) uint8: 0 none, 1 CSF, 2 GM, 3 WM; and the registration that the hole's come from."""

    labels: np.ndarray
    registration: Registration


def tissue_from_scan(
    image: np.ndarray,
    affine: np.ndarray,
    hole: np.ndarray,
    *,
    lesion: np.ndarray | None = None,
    refine: str = "mixture",
) -> TissueMap:
    """Segment a skull-stripped T1n whose hole is not looked at.

    The atlas's shares of tissue are carried to the patient linearly, and the largest is the label: 1 to 2 points of
    Dice better than labels carried by nearest neighbour. What is seen is labelled by its own intensities instead, and
    the shares in the hole are weighted so that they would give the tissues seen around it.

    Args:
        image: (x, y, z), about 1 at its brightest, 0 outside the brain.
        affine: voxel to world (RAS, mm), any order and size of voxels.
        hole: bool (x, y, z).
        lesion: what is no healthy tissue although it is seen, bool (x, y, z); labelled from the atlas like the hole.
        refine: how intensities decide: "mixture" (`by_mixture`), "hmrf" (`segment`), or "none", the atlas alone.

    Raises:
        ConfigError: another `refine`.
        InputError: it cannot be registered. A registration that failed is returned, with its `flaw`.
    """
    if refine not in REFINEMENTS:
        raise ConfigError(f"{refine!r} given, allowed are {', '.join(REFINEMENTS)}", where="refine")
    unseen = hole if lesion is None else hole | lesion
    found = register(image, affine, unseen)
    shares = found.carry(found.atlas.shares)
    seen = (image != 0) & ~unseen
    brain = seen | (unseen & found.brain)
    if found.flaw or refine == "none":
        return TissueMap(_largest(shares, brain), found)
    visible = np.where(seen, image, 0)
    by_intensity = segment(visible) if refine == "hmrf" else by_mixture(visible, shares)
    distance_mm = ndimage.distance_transform_edt(~unseen, sampling=np.linalg.norm(affine[:3, :3], axis=0))
    around = seen & found.brain & (distance_mm <= AROUND_MM)
    shares *= class_weights(shares[:, around], by_intensity[around]).reshape(3, 1, 1, 1)
    return TissueMap(np.where(seen, by_intensity, _largest(shares, brain)), found)


def by_mixture(image: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """CSF, GM and WM by intensity and place: labels (x, y, z) uint8, 0 where the image is 0.

    A mixture of one normal distribution a tissue, whose proportions in a voxel are the atlas's shares there, fitted by
    expectation and maximisation (Ashburner & Friston 1997, NeuroImage 6:209). Place keeps apart what a scan of little
    contrast shows alike, such as ventricles and cortex.

    Args:
        image: skull-stripped T1n (x, y, z).
        shares: of CSF, GM and WM, (3, x, y, z), as the registered atlas has them.
    """
    seen = image != 0
    values, prior = image[seen].astype(np.float64), shares[:, seen].astype(np.float64) + LEAST_SHARE
    prior /= prior.sum(0)
    belief = prior
    for _ in range(ITERATIONS):
        weight = belief.sum(1)
        mean = belief @ values / weight
        variance = np.maximum((belief * (values - mean[:, None]) ** 2).sum(1) / weight, 1e-9)
        misfit = (values - mean[:, None]) ** 2 / variance[:, None] + np.log(variance[:, None])
        belief = prior * np.exp(-(misfit - misfit.min(0)) / 2)
        belief /= belief.sum(0)
    labels = np.zeros(image.shape, np.uint8)
    labels[seen] = CSF + belief.argmax(0)
    return labels


def class_weights(shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Factors (3,) on shares (3, n) with which their largest gives each class as often as labels (n,) have it.

    An atlas and a patient's intensities draw the borders between tissues differently; how, is learnt where both are
    known. Fewer than 100 voxels teach nothing: all factors are then 1.
    """
    weights = np.ones(3)
    if labels.size < 100:
        return weights
    wanted = np.bincount(labels, minlength=4)[1:] / labels.size
    for _ in range(WEIGHT_ITERATIONS):
        given = np.bincount((shares * weights[:, None]).argmax(0), minlength=3) / labels.size
        weights *= np.sqrt(np.maximum(wanted, 1e-3) / np.maximum(given, 1e-3))
    return weights / weights.max()


def _largest(shares: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The tissue with the largest share; CSF where the atlas has none but there is brain."""
    return np.where(brain, np.where(shares.any(0), CSF + shares.argmax(0), CSF), 0).astype(np.uint8)


def segment(image: np.ndarray) -> np.ndarray:
    """CSF, GM and WM of a skull-stripped T1n by its intensities: labels (x, y, z) uint8, 0 where the image is 0.

    Hidden Markov random field (Zhang et al. 2001, IEEE TMI 20:45), three classes beside the air, sorted by intensity.
    """
    seen = image != 0
    box = ndimage.find_objects(seen.astype(np.uint8))[0]  # else air outweighs all tissues
    brain, scale = seen[box], float(np.percentile(image[seen], 99.5))
    noise = np.random.default_rng(0).normal(0, AIR_NOISE, brain.shape)
    scaled = np.where(brain, np.clip(image[box] / scale, FAINTEST, 1), noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of logarithms of 0, which dipy means
        _, classes, _ = TissueClassifierHMRF(verbose=False).classify(
            scaled.astype(np.float64), len(TISSUES), SMOOTHNESS, max_iter=ITERATIONS
        )
    labels = np.zeros(image.shape, np.uint8)
    labels[box] = np.where(brain, np.maximum(classes, CSF), 0)  # what is as dark as air is CSF
    return labels
