"""Hold a training scan in few bytes: what fresh samples of it are drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ldm_lib.anatomy.contralateral import midsagittal_reflection
from ldm_lib.anatomy.initial_estimate import SURFACE_MM
from ldm_lib.anatomy.tissue import TISSUES, WM
from ldm_lib.anatomy.tissue_segmentation import mixture_labels
from ldm_lib.data.case import CaseData
from ldm_lib.diffusion.latents import CPU, LatentSpec
from ldm_lib.geometry import bounding_box
from ldm_lib.images.bias_field import bias_field
from ldm_lib.images.volume import normalise

TISSUE_BITS, BRAIN, NEAR, UNHEALTHY, FIRST_HEALTHY = 3, 4, 8, 16, 5  # of `Scan.codes`; the last is a bit's number
MOST_MASKS = 10  # bits of int16 that are left
CENTRES = 2000  # voxels of each mask that may become the centre of a box


@dataclass(frozen=True)
class Scan:
    """Hold what samples of a scan are drawn from; volumes (x y z) in LPS order, cropped to the brain."""

    image: Tensor  # float16, normalised
    codes: Tensor  # int16: tissue label, brain, near tissue, unhealthy, and a bit for each healthy mask
    growth: Tensor  # uint8, 255 is a concentration of 1
    means: tuple[float, float, float]  # intensities of CSF, GM, WM
    centres: tuple[np.ndarray, ...]  # positions (n, 3) in each healthy mask
    reflection: np.ndarray | None = None  # across the mid-sagittal plane, voxel to voxel (4, 4)

    @classmethod
    def of(cls, cases: Sequence[CaseData], spec: LatentSpec, device: torch.device = CPU) -> "Scan":
        """Build it on a device from all cases of a scan, which differ in the healthy mask.

        Args:
            spec: with `contralateral` the mid-sagittal plane is found, for which voxels must be isotropic; with
                `bias_field_correction` the image is divided by its bias field.
        """
        first = cases[0]
        image = first.lps(normalise(first.target, first.scale))
        healthy = [case.lps(case.scored) for case in cases]
        nothing = np.zeros(image.shape, np.uint8)
        tissue = nothing if first.tissue is None else first.lps(first.tissue)
        unhealthy = nothing > 0 if first.unhealthy is None else first.lps(first.unhealthy)
        box = bounding_box(np.any([image > 0, tissue > 0, *healthy], axis=0), 2)
        image, tissue, unhealthy = image[box], tissue[box], unhealthy[box]
        if spec.bias_field_correction:
            white = (tissue == WM) & ~unhealthy
            image = image / bias_field(image, white, spacing_mm=first.lps_spacing_mm)
        distance_mm = ndimage.distance_transform_edt(tissue == 0, sampling=first.lps_spacing_mm)
        codes = tissue + BRAIN * (image > 0) + NEAR * (distance_mm <= SURFACE_MM) + UNHEALTHY * unhealthy
        codes = codes.astype(np.int16)
        centres = []
        for k, mask in enumerate(healthy):
            codes |= (mask[box].astype(np.int16)) << (FIRST_HEALTHY + k)
            voxels = np.argwhere(mask[box])
            centres.append(voxels[:: max(1, len(voxels) // CENTRES)])
        growth = nothing if first.growth is None else first.lps(first.growth)
        grown = np.rint(growth[box] * 255).astype(np.uint8)
        half, coded, grown = (torch.from_numpy(each).to(device) for each in (image.astype(np.float16), codes, grown))
        found = None
        if spec.contralateral:
            found = midsagittal_reflection(image, np.zeros(image.shape, bool), spacing_mm=first.lps_spacing_mm[0])
        return cls(half, coded, grown, _tissue_means(image, tissue), tuple(centres), found)


def _tissue_means(image: np.ndarray, tissue: np.ndarray) -> tuple[float, float, float]:
    """Return the mean intensities of CSF, GM and WM, increasing, by a mixture that starts from the tissue map."""
    every = (slice(None, None, 2),) * 3
    image, tissue = image[every], tissue[every]
    fractions = np.stack([ndimage.gaussian_filter((tissue == label).astype(np.float32), 1) for label in TISSUES])
    labels = mixture_labels(image, fractions)
    means = [float(image[labels == label].mean()) if (labels == label).any() else 0.0 for label in TISSUES]
    csf = max(means[0], 0.05)
    gm = max(means[1], csf + 0.05)
    return csf, gm, max(means[2], gm + 0.05)
