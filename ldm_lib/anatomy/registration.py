"""Register the atlas to a patient whose scan is voided under a mask: affine first, then a deformation.

Affine: mutual information on a coarse grid, see `affine_alignment`. Deformation: local correlation, see `deformation`.
Neither reads what is under mask or lesion.
"""

import itertools
import time
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from ldm_lib.anatomy.affine_alignment import MaskedImage, aligned
from ldm_lib.anatomy.atlas import Atlas, mni152
from ldm_lib.anatomy.deformation import deform, interpolate, transformed, voxels
from ldm_lib.errors import InputError
from ldm_lib.geometry import Frame, axis_codes, block_mean, bounding_box, cropped_affine

AFFINE_MM, DEFORMATION_MM = 8.0, 2.0  # voxel size for each step; the affine step at 4 mm takes 6 times as long
AROUND_MM = 10.0  # of the patient's brain, where the atlas is resampled
MARGIN = 5  # around the brain for the deformation, voxels
BRIGHTEST = 1.2  # upper limit of normalised intensities, so that vessels and fat do not dominate the histogram
ORIENTATION_GAIN = 0.05  # of the correlation by which another orientation fits better; right ones lead by 0.03 to 0.2
MIN_DICE, MIN_CORRELATION = 0.9, 0.5  # of the brains, and of the intensities, outside mask and lesion


@dataclass(frozen=True)
class Registration:
    """Hold a map from the atlas to a patient, and measure how well it fits."""

    displacement: torch.Tensor  # (3 x y z), of the voxels of a grid on the patient
    grid: np.ndarray  # (4, 4) from a voxel of that grid to the patient's world (RAS, mm)
    start: np.ndarray  # (4, 4) affine map from the patient's world to the atlas's
    atlas: Atlas
    affine: np.ndarray  # of the patient's grid, voxel to world (RAS, mm)
    image: np.ndarray  # the patient's scan (x, y, z), 0 under the mask
    mask: np.ndarray  # bool (x, y, z), voxels that neither step used
    seconds: float
    better_orientation: str = ""  # why the orientation that the affine states is likely wrong

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Return where the atlas is resampled: the patient's brain with its masked part, and `AROUND_MM`."""
        spacing_mm = np.linalg.norm(self.affine[:3, :3], axis=0)
        return bounding_box((self.image != 0) | self.mask, np.ceil(AROUND_MM / spacing_mm).astype(int))

    def to_patient(self, volumes: np.ndarray) -> np.ndarray:
        """Resample volumes ([c,] x, y, z) on the atlas's grid to the patient's: float32, linear, 0 outside `box`."""
        whole = np.zeros((*volumes.shape[:-3], *self.image.shape), np.float32)
        whole[(..., *self.box)] = self.in_box(volumes)
        return whole

    def in_box(self, volumes: np.ndarray) -> np.ndarray:
        """Resample volumes ([c,] x, y, z) on the atlas's grid to the patient's `box`."""
        stacked = torch.from_numpy(np.ascontiguousarray(volumes, np.float32).reshape(1, -1, *volumes.shape[-3:]))
        resampled = interpolate(stacked.to(self.displacement), self._positions)[0].cpu().numpy()
        return resampled.reshape(*volumes.shape[:-3], *resampled.shape[1:])

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Where the patient's voxels are in the atlas, (3 x y z)."""
        shape, start = self.image[self.box].shape, [side.start for side in self.box]
        on_grid = transformed(voxels(shape, start).to(self.displacement), np.linalg.solve(self.grid, self.affine))
        moved = on_grid + interpolate(self.displacement[None], on_grid, outside="border")[0]
        return transformed(moved, np.linalg.solve(self.atlas.affine, self.start @ self.grid))

    @cached_property
    def brain(self) -> np.ndarray:
        """Brain of the atlas on the patient's grid, bool (x, y, z), False outside `box`."""
        brain = np.zeros(self.image.shape, bool)
        brain[self.box] = self.fractions.sum(0) > 0.5
        return brain

    @cached_property
    def fractions(self) -> np.ndarray:
        """Tissue fractions of the atlas in the patient's `box`, CSF, GM, WM, float32 (3, x, y, z)."""
        return self.in_box(self.atlas.fractions)

    @cached_property
    def brain_dice(self) -> float:
        """Dice overlap of both brains outside the mask."""
        patient, atlas = (brain & ~self.mask for brain in (self.image != 0, self.brain))
        return float(2 * (patient & atlas).sum() / max(patient.sum() + atlas.sum(), 1))

    @cached_property
    def correlation(self) -> float:
        """Pearson correlation of both images where both have brain, outside the mask."""
        both = (self.image != 0) & self.brain & ~self.mask
        if both.sum() < 2:
            return 0.0
        return float(np.corrcoef(self.image[both], self.to_patient(self.atlas.t1)[both])[0, 1])

    def plot_arguments(self) -> dict[str, Any]:
        """Return the arguments of `figures.planes` that show the fit: scan and registered atlas in LPS order, mask."""
        frame = Frame.of(self.affine, self.image.shape, 1)
        spacing_mm = frame.lps_spacing(tuple(np.linalg.norm(self.affine[:3, :3], axis=0)))
        volumes = {"scan": self.image, "registered atlas": self.to_patient(self.atlas.t1)}
        volumes = {name: frame.to_lps(volume) for name, volume in volumes.items()}
        return {"volumes": volumes, "spacing_mm": spacing_mm, "mask": frame.to_lps(self.mask)}

    @property
    def failure(self) -> str:
        """Reason why the registration failed, with the measured numbers; empty if it did not."""
        if self.better_orientation:
            return self.better_orientation
        found = f"brains overlap by Dice {self.brain_dice:.3f} (at least {MIN_DICE:g}), intensities correlate by "
        found += f"{self.correlation:.2f} (at least {MIN_CORRELATION:g})"
        return "" if self.brain_dice >= MIN_DICE and self.correlation >= MIN_CORRELATION else found


