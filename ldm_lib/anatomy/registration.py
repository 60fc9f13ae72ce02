"""The atlas brought to a patient whose scan has a hole: affine first, then SyN, and neither looks into the hole.

Affine: mutual information on a coarse grid, hole and lesion masked out (Mattes et al. 2003, IEEE TMI 22:120). SyN: the
diffeomorphism that makes patches of both images correlate (Avants et al. 2008, Med Image Anal 12:26). SyN knows no
masks, so in every iteration the hole is filled from the atlas as it lies now, and pulls at nothing.
"""

import logging
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from dipy.align.imaffine import AffineRegistration, MutualInformationMetric, transform_centers_of_mass
from dipy.align.imwarp import DiffeomorphicMap, SymmetricDiffeomorphicRegistration
from dipy.align.metrics import CCMetric
from dipy.align.transforms import AffineTransform3D, RigidTransform3D
from scipy import ndimage

from ldm_lib.anatomy.atlas import Atlas, mni152
from ldm_lib.errors import InputError
from ldm_lib.geometry import Frame, block_mean

AFFINE_MM, SYN_MM = 8.0, 2.0  # voxels are merged to about this size; an affine map found at 4 mm takes 6 times as long
SYN_ITERATIONS = (40, 40, 20)  # from coarse to fine
AFFINE_ITERATIONS = 200
CC_RADIUS = 4  # voxels, of the patches that correlate
SMALLEST_AXIS = 2 * CC_RADIUS + 2  # at the coarsest level of SyN
RING = 6  # voxels around the hole whose contrast the filling takes on
BRIGHTEST = 1.2  # of the intensity scale: vessels and fat must not set the histogram
LEAST_DICE, LEAST_CORRELATION = 0.9, 0.5  # of the brains; of the intensities, outside hole and lesion

logging.getLogger("dipy").setLevel(logging.WARNING)  # it tells of every level of every registration


@dataclass(frozen=True)
class Registration:
    """Where in the atlas every voxel of a patient lies, and how well that fits.

    Attributes:
        mapping: dipy's, from the atlas to the patient.
        atlas: what was brought.
        affine: of the patient's grid, voxel to world (RAS, mm).
        image: the scan it was brought to, (x, y, z), 0 in the hole.
        hole: what neither step looked at, bool (x, y, z).
        seconds: what it took.
    """

    mapping: DiffeomorphicMap
    atlas: Atlas
    affine: np.ndarray
    image: np.ndarray
    hole: np.ndarray
    seconds: float

    def carry(self, volume: np.ndarray) -> np.ndarray:
        """A volume on the atlas's grid, or several (..., x, y, z), on the patient's; float32, linear, outside 0."""
        if volume.ndim > 3:
            return np.stack([self.carry(part) for part in volume])
        return self.mapping.transform(
            np.asarray(volume, np.float32),
            interpolation="linear",
            image_world2grid=np.linalg.inv(self.atlas.affine),
            out_shape=self.image.shape,
            out_grid2world=self.affine,
        )

    @cached_property
    def brain(self) -> np.ndarray:
        """The atlas's brain on the patient's grid, bool (x, y, z)."""
        return self.carry(self.atlas.brain) > 0.5

    @cached_property
    def brain_dice(self) -> float:
        """Dice overlap of both brains outside the hole."""
        ours, theirs = (brain & ~self.hole for brain in (self.image != 0, self.brain))
        return float(2 * (ours & theirs).sum() / max(ours.sum() + theirs.sum(), 1))

    @cached_property
    def correlation(self) -> float:
        """Pearson correlation of both images where both have brain, outside the hole."""
        both = (self.image != 0) & self.brain & ~self.hole
        if both.sum() < 2:
            return 0.0
        return float(np.corrcoef(self.image[both], self.carry(self.atlas.t1)[both])[0, 1])

    def shown(self) -> dict[str, Any]:
        """What `figures.planes` needs to show whether it fits: scan and atlas in LPS order, the hole outlined."""
        frame = Frame.of(self.affine, self.image.shape, 1)
        spacing_mm = frame.lps_spacing(tuple(np.linalg.norm(self.affine[:3, :3], axis=0)))
        views = {"scan": self.image, "atlas, as brought to it": self.carry(self.atlas.t1)}
        turned = {name: frame.to_lps(view) for name, view in views.items()}
        return {"volumes": turned, "spacing_mm": spacing_mm, "mask": frame.to_lps(self.hole)}

    @property
    def flaw(self) -> str:
        """Why the result cannot be used, with the numbers; empty if it can."""
        found = f"brains overlap by Dice {self.brain_dice:.3f} (at least {LEAST_DICE:g}), intensities correlate by "
        found += f"{self.correlation:.2f} (at least {LEAST_CORRELATION:g})"
        return "" if self.brain_dice >= LEAST_DICE and self.correlation >= LEAST_CORRELATION else found


