"""Simulate the T1n scan of a synthetic brain and its tumour: contrast, texture, resolution, bias field and noise."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.synthetic_brain import EXTENT_MM, Brain, Grid, as_volume
from ldm_lib.anatomy.tissue import smooth_field
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD

IN_PLANE_MM = 0.4  # standard deviation of the point spread function in the slices
Range = tuple[float, float]


@dataclass(frozen=True)
class DomainRandomisation:
    """Hold the ranges that the properties of a patient are drawn from, uniformly; sd is standard deviation."""

    csf: Range = (0.12, 0.30)  # mean intensity, relative to that of white matter
    gm: Range = (0.60, 0.74)  # mean intensity, relative to that of white matter
    detail: Range = (0.6, 1.2)  # factor on the residual of the atlas's T1 that its tissues do not explain
    texture: Range = (0.015, 0.035)  # relative sd of 2.5 mm texture
    thick_mm: Range = (0.4, 1.4)  # sd of the point spread function through the slices
    bias: Range = (0.03, 0.12)  # sd of the logarithm of the bias field
    noise: Range = (0.008, 0.035)  # sd of each part of the complex noise, for voxels of 1 mm or less
    gamma: Range = (1.0, 1.0)  # exponent of a final change of contrast
    deformation: Range = (1.0, 1.0)  # factor on the deformation of the atlas
    mask_scale: Range = (0.6, 1.1)  # factor on the diameter of the tumours whose shapes become healthy masks


# "wide" covers the scanners, brains and masks of BraTS, whose masks have 14 to 79 mL.
RANDOMISATIONS = {
    "narrow": DomainRandomisation(),
    "wide": DomainRandomisation(
        csf=(0.10, 0.40), gm=(0.52, 0.82), detail=(0.4, 1.4), texture=(0.01, 0.05), thick_mm=(0.4, 1.6),
        bias=(0.03, 0.15), noise=(0.008, 0.05), gamma=(0.8, 1.3), deformation=(0.8, 1.7), mask_scale=(0.7, 1.9),
    ),
}  # fmt: skip


def simulate_scan(
    brain: Brain,
    growth: np.ndarray,
    grid: Grid,
    domain_randomisation: DomainRandomisation,
    rng: np.random.Generator,
    noise_rng: np.random.Generator,
) -> np.ndarray:
    """Simulate the T1n scan of a brain with a tumour: int16 (x, y, z), background 0.

    Args:
        brain: tissue fractions on the grid.
        growth: tumour cell concentration (x, y, z) in [0, 1].
        grid: of the scan.
        domain_randomisation: ranges of the scan's properties.
        rng: draws the properties, texture and bias field, which do not depend on the voxel size.
        noise_rng: draws the noise of each voxel.
    """
    inside = brain.inside
    csf, gm = rng.uniform(*domain_randomisation.csf), rng.uniform(*domain_randomisation.gm)
    values = np.array([csf, gm, 1.0]) @ brain.fractions + rng.uniform(*domain_randomisation.detail) * brain.detail
    texture = smooth_field(rng, grid.positions_mm, 2.5, EXTENT_MM)[inside]
    values *= 1 + rng.uniform(*domain_randomisation.texture) * texture
    values = _blurred(values, inside, rng.uniform(*domain_randomisation.thick_mm), int(rng.integers(3)), grid)
    values = draw_tumour(values, growth[inside], texture, csf, gm, rng)
    bias = smooth_field(rng, grid.positions_mm, 90, EXTENT_MM)[inside]
    values *= np.exp(rng.uniform(*domain_randomisation.bias) * bias)
    sd = rng.uniform(*domain_randomisation.noise) / max(1.0, grid.spacing_mm) ** 1.5
    real, imaginary = noise_rng.standard_normal((2, values.size), dtype=np.float32) * sd
    values = np.hypot(values + real, imaginary)
    white = np.exp(rng.uniform(np.log(400), np.log(3000)))
    values **= rng.uniform(*domain_randomisation.gamma)
    return as_volume(inside, np.clip(np.rint(values * white), 1, 32000), np.int16)


def _blurred(values: np.ndarray, inside: np.ndarray, thick_mm: float, axis: int, grid: Grid) -> np.ndarray:
    """Apply the point spread function: `IN_PLANE_MM`, and `thick_mm` through the slices (standard deviations)."""
    sigma = np.where(np.arange(3) == axis, thick_mm, IN_PLANE_MM) / grid.spacing_mm
    weight = ndimage.gaussian_filter(inside.astype(np.float32), sigma)
    return (ndimage.gaussian_filter(as_volume(inside, values), sigma) / np.maximum(weight, 1e-6))[inside]


def draw_tumour(
    values: np.ndarray, u: np.ndarray, texture: np.ndarray, csf: float, gm: float, rng: np.random.Generator
) -> np.ndarray:
    """Darken voxels with tumour cells, and in some patients its core; below the threshold nothing changes.

    Args:
        values: intensities (n,) of the brain's voxels, white matter about 1.
        u: tumour cell concentration (n,) in [0, 1].
        texture: (n,) of mean 0 and standard deviation 1.
        csf, gm: mean intensities of the tissues.
        rng: draws how dark the tumour and its core are, and where the core begins.
    """
    oedema = gm * rng.uniform(0.72, 0.95)
    necrosis = csf + rng.uniform(0.05, 0.2)
    weight = np.clip((u - GROWTH_THRESHOLD) / 0.5, 0, 1) * rng.uniform(0.75, 0.95)
    core = np.clip((u / max(u.max(), GROWTH_THRESHOLD) + 0.02 * texture - rng.uniform(0.80, 1.10)) / 0.06, 0, 1)
    target = (oedema + (necrosis - oedema) * core) * (1 + 0.07 * texture)
    return values + weight * (target - values)