def register(
    image: np.ndarray,
    affine: np.ndarray,
    mask: np.ndarray,
    *,
    stated: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Registration:
    """Register the MNI152 head to a skull-stripped T1n.

    Args:
        image: (x, y, z), about 1 at its brightest, 0 outside the brain; voxels under the mask are not read.
        affine: voxel to world (RAS, mm); any voxel order, any voxel size.
        mask: bool (x, y, z), voided voxels, and the lesion if it is known.
        stated: affine that the file states, if the image was reordered; messages name its orientation.
        device: where the deformation is computed.

    Raises:
        InputError: too few voxels to register, or images that do not overlap.
    """
    started = time.monotonic()
    atlas = mni152()
    # one memory layout, because sums over the same voxels are rounded differently in another
    mask = np.ascontiguousarray(mask)
    image = np.ascontiguousarray(np.where(mask, 0, np.clip(image, 0, BRIGHTEST)), np.float32)
    try:
        head = atlas.t1, np.zeros(atlas.t1.shape, bool), atlas.affine
        coarse = _downsampled(image, mask, affine, AFFINE_MM), _downsampled(*head, AFFINE_MM)
        better = _better_orientation(*coarse, stated=affine if stated is None else stated)
        start = _affine(*coarse)
        patient, hidden, grid = _cropped(*_downsampled(image, mask, affine, DEFORMATION_MM))
        moving, _, moving_affine = _downsampled(*head, DEFORMATION_MM)
        displacement = deform(patient, hidden, moving, np.linalg.solve(moving_affine, start @ grid), device=device)
    except ValueError as error:
        raise InputError(f"the atlas cannot be registered to it ({error})", where="registration",
                         fix="check that it is a skull-stripped brain, and its orientation") from error  # fmt: skip
    seconds = time.monotonic() - started
    return Registration(displacement, grid, start, atlas, affine, image, mask, seconds, better)


MIRROR = np.diag([-1.0, 1, 1, 1])  # of left and right


def _better_orientation(static: MaskedImage, moving: MaskedImage, *, stated: np.ndarray) -> str:
    """Say which of the 48 orientations fits the atlas far better than the stated one; empty if none does.

    Brains and their mirror images fit alike. The stated orientation therefore counts with its mirror image, and of two
    others that are mirror images the one with the handedness of the stated one is named.
    """
    (image, mask, affine), (head, _, head_affine) = static, moving
    centre, head_centre = _centre(*static), _centre(*moving)
    atlas, places = torch.from_numpy(np.ascontiguousarray(head, np.float32))[None, None], voxels(image.shape)
    fits = []
    for axes, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1.0, -1.0), repeat=3)):
        turn = np.eye(4)
        turn[:3, :3] = np.eye(3)[list(axes)] * np.array(signs)[:, None]
        turn[:3, 3] = (head_centre - turn @ centre)[:3]
        warped = interpolate(atlas, places, np.linalg.solve(head_affine, turn @ affine))[0, 0].numpy()
        both = ((image > 0) | (warped > 0)) & ~mask
        fits.append((np.corrcoef(image[both], warped[both])[0, 1], turn))
    as_stated = max(fit for fit, turn in fits if turn[1, 1] == turn[2, 2] == 1)  # and its mirror image
    found, best = max(fits, key=itemgetter(0))
    if not found > as_stated + ORIENTATION_GAIN:
        return ""
    if np.linalg.det(best) < 0:
        best = MIRROR @ best
    now, then = (axis_codes(matrix) for matrix in (stated, best @ stated))
    return (f"it fits better as {then} than as stated, {now} (correlation {found:.2f} against {as_stated:.2f}); if a "
            f"viewer shows it turned, correct its header, or read it with --assume-orientation {then}")  # fmt: skip


def _affine(static: MaskedImage, moving: MaskedImage) -> np.ndarray:
    """Return the affine map from patient to atlas, world to world."""
    start = np.eye(4)
    start[:3, 3] = (_centre(*moving) - _centre(*static))[:3]
    return aligned(static, moving, start)


def _centre(image: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the centre (4,) of a brain with its masked part; that of intensities would move with a large mask."""
    return affine @ [*ndimage.center_of_mass((image > 0) | mask), 1]


def _downsampled(image: np.ndarray, mask: np.ndarray, affine: np.ndarray, size_mm: float) -> MaskedImage:
    """Average blocks of voxels to voxels of about `size_mm`; a block with any masked voxel is masked."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0).mean()
    factor = max(1, round(size_mm / spacing_mm))
    padding = [(0, -n % factor) for n in image.shape]
    image, mask = (block_mean(np.pad(volume, padding), factor) for volume in (image, mask))
    centre = affine @ [*[(factor - 1) / 2] * 3, 1]
    coarse = affine @ np.diag([factor, factor, factor, 1.0])
    coarse[:3, 3] = centre[:3]
    return np.where(mask > 0, 0, image), mask > 0, coarse


def _cropped(image: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> MaskedImage:
    """Crop to the brain and a margin, because the deformation is blurred at the border of its grid."""
    box = bounding_box(image != 0, MARGIN)
    return np.ascontiguousarray(image[box]), mask[box], cropped_affine(affine, box)
