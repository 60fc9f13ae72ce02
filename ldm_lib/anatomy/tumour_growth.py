"""Simulate tumour growth by reaction and diffusion: how far a glioma spreads through white and grey matter.

Fisher-Kolmogorov equation (Swanson et al. 2000, Cell Proliferation 33:317), u the tumour cell concentration in [0, 1]:

    du/dt = div(D grad u) + rho u (1 - u),   no flux across the border of the tissue,
    D = D_white white + D_white / ratio grey
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from ldm_lib.anatomy.options import DEFAULT_RATES, GrowthRates
from ldm_lib.anatomy.tissue import GM, WM
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.geometry import bounding_box
from ldm_lib.progress import Progress

GROWTH_THRESHOLD = 0.2  # concentration below which a voxel counts as healthy in the conditioning
SEED_SIGMA_MM = 2.0  # standard deviation of the Gaussian that a tumour starts from
SAFETY = 0.9  # fraction of the largest stable step that is used
MAX_GROWTH_PER_STEP = 0.1  # rho dt, for accuracy; the reaction alone would be stable far longer
Concentration = TypeVar("Concentration", np.ndarray, torch.Tensor)


def threshold_growth(growth: Concentration, threshold: float = GROWTH_THRESHOLD) -> Concentration:
    """Set concentrations below `threshold` to 0 and keep the others; any shape, array or tensor."""
    return growth * (growth >= threshold)


def grow_tumour(
    tissue: np.ndarray,
    affine: np.ndarray,
    days: float,
    *,
    seed_mm: Sequence[float] | None = None,
    segmentation: np.ndarray | None = None,
    rates: GrowthRates = DEFAULT_RATES,
    device: str = "cpu",
) -> np.ndarray:
    """Grow a tumour in a segmented brain and return its tumour cell concentration, float32 (x, y, z) in [0, 1].

    Args:
        tissue: labels (x, y, z): 0 none, 1 CSF, 2 GM, 3 WM. Tumour cells spread through GM and WM.
        affine: voxel to world (RAS, mm), 4 x 4.
        days: age of the tumour, at least 0.
        seed_mm: start at this world position (x, y, z), a Gaussian of height 1 and standard deviation 2 mm.
        segmentation: start instead at full concentration where this array (x, y, z) is not 0.
        device: "cpu" or "cuda".

    Raises:
        InputError: no tissue map, not exactly one start, or a start outside white and grey matter.
        ConfigError: a negative or infinite number of days.

    Examples:
        >>> tissue, affine = np.full((24, 24, 24), 3), np.diag([2.0, 2.0, 2.0, 1.0])
        >>> growth = grow_tumour(tissue, affine, days=60, seed_mm=(24, 24, 24))
        >>> growth.shape, tuple(int(i) for i in np.unravel_index(growth.argmax(), growth.shape))
        ((24, 24, 24), (12, 12, 12))
        >>> older = grow_tumour(tissue, affine, days=120, seed_mm=(24, 24, 24))
        >>> bool((older >= 0.2).sum() > (growth >= 0.2).sum())
        True
    """
    if tissue is None or np.ndim(tissue) != 3:
        raise InputError("no tissue map (x, y, z) to grow in", where="tissue", fix="make one with `ldm prior`")
    if (seed_mm is None) == (segmentation is None):
        raise InputError("exactly one start is needed", where="growth", fix="give either a seed or a segmentation")
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if segmentation is None:
        start = _gaussian(tissue.shape, seed_voxel(tissue, affine, seed_mm), spacing_mm, SEED_SIGMA_MM)
    elif segmentation.shape == tissue.shape:
        start = torch.from_numpy((segmentation != 0).astype(np.float32))
    else:
        raise InputError(f"shape {segmentation.shape}, but the tissue map has {tissue.shape}", where="segmentation",
                         fix="resample both to one grid")  # fmt: skip
    white, grey = (torch.from_numpy((tissue == label).astype(np.float32)).to(device) for label in (WM, GM))
    return solve(white, grey, start.to(device), spacing_mm=spacing_mm, days=days, rates=rates).cpu().numpy()


def seed_voxel(tissue: np.ndarray, affine: np.ndarray, seed_mm: Sequence[float]) -> tuple[int, int, int]:
    """Return the voxel at a world position (RAS, mm); InputError if it is outside white and grey matter."""
    position = np.linalg.solve(affine, [*seed_mm, 1.0])[:3]
    voxel = tuple(int(i) for i in np.rint(position))
    allowed = (tissue == WM) | (tissue == GM)
    if min(voxel) >= 0 and (np.array(voxel) < tissue.shape).all() and allowed[voxel]:
        return voxel
    at = ", ".join(f"{value:g}" for value in seed_mm)
    raise InputError(f"({at}) mm is voxel {voxel} of {tissue.shape}, outside white and grey matter", where="seed",
                     fix="give x,y,z in mm of the file's world (right, anterior, superior)")  # fmt: skip


def random_tumour(
    white: np.ndarray, grey: np.ndarray, allowed: np.ndarray, rng: np.random.Generator, *, spacing_mm: float
) -> np.ndarray:
    """Grow a tumour of random position, size and rates: float32 (x, y, z) in [0, 1].

    Args:
        white, grey: tissue fractions (x, y, z) in [0, 1].
        allowed: bool (x, y, z), where the tumour may start; not empty.
        rng: draws the start, the intended radius (9 to 26 mm; smaller tumours grow in patchy tissue, larger ones in
            uniform white matter), the width of the front sqrt(D / rho) (1.8 to 4.5 mm) and rho (0.01 to 0.03 per day).
        spacing_mm: isotropic voxel size.
    """
    candidates = np.argwhere(allowed)
    start = candidates[rng.integers(len(candidates))]
    radius_mm, front_mm, rho = rng.uniform(9, 26), rng.uniform(1.8, 4.5), rng.uniform(0.01, 0.03)
    reach = int(np.ceil(2 * radius_mm / spacing_mm))
    box = tuple(slice(max(c - reach, 0), c + reach + 1) for c in start)
    near = [torch.as_tensor(fraction[box]).to(torch.float32) for fraction in (white, grey)]
    seed = _gaussian(near[0].shape, [c - b.start for c, b in zip(start, box, strict=True)], spacing_mm, spacing_mm)
    rates = GrowthRates(diffusion_white_mm2_per_day=front_mm**2 * rho, proliferation_per_day=rho)
    days = 0.65 * (radius_mm / front_mm + 3) / rho  # in uniform tissue the front moves by 2 front_mm rho per day
    growth = np.zeros(white.shape, np.float32)
    growth[box] = solve(*near, seed, spacing_mm=spacing_mm, days=days, rates=rates).numpy()
    return growth


def solve(
    white: torch.Tensor,
    grey: torch.Tensor,
    start: torch.Tensor,
    *,
    spacing_mm: float | Sequence[float],
    days: float,
    rates: GrowthRates = DEFAULT_RATES,
) -> torch.Tensor:
    """Solve the growth equation from a given start: float32 (..., x, y, z) in [0, 1].

    Args:
        white, grey: tissue fractions (..., x, y, z) in [0, 1], float32; leading axes are a batch.
        start: concentration (..., x, y, z) in [0, 1]; what lies outside the tissue is dropped.
        spacing_mm: voxel size, one number or three.
    """
    if not (np.isfinite(days) and days >= 0):
        raise ConfigError(f"{days} given, allowed is a finite number of at least 0", where="days", fix="correct it")
    tissue = (white + grey) > 0
    start = start * tissue
    if not start.any():
        raise InputError("the tumour starts outside white and grey matter", where="growth",
                         fix="move the seed or the segmentation into white or grey matter")  # fmt: skip
    coefficient, rho = rates.diffusion_white_mm2_per_day, rates.proliferation_per_day
    diffusion = coefficient * (white + grey / rates.diffusion_ratio)
    # bounds that hold for any tissue, so that a tumour does not depend on the others in its batch
    limit = SAFETY * stable_step_days(coefficient * (1 + 1 / rates.diffusion_ratio), spacing_mm)
    steps = int(np.ceil(days / min(limit, MAX_GROWTH_PER_STEP / max(rho, 1e-30))))
    # nothing happens outside the tissue
    box = (..., *bounding_box(tissue.cpu().numpy().reshape(-1, *tissue.shape[-3:]).any(0)))
    faces, grown = _permeability(diffusion[box], spacing_mm), torch.zeros_like(start)
    grown[box] = _march(start[box], faces, rho * tissue[box], days=days, steps=steps)
    return grown


def stable_step_days(largest_diffusion: float, spacing_mm: float | Sequence[float]) -> float:
    """Return the largest stable step of the explicit scheme, 1 / (2 D sum(1 / h^2)), in days; D in mm^2/day."""
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
    return float(1 / (2 * largest_diffusion * np.sum(1 / h**2))) if largest_diffusion else np.inf


def _march(u: torch.Tensor, faces: list[torch.Tensor], rho: torch.Tensor, *, days: float, steps: int) -> torch.Tensor:
    """Integrate du = dt (div(D grad u) + rho u (1 - u)) by explicit Euler, in reused buffers: four times as fast."""
    step = days / max(steps, 1)
    faces, rho, u = [face * step for face in faces], rho * step, u.clone()
    change, fluxes = torch.empty_like(u), [torch.empty_like(face) for face in faces]
    progress = Progress(steps, name="growth step", every_s=10.0)
    for k in range(steps):
        progress.update(k, f"day {k * step:.0f} of {days:.0f}")
        torch.addcmul(rho, rho, u, value=-1, out=change)
        change.mul_(u)
        for axis, face, flux in zip((-3, -2, -1), faces, fluxes, strict=True):
            lower, upper = (u.narrow(axis, first, u.shape[axis] - 1) for first in (0, 1))
            torch.sub(upper, lower, out=flux).mul_(face)
            # what leaves a voxel through a face enters its neighbour, so the sum is conserved
            change.narrow(axis, 0, u.shape[axis] - 1).add_(flux)
            change.narrow(axis, 1, u.shape[axis] - 1).sub_(flux)
        u.add_(change)
    return u.clamp_(0, 1)


def _gaussian(
    shape: Sequence[int], centre_vox: Sequence[int], spacing_mm: float | Sequence[float], sigma_mm: float
) -> torch.Tensor:
    """Return a Gaussian of height 1, cut off at four standard deviations: float32 (x, y, z)."""
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
    axes = [(torch.arange(n) - c) * float(s) for n, c, s in zip(shape, centre_vox, h, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    squared = x**2 + y**2 + z**2
    u = torch.exp(-squared / (2 * sigma_mm**2))
    return torch.where(squared <= (4 * sigma_mm) ** 2, u, 0.0).to(torch.float32)


def _permeability(diffusion: torch.Tensor, spacing_mm: float | Sequence[float]) -> list[torch.Tensor]:
    """Return D / h^2 on the faces between neighbours, one tensor per axis.

    The harmonic mean keeps the flux continuous where D jumps, and is 0 next to a voxel without tissue.
    """
    faces = []
    for axis, size in zip((-3, -2, -1), np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3), strict=True):
        n = diffusion.shape[axis]
        a, b = diffusion.narrow(axis, 0, n - 1), diffusion.narrow(axis, 1, n - 1)
        faces.append(2 * a * b / (a + b).clamp_min(1e-30) / float(size) ** 2)
    return faces
