"""The average head that nilearn carries: the MNI152 T1 template, and what tissue each of its voxels is."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from scipy import ndimage

SULCI_MM, DARK, DARK_WIDTH = 3, 0.54, 0.04  # blur that shows sulci; where, and how softly, dark turns to CSF


@dataclass(frozen=True)
class Atlas:
    """A skull-stripped head, x y z towards right, anterior, superior.

    Attributes:
        t1: float32 in [0, 1], 0 outside the brain.
        shares: of CSF, GM and WM, float32 (3, x, y, z), sum 1 in the brain and 0 outside.
        affine: voxel to world (RAS, mm), 4 x 4.
    """

    t1: np.ndarray
    shares: np.ndarray
    affine: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        return self.t1 > 0


@lru_cache(maxsize=1)
def mni152() -> Atlas:
    """The MNI152 head, 197 x 233 x 189 voxels of 1 mm (Fonov et al. 2011, NeuroImage 54:313).

    An average of many heads hides the sulci: the templates know CSF in the ventricles only. What is darker than its
    surroundings is taken for CSF as well.
    """
    templates = load_mni152_template, load_mni152_gm_template, load_mni152_wm_template
    images = [load(resolution=1) for load in templates]
    t1, gm, wm = (image.get_fdata(dtype=np.float32) for image in images)
    brain = t1 > 0
    weight = ndimage.gaussian_filter(brain.astype(np.float32), SULCI_MM) + 1e-6
    sharp = t1 + (t1 - ndimage.gaussian_filter(t1, SULCI_MM) / weight)
    dark = 1 / (1 + np.exp((sharp - DARK) / DARK_WIDTH))
    tissue = np.minimum(gm + wm, 1 - dark) / np.maximum(gm + wm, 1e-6) * brain
    gm, wm = gm * tissue, wm * tissue
    return Atlas(t1, np.stack([brain - gm - wm, gm, wm]), images[0].affine)
