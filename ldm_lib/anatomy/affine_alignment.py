"""Align a head to a patient by the mutual information of their intensities (Mattes et al. 2003, IEEE TMI 22:120).

The patient's intensities are counted in bins, those of the head, interpolated linearly, by cubic B-splines, so that the
information has a gradient. It is maximised by L-BFGS: six parameters first, then twelve.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage, optimize
from torch import Tensor

from ldm_lib.anatomy.deformation import interpolate

BINS = 32  # of each image
ENDS = 2  # bins on either side for the ends of the splines
ALL_BINS = BINS + 2 * ENDS
ITERATIONS, TOLERANCE = 200, 1e-5  # of L-BFGS; a thousandth of it takes three times the steps and finds no more
RADIUS_MM = 60.0  # of a brain: parameters that turn or stretch move its surface by as many mm as those that shift
RIM = 2  # voxels of air around a brain, which show where it ends

MaskedImage = tuple[np.ndarray, np.ndarray, np.ndarray]  # image and mask (x, y, z), affine to the world (RAS, mm)


@dataclass(frozen=True)
class _Pair:
    """Hold what the information is computed from: visible voxels of the patient, and the head."""

    bins: Tensor  # (n,) of the patient's voxels
    places: Tensor  # (3, n) mm, relative to `centre`
    centre: np.ndarray  # (4, 4) shift to the middle of the voxels
    head: Tensor  # (1 2 x y z): intensities, and 1 in the brain and its rim
    head_affine: np.ndarray

    @classmethod
    def of(cls, static: MaskedImage, moving: MaskedImage) -> "_Pair":
        (image, mask, affine), (head, _, head_affine) = static, moving
        near, head_near = (ndimage.binary_dilation(volume > 0, iterations=RIM) for volume in (image, head))
        voxels = np.argwhere(near & ~mask)
        if len(voxels) < BINS:
            raise ValueError(f"{len(voxels)} visible voxels of {np.linalg.norm(affine[:3, 0]):.0f} mm")
        world = affine[:3, :3] @ voxels.T + affine[:3, 3:]
        centre = np.eye(4)
        centre[:3, 3] = world.mean(1)
        bins = _scaled(torch.from_numpy(image[tuple(voxels.T)].astype(np.float64))).round().long()
        both = torch.from_numpy(np.stack([head, head_near]).astype(np.float64))[None]
        return cls(bins, torch.from_numpy(world - centre[:3, 3:]), centre, both, head_affine)

    def information(self, matrix: Tensor) -> Tensor:
        """Return the mutual information, in nats, under a map from `places` to the voxels of the head (4, 4)."""
        at = (matrix[:3, :3] @ self.places + matrix[:3, 3:])[:, None, None]
        inside = interpolate(self.head[:, 1:], at.detach())[0, 0, 0, 0] > 0.5
        moved = _scaled(interpolate(self.head[:, :1], at)[0, 0, 0, 0], self.head[0, 0])
        near = moved.detach().floor().long()[:, None] + torch.arange(-1, 3)  # the bins that a spline reaches
        weights = _cubic(moved[:, None] - near) * inside[:, None]
        places = self.bins[:, None] * ALL_BINS + near
        joint = torch.zeros(ALL_BINS**2).double().index_add(0, places.flatten(), weights.flatten())
        joint = joint.view(ALL_BINS, ALL_BINS) / joint.sum().clamp(min=1)
        apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return torch.where(joint > 0, joint * torch.log(joint.clamp(min=1e-30) / apart.clamp(min=1e-30)), 0).sum()

    def cost(self, parameters: np.ndarray, move: Callable, before: Tensor) -> tuple[float, np.ndarray]:
        """Return the negative information of `before @ move(parameters)`, and its gradient."""
        values = torch.from_numpy(parameters).requires_grad_()
        with torch.enable_grad():
            information = self.information(before @ move(values))
        (gradient,) = torch.autograd.grad(-information, values)
        return -float(information.detach()), gradient.numpy()


def aligned(static: MaskedImage, moving: MaskedImage, start: np.ndarray) -> np.ndarray:
    """Return the affine map from patient to head, world to world, of the largest mutual information near a start.

    Args:
        static: image of the patient, 0 in air; masked voxels are not read.
        moving: image of the head, whose mask is not used.
        start: (4, 4), patient to head.

    Raises:
        ValueError: fewer visible voxels than bins.
    """
    pair = _Pair.of(static, moving)
    for move, count in ((_rigid, 6), (_affine, 12)):
        before = torch.from_numpy(np.linalg.inv(pair.head_affine) @ start @ pair.centre)
        options = {"maxiter": ITERATIONS, "ftol": TOLERANCE}
        best = optimize.minimize(pair.cost, np.zeros(count), (move, before), "L-BFGS-B", jac=True, options=options).x
        start = start @ pair.centre @ move(torch.from_numpy(best)).numpy() @ np.linalg.inv(pair.centre)
    return start


def _rigid(parameters: Tensor) -> Tensor:
    """Return the map (4, 4) of a shift in mm and a rotation vector in mm at `RADIUS_MM`."""
    x, y, z = parameters[3:] / RADIUS_MM
    none = torch.zeros_like(x)
    turn = torch.stack([none, -z, y, z, none, -x, -y, x, none]).view(3, 3)
    return _homogeneous(torch.linalg.matrix_exp(turn), parameters[:3])


def _affine(parameters: Tensor) -> Tensor:
    """Return the map (4, 4) of a shift in mm and the nine others in mm at `RADIUS_MM`."""
    return _homogeneous(torch.eye(3).double() + parameters[3:].view(3, 3) / RADIUS_MM, parameters[:3])


def _homogeneous(matrix: Tensor, shift: Tensor) -> Tensor:
    return torch.cat([torch.cat([matrix, shift[:, None]], 1), torch.eye(4)[3:].double()])


def _scaled(values: Tensor, whole: Tensor | None = None) -> Tensor:
    """Return the bins, with fractions, of values between the smallest and the largest of an image."""
    low, high = torch.aminmax(values if whole is None else whole)
    return ENDS + (values - low) / (high - low).clamp(min=1e-12) * (BINS - 1)


def _cubic(distance: Tensor) -> Tensor:
    """Return the cubic B-spline."""
    d = distance.abs()
    return torch.where(d < 1, 2 / 3 - d**2 + d**3 / 2, (2 - d).clamp(min=0) ** 3 / 6)
