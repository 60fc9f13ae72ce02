"""How a synthetic brain and its tumour look in a T1n scan: contrast, texture, resolution, bias field and noise."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.synthetic_brain import EXTENT_MM, Brain, Grid, as_volume
from ldm_lib.anatomy.tissue import smooth_field
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD

IN_PLANE_MM = 0.4  # standard deviation of the scan's resolution
Range = tuple[float, float]


@dataclass(frozen=True)
class DomainRandomisation:
    """From where to where a patient's numbers are drawn, each evenly; intensities are over that of white matter.

    Attributes:
        csf, gm: mean intensity.
        detail: factor on what the atlas's T1 shows beyond its tissues.
        texture: standard deviation of 2.5 mm texture, relative.
        thick_mm: standard deviation of the resolution through the slices.
        bias: standard deviation of the logarithm of the bias field.
        noise: standard deviation of each part of the complex noise, at 1 mm or finer.
        gamma: exponent of a last change of contrast.
        bending: factor on how far the atlas is bent.
        hole: factor on the diameter of the tumours that healthy masks are copies of.
    """

    csf: Range = (0.12, 0.30)
    gm: Range = (0.60, 0.74)
    detail: Range = (0.6, 1.2)
    texture: Range = (0.015, 0.035)
    thick_mm: Range = (0.4, 1.4)
    bias: Range = (0.03, 0.12)
    noise: Range = (0.008, 0.035)
    gamma: Range = (1.0, 1.0)
    bending: Range = (1.0, 1.0)
    hole: Range = (0.6, 1.1)


# "wide" holds the scanners, brains and holes that were met in BraTS: its holes have 14 to 79 mL.
RANDOMISATIONS = {
    "narrow": DomainRandomisation(),
    "wide": DomainRandomisation(
        csf=(0.10, 0.40), gm=(0.52, 0.82), detail=(0.4, 1.4), texture=(0.01, 0.05), thick_mm=(0.4, 1.6),
        bias=(0.03, 0.15), noise=(0.008, 0.05), gamma=(0.8, 1.3), bending=(0.8, 1.7), hole=(0.7, 1.9),
    ),
}  # fmt: skip


def scan(
    brain: Brain,
    growth: np.ndarray,
    grid: Grid,
    domain_randomisation: DomainRandomisation,
    look: np.random.Generator,
    noise: np.random.Generator,
) -> np.ndarray:
    """T1n of a brain and its tumour: int16 x y z, background 0."""
    inside = brain.inside
    csf, gm = look.uniform(*domain_randomisation.csf), look.uniform(*domain_randomisation.gm)
    values = np.array([csf, gm, 1.0]) @ brain.shares + look.uniform(*domain_randomisation.detail) * brain.detail
    texture = smooth_field(look, grid.positions_mm, 2.5, EXTENT_MM)[inside]
    values *= 1 + look.uniform(*domain_randomisation.texture) * texture
    values = _blurred(values, inside, look.uniform(*domain_randomisation.thick_mm), int(look.integers(3)), grid)
    values = _with_tumour(values, growth[inside], texture, csf, gm, look)
    bias = smooth_field(look, grid.positions_mm, 90, EXTENT_MM)[inside]
    values *= np.exp(look.uniform(*domain_randomisation.bias) * bias)
    sd = look.uniform(*domain_randomisation.noise) / max(1.0, grid.spacing_mm) ** 1.5
    real, imaginary = noise.standard_normal((2, values.size), dtype=np.float32) * sd
    values = np.hypot(values + real, imaginary)
    white = np.exp(look.uniform(np.log(400), np.log(3000)))
    values **= look.uniform(*domain_randomisation.gamma)
    return as_volume(inside, np.clip(np.rint(values * white), 1, 32000), np.int16)


def _blurred(values: np.ndarray, inside: np.ndarray, thick_mm: float, axis: int, grid: Grid) -> np.ndarray:
    """The scan's resolution: `IN_PLANE_MM`, and `thick_mm` (standard deviation) through the slices."""
    sigma = np.where(np.arange(3) == axis, thick_mm, IN_PLANE_MM) / grid.spacing_mm
    weight = ndimage.gaussian_filter(inside.astype(np.float32), sigma)
    return (ndimage.gaussian_filter(as_volume(inside, values), sigma) / np.maximum(weight, 1e-6))[inside]


def _with_tumour(
    values: np.ndarray, u: np.ndarray, texture: np.ndarray, csf: float, gm: float, look: np.random.Generator
) -> np.ndarray:
    """Darken what the tumour `u` has reached, and in some its core; below the threshold nothing changes."""
    oedema = gm * look.uniform(0.72, 0.95)
    necrosis = csf + look.uniform(0.05, 0.2)
    share = np.clip((u - GROWTH_THRESHOLD) / 0.5, 0, 1) * look.uniform(0.75, 0.95)
    core = np.clip((u / max(u.max(), GROWTH_THRESHOLD) + 0.02 * texture - look.uniform(0.80, 1.10)) / 0.06, 0, 1)
    target = (oedema + (necrosis - oedema) * core) * (1 + 0.07 * texture)
    return values + share * (target - values)
