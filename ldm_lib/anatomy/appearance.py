"""Change the appearance of T1n scans at random within the family of T1-weighted sequences, in torch and in batches.

v' = gamma(noise(gain * blur(remap(v))))     remap: piecewise linear through air, CSF, GM and WM of the scan

The ranges reach from MPRAGE to 2D spin echo: its grey-white contrast is a third, and its slices are up to 5 mm thick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ldm_lib.anatomy.initial_estimate import gaussian_blur
from ldm_lib.anatomy.tissue import cubic_weights, spline_coefficients

Range = tuple[float, float]
LEAST_CONTRAST = 0.1  # between CSF and GM
LEAST = 1e-3  # intensity in the brain; air alone is 0
GREY_NODE_MM, GAIN_NODE_MM = 30.0, 60.0  # nodes of the fields of grey matter's brightness and of the gain


@dataclass(frozen=True)
class AppearanceRanges:
    """Hold the ranges that the properties of a scan are drawn from, uniformly; intensities are relative to WM."""

    own_contrast: float = 0.25  # probability of keeping the contrast of the scan
    csf: Range = (0.10, 0.50)
    gm: Range = (0.55, 0.92)
    grey_field: Range = (0.0, 0.05)  # sd of the brightness of grey matter from place to place, as of its deep nuclei
    thin: float = 0.4  # probability of isotropic resolution
    in_plane_mm: Range = (0.0, 0.9)  # sd of the point spread function in the slices, and everywhere in thin ones
    thick_mm: Range = (0.3, 2.2)  # sd of the point spread function through the slices otherwise; 2.2 is 5 mm at half
    gain: Range = (0.0, 0.12)  # sd of the logarithm of the gain field
    noise: Range = (0.0, 0.035)  # sd of each part of the complex noise
    gamma: Range = (0.8, 1.25)


RANGES = AppearanceRanges()


@dataclass(frozen=True)
class Appearance:
    """Hold the drawn properties of one scan."""

    csf: float | None  # None keeps the contrast
    gm: float
    grey_field: np.ndarray  # spline coefficients
    in_plane_mm: float
    thick_mm: float  # 0 in a scan of isotropic resolution
    axis: int  # through the slices
    gain: np.ndarray  # spline coefficients of the logarithm
    noise: float
    gamma: float

    @classmethod
    def draw(
        cls, rng: np.random.Generator, extent_mm: Sequence[float], ranges: AppearanceRanges = RANGES
    ) -> "Appearance":
        """Draw the properties of a scan whose box has these edges."""
        kept = rng.random() < ranges.own_contrast
        csf, gm = rng.uniform(*ranges.csf), rng.uniform(*ranges.gm)
        grey_field = rng.uniform(*ranges.grey_field) * spline_coefficients(rng, extent_mm, GREY_NODE_MM)
        in_plane_mm = rng.uniform(*ranges.in_plane_mm)
        thick_mm = 0.0 if rng.random() < ranges.thin else rng.uniform(*ranges.thick_mm)
        gain = _draw_gain(rng, extent_mm, ranges)
        return cls(
            csf=None if kept else min(csf, gm - LEAST_CONTRAST), gm=gm, grey_field=grey_field,
            in_plane_mm=in_plane_mm, thick_mm=thick_mm, axis=int(rng.integers(3)), gain=gain,
            noise=rng.uniform(*ranges.noise), gamma=rng.uniform(*ranges.gamma),
        )  # fmt: skip

    def with_other_gain(
        self, rng: np.random.Generator, extent_mm: Sequence[float], ranges: AppearanceRanges = RANGES
    ) -> "Appearance":
        """Draw the gain of another place in the same scan."""
        return replace(self, gain=_draw_gain(rng, extent_mm, ranges))


def _draw_gain(rng: np.random.Generator, extent_mm: Sequence[float], ranges: AppearanceRanges) -> np.ndarray:
    return rng.uniform(*ranges.gain) * spline_coefficients(rng, extent_mm, GAIN_NODE_MM)


def change_appearance(
    image: Tensor, brain: Tensor, own: Sequence[Sequence[float]], drawn: Sequence[Appearance], *,
    spacing_mm: float, noise: Tensor,
) -> Tensor:  # fmt: skip
    """Give images other appearances; the result is 0 outside the brain, and white matter is about 1.

    Args:
        image: (b 1 x y z), 0 in air.
        brain: (b 1 x y z) bool.
        own: mean intensities of CSF, GM and WM of each image.
        drawn: the appearance of each image.
        spacing_mm: edge of an isotropic voxel.
        noise: (b 2 x y z) of standard deviation 1.
    """
    parts = zip(image.split(1), brain.split(1), own, drawn, strict=True)
    values = torch.cat([_noiseless(*part, spacing_mm) for part in parts])
    sd, gamma = (torch.tensor([[[[[getattr(look, name)]]]] for look in drawn]).to(image) for name in ("noise", "gamma"))
    values = torch.hypot(values + sd * noise[:, :1], sd * noise[:, 1:])
    return values.clamp(min=LEAST) ** gamma * brain


def _noiseless(image: Tensor, brain: Tensor, own: Sequence[float], look: Appearance, spacing_mm: float) -> Tensor:
    """Change the contrast, the resolution and the gain of one image (1 1 x y z)."""
    values = _blurred(_remapped(image, own, look, spacing_mm), brain, look, spacing_mm)
    return values * _field(look.gain, values, spacing_mm, GAIN_NODE_MM).exp()


def _blurred(values: Tensor, brain: Tensor, look: Appearance, spacing_mm: float) -> Tensor:
    """Blur an image (1 1 x y z) by its point spread function, without the air."""
    through = max(look.thick_mm, look.in_plane_mm)
    sigma = [(through if axis == look.axis else look.in_plane_mm) / spacing_mm for axis in range(3)]
    if not any(sigma):
        return values
    both = gaussian_blur(torch.cat([values * brain, brain.float()], dim=1), sigma)
    return both[:, :1] / both[:, 1:].clamp(min=LEAST)


def _remapped(image: Tensor, own: Sequence[float], look: Appearance, spacing_mm: float) -> Tensor:
    """Map the intensities 0, CSF, GM, WM of an image (1 1 x y z) to new ones linearly in between, and go on beyond."""
    if look.csf is None:
        return image / own[2]
    grey = look.gm + _field(look.grey_field, image, spacing_mm, GREY_NODE_MM)
    csf, gm, wm = own
    below = image.clamp(max=csf) * (look.csf / csf)
    middle = (image - csf).clamp(0, gm - csf) * ((grey - look.csf) / (gm - csf))
    upper = (image - gm).clamp(0, wm - gm) * ((1 - grey) / (wm - gm))
    return below + middle + upper + (image - wm).clamp(min=0) / wm


def _field(spline: np.ndarray, like: Tensor, spacing_mm: float, node_mm: float) -> Tensor:
    return expand(torch.from_numpy(spline).to(like)[None, None], like.shape[2:], spacing_mm, node_mm)


def expand(spline: Tensor, shape: Sequence[int], spacing_mm: float, node_mm: float) -> Tensor:
    """Evaluate cubic B-splines at voxels: coefficients (b c i j k) -> (b c x y z)."""
    for axis, size in zip((2, 3, 4), shape, strict=True):
        matrix = torch.from_numpy(cubic_weights(np.arange(size) * spacing_mm / node_mm, spline.shape[axis])).to(spline)
        spline = torch.tensordot(spline, matrix, dims=([axis], [1])).movedim(-1, axis)
    return spline
