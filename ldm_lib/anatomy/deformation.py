"""Deform an atlas to a scan that is voided under a mask: the smooth map that maximises local correlation.

The map is composed of small steps along the gradient of the squared correlation of the voxels around each voxel, as in
greedy SyN (Avants et al. 2008, Med Image Anal 12:26), in windows that are Gaussians. The sums of a window run over
visible voxels only, so that the masked region exerts no force. Steps are smooth (a viscous fluid), and so is their
composition (an elastic body): inside the mask the map continues what surrounds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_lib.anatomy.initial_estimate import gaussian_blur

ITERATIONS = (40, 40, 20)  # from coarse to fine
REDUCTIONS = (4, 2, 1)  # voxels of each level along an axis, in voxels of the static image
REDUCTION_BLUR = 0.4  # standard deviation of the blur before a reduction, in voxels of the coarser level
SMALLEST_AXIS = 10  # voxels; a level with fewer is left out
WINDOW_VOX, STEP_BLUR_VOX, MAP_BLUR_VOX = 1.5, 2.0, 0.6  # standard deviations of Gaussians, in voxels of a level
STEP_VOX = 0.5  # longest displacement of the first step of a level
VISIBLE = 0.9  # fraction of a voxel of a level that must be visible
LEAST_FORCE = 0.02  # of the voxel that moves farthest; with less, steps are shorter, as images agree
LEAST_VARIANCE = 1e-5  # of a window; below it there is nothing to correlate


@torch.inference_mode()
def deform(
    static: np.ndarray, mask: np.ndarray, moving: np.ndarray, affine: np.ndarray, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Find the deformation of a moving image that correlates best with a static one.

    Args:
        static: float32 (x, y, z), of about 1 at its brightest.
        mask: (x, y, z) bool, voxels of the static image that are not read.
        moving: float32 (x', y', z').
        affine: (4, 4) from a voxel of the static image to one of the moving image, before any deformation.
        device: where it is computed; the result stays there.

    Raises:
        ValueError: an image of too few voxels.

    Returns:
        float32 (3 x y z), displacements in voxels of the static image, applied before the affine map.
    """
    if min(static.shape) < SMALLEST_AXIS:
        raise ValueError(f"an image of {static.shape} voxels; needed are {SMALLEST_AXIS} along each axis")
    image, hidden, atlas = (torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None].to(device)
                            for volume in (static, mask, moving))  # fmt: skip
    visible, full = 1 - hidden, static.shape
    image = image.where(visible > 0, 0)
    field = torch.zeros(1, 3, *full, device=device)
    for iterations, reduction in zip(ITERATIONS, REDUCTIONS, strict=True):
        shape = [-(-n // reduction) for n in full]
        if reduction > 1 and min(shape) < SMALLEST_AXIS:
            continue
        field = _resized(field, shape)
        seen = _reduced(visible, shape, reduction)
        level = Level(
            torch.where(seen > 0.5, _reduced(image, shape, reduction) / seen.clamp(min=0.5), 0),
            (seen > VISIBLE).float(),
            gaussian_blur(atlas, REDUCTION_BLUR * reduction * (reduction > 1)),
            affine @ np.diag([*[(n - 1) / (m - 1) for n, m in zip(full, shape, strict=True)], 1]),
        )
        for k in range(iterations):
            field = level.improved(field, STEP_VOX * (1 - k / iterations))  # shorter and shorter, so that it converges
    return _resized(field, full)[0]


@dataclass(frozen=True)
class Level:
    """Improve a displacement field (1 3 x y z) at one resolution."""

    static: Tensor  # (1 1 x y z)
    weight: Tensor  # (1 1 x y z), 1 where the static image is visible and 0 elsewhere
    moving: Tensor  # (1 1 x' y' z'), blurred as the static image is
    affine: np.ndarray  # voxel of the static image to one of the moving image

    @cached_property
    def _positions(self) -> Tensor:
        return voxels(self.static.shape[2:]).to(self.static)

    @cached_property
    def _static_sums(self) -> Tensor:
        """Weight, image and squared image, summed over each voxel's window: (1 3 x y z)."""
        products = torch.cat([torch.ones_like(self.static), self.static, self.static**2], dim=1)
        return gaussian_blur(products * self.weight, WINDOW_VOX)

    def improved(self, field: Tensor, longest_vox: float) -> Tensor:
        """Take one step of a given longest displacement."""
        warped = interpolate(self.moving, self._positions + field[0], self.affine)
        gradient = torch.cat([_central_difference(warped, axis) for axis in (2, 3, 4)], dim=1)
        force = self.correlation_slope(warped) * gradient
        step = gaussian_blur(force, STEP_BLUR_VOX)
        step = step * (longest_vox / step.square().sum(1).max().sqrt().clamp(min=LEAST_FORCE))
        composed = step + interpolate(field, self._positions + step[0], outside="border")
        return gaussian_blur(composed, MAP_BLUR_VOX)

    def correlation_slope(self, warped: Tensor) -> Tensor:
        """Differentiate the squared correlation in each voxel's window by the warped image's value in that voxel.

        Voxels of weight 0 enter no window.

        Args:
            warped: (1 1 x y z), the moving image on the grid of the static one.

        Returns:
            (1 1 x y z), in units of the weight that a window gives to its centre; 0 where the weight is 0.
        """
        products = torch.cat([warped, warped**2, self.static * warped], dim=1)
        total = self._static_sums[:, :1].clamp(min=1e-3)
        s, ss = (self._static_sums[:, 1:] / total).split(1, dim=1)
        m, mm, sm = (gaussian_blur(products * self.weight, WINDOW_VOX) / total).split(1, dim=1)
        static_variance, moving_variance, covariance = ss - s**2, mm - m**2, sm - s * m
        usable = (static_variance > LEAST_VARIANCE) & (moving_variance > LEAST_VARIANCE) & (self.weight > 0)
        both = static_variance.clamp(min=LEAST_VARIANCE) * moving_variance.clamp(min=LEAST_VARIANCE)
        fitted = covariance / moving_variance.clamp(min=LEAST_VARIANCE) * (warped - m)
        return torch.where(usable, 2 * covariance / both * (self.static - s - fitted), 0)


def _reduced(volume: Tensor, shape: Sequence[int], reduction: int) -> Tensor:
    if reduction == 1:
        return volume
    return F.interpolate(gaussian_blur(volume, REDUCTION_BLUR * reduction), shape, mode="trilinear", align_corners=True)


def _resized(field: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample displacements to another grid over the same region, in its voxels."""
    factors = [(n - 1) / (m - 1) for n, m in zip(shape, field.shape[2:], strict=True)]
    resized = F.interpolate(field, list(shape), mode="trilinear", align_corners=True)
    return resized * torch.tensor(factors, device=field.device).view(1, 3, 1, 1, 1)


def voxels(shape: Sequence[int], start: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Return the positions of all voxels of a grid, or of a box of this shape that begins at `start`: (3 x y z)."""
    axes = [torch.arange(n, dtype=torch.float32) + first for n, first in zip(shape, start, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def transformed(positions: Tensor, matrix: np.ndarray) -> Tensor:
    """Apply an affine map (4, 4) to positions (3 x y z)."""
    turn, shift = (torch.from_numpy(part).to(positions) for part in (matrix[:3, :3], matrix[:3, 3:]))
    return torch.addmm(shift, turn, positions.flatten(1)).view_as(positions)


def interpolate(
    volumes: Tensor, positions: Tensor, matrix: np.ndarray | None = None, *, outside: str = "zeros"
) -> Tensor:
    """Interpolate volumes (1 c x y z) linearly at positions (3 x' y' z'): (1 c x' y' z').

    Args:
        matrix: affine map (4, 4) from positions to voxels of the volumes; None is the identity.
        outside: "zeros", or "border": the nearest voxel's value.
    """
    # `grid_sample` counts from -1 to 1, and z y x
    scale = np.diag([*(2 / max(n - 1, 1) for n in volumes.shape[2:]), 1.0])
    scale[:3, 3] = -1
    rows = (scale if matrix is None else scale @ matrix)[2::-1].copy()
    turn, shift = (torch.from_numpy(part).to(positions) for part in (rows[:, :3].T, rows[:, 3]))
    grid, n = torch.addmm(shift, positions.flatten(1).T, turn), positions[0].numel()
    # in 3D, `grid_sample` takes a thread for each item of a batch, so that the positions are made a batch
    parts = torch.get_num_threads() if volumes.device.type == "cpu" else 1
    grid = F.pad(grid, (0, 0, 0, -n % parts)).view(parts, 1, 1, -1, 3)
    found = F.grid_sample(volumes.expand(parts, -1, -1, -1, -1), grid, align_corners=True, padding_mode=outside)
    return found.transpose(0, 1).flatten(1)[:, :n].view(1, volumes.shape[1], *positions.shape[1:])


def _central_difference(volume: Tensor, axis: int) -> Tensor:
    """Return the slope along an axis, 0 at both ends."""
    inner = (volume.narrow(axis, 2, volume.shape[axis] - 2) - volume.narrow(axis, 0, volume.shape[axis] - 2)) / 2
    padding = [0] * 6
    padding[2 * (4 - axis)] = padding[2 * (4 - axis) + 1] = 1
    return F.pad(inner, padding)
