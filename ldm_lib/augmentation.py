"""Random changes of a training case, the same for image, masks, growth and tissue.

Flip and rotation move every array by one transform and cut the hole anew out of the moved image, so that its edge is
as sharp as in a file. Gain and gamma change both images alike. The tissue map alone is also deformed, patched out
and relabelled, because a map made from a scan is never exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.conditioning import ModelCase
from ldm_lib.tissue import deform_labels

LEFT_RIGHT = 0  # axis of the LPS grid


@dataclass(frozen=True)
class Augmentation:
    """How far a case may be changed; all zeros change nothing.

    Attributes:
        flip_probability: of mirroring left and right, in [0, 1].
        rotation_degrees: largest rotation about each axis.
        intensity_shift: largest relative change of gain and of gamma.
        tissue_deformation_mm: largest displacement of the tissue map against the image.
    """

    flip_probability: float = 0.0
    rotation_degrees: float = 0.0
    intensity_shift: float = 0.0
    tissue_deformation_mm: float = 0.0

    def __call__(self, case: ModelCase, rng: np.random.Generator, *, spacing_mm: float) -> ModelCase:
        """One random version of a case that has a target."""
        flipped = rng.random() < self.flip_probability
        degrees = rng.uniform(-1, 1, 3) * self.rotation_degrees
        gain, gamma = 1 + rng.uniform(-1, 1, 2) * self.intensity_shift
        if flipped:
            case = flip(case)
        if np.any(degrees):
            case = rotate(case, degrees)
        if self.intensity_shift:
            case = change_intensity(case, gain=gain, gamma=gamma)
        if self.tissue_deformation_mm and case.tissue.any():
            limit = self.tissue_deformation_mm
            tissue = deform_labels(case.tissue, rng, spacing_mm=spacing_mm, max_displacement_mm=limit)
            case = replace(case, tissue=tissue)
        return case


def flip(case: ModelCase) -> ModelCase:
    """Mirror left and right; its own inverse."""
    return _map(case, lambda array, _: np.flip(array, LEFT_RIGHT))


def rotate(case: ModelCase, degrees: np.ndarray) -> ModelCase:
    """Rotate isotropic voxels about the grid's centre by angles (3,) about x, y, z.

    Images are interpolated linearly, labels and masks by nearest neighbour; what comes from outside is air.
    """
    matrix = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    centre = (np.array(case.mask.shape) - 1) / 2
    offset = centre - matrix @ centre

    def turn(array: np.ndarray, order: int) -> np.ndarray:
        turned = ndimage.affine_transform(array.astype(np.float32), matrix, offset, order=order, mode="grid-constant")
        return turned.astype(array.dtype) if array.dtype != bool else turned > 0.5

    return _map(case, turn)


def change_intensity(case: ModelCase, *, gain: float, gamma: float) -> ModelCase:
    """gain * v^gamma on both images; air stays 0."""
    return replace(
        case,
        voided=(gain * case.voided**gamma).astype(np.float32),
        target=(gain * case.target**gamma).astype(np.float32),
    )


def _map(case: ModelCase, change: Callable[[np.ndarray, int], np.ndarray]) -> ModelCase:
    """Change every array of a case, and void the hole; the number is the interpolation order an array bears."""
    linear = {name: change(getattr(case, name), 1) for name in ("target", "growth")}
    nearest = {name: change(getattr(case, name), 0) for name in ("mask", "unknown", "tissue")}
    moved = {name: np.ascontiguousarray(array) for name, array in (linear | nearest).items()}
    return ModelCase(voided=np.where(moved["mask"], np.float32(0), moved["target"]), **moved)