def register(image: np.ndarray, affine: np.ndarray, hole: np.ndarray) -> Registration:
    """Bring the MNI152 head to a skull-stripped T1n.

    Args:
        image: (x, y, z), about 1 at its brightest, 0 outside the brain; what it holds under `hole` is not looked at.
        affine: voxel to world (RAS, mm); any voxel order, any voxel size.
        hole: bool (x, y, z), what is void, and the lesion if it is known.

    Raises:
        InputError: too few voxels to register, or images that do not overlap.
    """
    started = time.monotonic()
    atlas = mni152()
    # one layout in memory, or sums are rounded otherwise for the same voxels
    hole = np.ascontiguousarray(hole)
    image = np.ascontiguousarray(np.where(hole, 0, np.clip(image, 0, BRIGHTEST)), np.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dipy's of its own future
            start = _affine(_shrunk(image, hole, affine, AFFINE_MM), _shrunk_atlas(atlas, AFFINE_MM))
            mapping = _syn(_boxed(*_shrunk(image, hole, affine, SYN_MM)), _shrunk_atlas(atlas, SYN_MM), start)
    except ValueError as error:
        raise InputError(f"the atlas cannot be brought to it ({error})", where="registration",
                         fix="check that it is a skull-stripped brain, and its orientation") from error  # fmt: skip
    return Registration(mapping, atlas, affine, image, hole, time.monotonic() - started)


Grid = tuple[np.ndarray, np.ndarray, np.ndarray]  # image and hole (x, y, z), affine


def _affine(static: Grid, moving: Grid) -> np.ndarray:
    """World to world, patient to atlas: centres of mass, then rigid, then all twelve parameters."""
    (image, hole, affine), (head, _, head_affine) = static, moving
    step = AffineRegistration(
        metric=MutualInformationMetric(), level_iters=[AFFINE_ITERATIONS], sigmas=[0], factors=[1], verbosity=0
    )
    # a rim of air tells where the brain ends; dipy takes masks of whole numbers only
    masks = {"static_mask": _with_rim(image) & ~hole, "moving_mask": _with_rim(head)}
    where = {"static_grid2world": affine, "moving_grid2world": head_affine}
    where |= {name: mask.astype(np.int32) for name, mask in masks.items()}
    found = transform_centers_of_mass(image, affine, head, head_affine).affine
    for transform in (RigidTransform3D(), AffineTransform3D()):
        found = step.optimize(image, head, transform, None, starting_affine=found, **where).affine
    return found


def _syn(static: Grid, moving: Grid, start: np.ndarray) -> DiffeomorphicMap:
    (image, hole, affine), (head, _, head_affine) = static, moving
    levels = 1 + int(np.log2(max(min(image.shape) / SMALLEST_AXIS, 1)))
    step = SymmetricDiffeomorphicRegistration(
        HoledCorrelation(hole.astype(np.float32)), level_iters=list(SYN_ITERATIONS[-levels:])
    )
    return step.optimize(image, head, static_grid2world=affine, moving_grid2world=head_affine, prealign=start)


class HoledCorrelation(CCMetric):
    """Local cross-correlation in which the hole of the static image pulls at nothing.

    A patch beside the hole would see a black wall there. So the hole is filled first with what the moving image has
    there now, in the contrast of the static one around it.
    """

    def __init__(self, hole: np.ndarray) -> None:
        super().__init__(3, radius=CC_RADIUS)
        self.hole, self._warped = hole, hole > 0

    def use_static_image_dynamics(self, _: np.ndarray, transformation: DiffeomorphicMap) -> None:
        """Move the hole as dipy has just moved the static image."""
        shape, affine = self.static_image.shape, self.static_affine
        moved = transformation.transform(self.hole, interpolation="linear", out_shape=shape, out_grid2world=affine)
        self._warped = moved > 0.01

    def initialize_iteration(self) -> None:
        """Fill the hole, compute the factors of the correlation, and set them to 0 in the hole."""
        fixed, moving = np.array(self.static_image), np.asarray(self.moving_image)
        ring = ndimage.binary_dilation(self._warped, iterations=RING) & ~self._warped & (fixed > 0) & (moving > 0)
        if ring.sum() > 1:
            gain = fixed[ring].std() / max(moving[ring].std(), 1e-6)
            fixed[self._warped] = fixed[ring].mean() + gain * (moving[self._warped] - moving[ring].mean())
        self.static_image = fixed
        super().initialize_iteration()
        self.factors[self._warped] = 0


def _with_rim(image: np.ndarray) -> np.ndarray:
    return ndimage.binary_dilation(image > 0, iterations=2)


def _shrunk(image: np.ndarray, hole: np.ndarray, affine: np.ndarray, size_mm: float) -> Grid:
    """Blocks of voxels merged to voxels of about `size_mm`; a block with any voxel of the hole is hole."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0).mean()
    factor = max(1, round(size_mm / spacing_mm))
    padding = [(0, -n % factor) for n in image.shape]
    image, hole = (block_mean(np.pad(volume, padding), factor) for volume in (image, hole))
    centre = affine @ [*[(factor - 1) / 2] * 3, 1]
    coarse = affine @ np.diag([factor, factor, factor, 1.0])
    coarse[:3, 3] = centre[:3]
    return np.where(hole > 0, 0, image), hole > 0, coarse


def _shrunk_atlas(atlas: Atlas, size_mm: float) -> Grid:
    return _shrunk(atlas.t1, np.zeros(atlas.t1.shape, bool), atlas.affine, size_mm)


def _boxed(image: np.ndarray, hole: np.ndarray, affine: np.ndarray, margin_vox: int = 5) -> Grid:
    """Cut to the brain and a margin, where the field is not yet held still."""
    spans = [np.flatnonzero(image.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(max(found[0] - margin_vox, 0), found[-1] + margin_vox + 1) for found in spans)
    moved = affine.copy()
    moved[:3, 3] = (affine @ [*(s.start for s in box), 1])[:3]
    return np.ascontiguousarray(image[box]), hole[box], moved
