"""Load the MNI152 head that nilearn carries: a T1 template and the tissue fractions of each of its voxels."""

from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
import torch

from ldm_lib.anatomy.initial_estimate import TRUNCATE, gaussian_blur
from ldm_lib.files import package_file
from ldm_lib.geometry import bounding_box

TEMPLATE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
SULCI_MM = 3  # standard deviation of the blur that is subtracted to show sulci
DARK, DARK_WIDTH = 0.54, 0.04  # intensity below which a voxel is CSF, and the width of that transition


@dataclass(frozen=True)
class Atlas:
    """Hold a skull-stripped head, (x, y, z) towards right, anterior, superior."""

    t1: np.ndarray  # float32 in [0, 1], 0 outside the brain
    fractions: np.ndarray  # CSF, GM and WM, float32 (3, x, y, z), with sum 1 in the brain and 0 outside
    affine: np.ndarray  # voxel to world (RAS, mm), 4 x 4

    @property
    def brain(self) -> np.ndarray:
        return self.t1 > 0


@lru_cache(maxsize=1)
def mni152() -> Atlas:
    """Return the MNI152 head, 197 x 233 x 189 voxels of 1 mm (Fonov et al. 2011, NeuroImage 54:313).

    Sulci are blurred in an average of many heads, so the templates contain CSF in the ventricles only. Voxels that are
    darker than their surroundings are therefore counted as CSF as well.
    """
    names = [TEMPLATE.format(part) for part in ("t1", "gm", "wm")]
    images = [nib.Nifti1Image.from_filename(package_file("nilearn", "datasets", "data", name)) for name in names]
    volumes = [np.ascontiguousarray(image.dataobj) for image in images]  # bytes, which are fast to reorder
    box = bounding_box(volumes[0] > 0, round(TRUNCATE * SULCI_MM))
    t1, gm, wm = (volume[box] / np.float32(volume.max()) for volume in volumes)
    brain = t1 > 0
    both = torch.from_numpy(np.stack([t1, brain.astype(np.float32)]))[None]
    mean, weight = gaussian_blur(both, SULCI_MM)[0].numpy()
    sharp = t1 + (t1 - mean / (weight + 1e-6))
    dark = 1 / (1 + np.exp((sharp - DARK) / DARK_WIDTH))
    tissue = np.minimum(gm + wm, 1 - dark) / np.maximum(gm + wm, 1e-6) * brain
    gm, wm = gm * tissue, wm * tissue
    maps = np.zeros((4, *volumes[0].shape), np.float32)
    for map_, inside in zip(maps, (t1, brain - gm - wm, gm, wm), strict=True):
        map_[box] = inside
    return Atlas(maps[0], maps[1:], images[0].affine)
