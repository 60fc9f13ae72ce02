"""Tumour growth by reaction and diffusion: how far a glioma has spread through white and grey matter.

Fisher-Kolmogorov equation (Swanson et al. 2000, Cell Proliferation 33:317), u the tumour cell concentration in [0, 1]:

    du/dt = div(D grad u) + rho u (1 - u),   no flux across the brain's edge,
    D = D_white white + D_white / ratio grey
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ldm_lib.anatomy.tissue import GM, WM
from ldm_lib.errors import ConfigError, InputError

GROWTH_THRESHOLD = 0.2  # below this concentration the conditioning calls a voxel healthy
VISIBLE_IN = {
    "FLAIR": 0.25,
    "T1c": 0.675,
}  # concentration from which a tumour shows (Lipkova et al. 2019, IEEE TMI 38:1875)
SAFETY = 0.9  # share of the largest stable step that is taken
MAX_GROWTH_PER_STEP = 0.1  # rho dt, for accuracy: the reaction alone would stay stable far longer


def threshold_growth(growth, threshold: float = GROWTH_THRESHOLD):
    """Set concentrations below `threshold` to 0 and keep the others; any shape, array or tensor."""
    return growth * (growth >= threshold)


def stable_step_days(largest_diffusion: float, spacing_mm: float | Sequence[float]) -> float:
    """Largest stable step of the explicit scheme, 1 / (2 D sum(1 / h^2)), in days; D in mm^2/day."""
    h = _voxel_size(spacing_mm)
    return float(1 / (2 * largest_diffusion * np.sum(1 / h**2))) if largest_diffusion else np.inf


def simulate_growth(
    white: np.ndarray | torch.Tensor,
    grey: np.ndarray | torch.Tensor,
    *,
    seed_vox: Sequence[int] | None = None,
    initial: np.ndarray | torch.Tensor | None = None,
    spacing_mm: float | Sequence[float],
    days: float,
    diffusion_white_mm2_per_day: float,
    diffusion_ratio: float = 10.0,
    proliferation_per_day: float,
    seed_sigma_mm: float = 2.0,
) -> np.ndarray | torch.Tensor:
    """Grow a tumour in the tissue for `days` days; float32 concentration in [0, 1], array or tensor as `white`.

    Args:
        white, grey: tissue shares (..., x, y, z) in [0, 1], leading axes a batch; no tissue, no tumour.
        seed_vox: voxel x, y, z where the tumour starts, a Gaussian of height 1 and `seed_sigma_mm`.
        initial: a concentration to start from instead, shape of `white`, in [0, 1].
        spacing_mm: voxel size, one number or three.
        diffusion_white_mm2_per_day: D in pure white matter; in grey matter it is `diffusion_ratio` times less.
        proliferation_per_day: rho.

    Raises:
        InputError: shapes differ, values are not shares, or the start is missing or outside the tissue.
        ConfigError: a rate, time or size out of range.
    """
    _check_rates(days, diffusion_white_mm2_per_day, proliferation_per_day, diffusion_ratio, seed_sigma_mm)
    white_t, grey_t = _shares(white, "white"), _shares(grey, "grey")
    _same_shape(white_t, grey_t, "grey")
    tissue = (white_t + grey_t) > 0
    start = _start(tissue, seed_vox, initial, spacing_mm, seed_sigma_mm)
    diffusion = diffusion_white_mm2_per_day * (white_t + grey_t / diffusion_ratio)
    # bounds that hold for any tissue, so that a tumour does not depend on the others in its batch
    limit = SAFETY * stable_step_days(diffusion_white_mm2_per_day * (1 + 1 / diffusion_ratio), spacing_mm)
    limit = min(limit, MAX_GROWTH_PER_STEP / max(proliferation_per_day, 1e-30))
    box, steps = _box_around(tissue), int(np.ceil(days / limit))
    faces, grown = _permeability(diffusion[box], spacing_mm), torch.zeros_like(start)
    grown[box] = _march(start[box], faces, proliferation_per_day * tissue[box], days=days, steps=steps)
    return grown if isinstance(white, torch.Tensor) else grown.numpy()


@dataclass(frozen=True)
class Rates:
    """How a tumour spreads: D in white matter (mm^2 a day), how many times less it is in grey, and rho (per day).

    The defaults are a glioblastoma of middling speed: its front, sqrt(D / rho) = 2 mm, moves 0.2 mm a day in white
    matter.
    """

    diffusion_white_mm2_per_day: float = 0.2
    diffusion_ratio: float = 10.0
    proliferation_per_day: float = 0.05


MIDDLING = Rates()


def grow_in_labels(
    labels: np.ndarray,
    affine: np.ndarray,
    *,
    days: float,
    rates: Rates = MIDDLING,
    seed_mm: Sequence[float] | None = None,
    segmentation: np.ndarray | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """Grow a tumour in a segmented brain: concentration float32 (x, y, z) in [0, 1].

    Args:
        labels: tissue (x, y, z), 0 none, 1 CSF, 2 GM, 3 WM; cells spread through GM and WM.
        affine: voxel to world (RAS, mm), 4 x 4.
        days: time since the start.
        seed_mm: where it starts, x y z in the world; a Gaussian of height 1 and 2 mm.
        segmentation: where it is already, (x, y, z), not 0 there; starts at full concentration.
        device: "cpu" or "cuda".

    Raises:
        InputError: no start or two, a seed outside white and grey matter, or a segmentation outside it.
        ConfigError: a rate or time out of range.
    """
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    start = {"seed_vox": seed_voxel(labels, affine, seed_mm)} if seed_mm is not None else {}
    if segmentation is not None:
        start["initial"] = torch.from_numpy((segmentation != 0).astype(np.float32)).to(device)
    white, grey = (torch.from_numpy((labels == tissue).astype(np.float32)).to(device) for tissue in (WM, GM))
    return simulate_growth(white, grey, spacing_mm=spacing_mm, days=days, **start, **vars(rates)).cpu().numpy()


def seed_voxel(labels: np.ndarray, affine: np.ndarray, seed_mm: Sequence[float]) -> tuple[int, int, int]:
    """The voxel at a world position (RAS, mm), which must lie in white or grey matter."""
    told = "({:g}, {:g}, {:g}) mm".format(*seed_mm)
    position = np.linalg.solve(affine, [*seed_mm, 1.0])[:3]
    voxel = tuple(int(i) for i in np.rint(position))
    tissue = (labels == WM) | (labels == GM)
    if not tissue.any():
        raise InputError("no white or grey matter to grow in", where="tissue", fix="give another tissue map")
    if min(voxel) >= 0 and (np.array(voxel) < labels.shape).all() and tissue[voxel]:
        return voxel
    places = np.argwhere(tissue)
    nearest = places[np.square((places - position) * np.linalg.norm(affine[:3, :3], axis=0)).sum(1).argmin()]
    nearest_mm = affine[:3] @ [*nearest, 1]
    raise InputError(
        f"{told} is voxel {voxel} of {labels.shape}, outside white and grey matter; the nearest of it is "
        f"{np.linalg.norm(nearest_mm - seed_mm):.1f} mm away, at ({', '.join(f'{v:.1f}' for v in nearest_mm)})",
        where="seed", fix="give x,y,z in mm of the file's world (right, anterior, superior)",
    )  # fmt: skip


def random_tumour(
    white: np.ndarray, grey: np.ndarray, allowed: np.ndarray, rng: np.random.Generator, *, spacing_mm: float
) -> np.ndarray:
    """A tumour of random place, size and rates: concentration float32 x y z in [0, 1].

    Args:
        white, grey: tissue shares x y z in [0, 1].
        allowed: bool x y z, where it may start; not empty.
        rng: draws the start, the radius aimed at (9 to 26 mm, reached in patchy tissue and passed in uniform
            white matter), the width of the front sqrt(D / rho) (1.8 to 4.5 mm) and rho (0.01 to 0.03 per day).
        spacing_mm: isotropic voxel size.
    """
    places = np.argwhere(allowed)
    start = places[rng.integers(len(places))]
    radius_mm, front_mm, rho = rng.uniform(9, 26), rng.uniform(1.8, 4.5), rng.uniform(0.01, 0.03)
    reach = int(np.ceil(2 * radius_mm / spacing_mm))
    box = tuple(slice(max(c - reach, 0), c + reach + 1) for c in start)
    growth = np.zeros(white.shape, np.float32)
    growth[box] = simulate_growth(
        white[box],
        grey[box],
        seed_vox=[c - b.start for c, b in zip(start, box, strict=True)],
        spacing_mm=spacing_mm,
        days=0.65 * (radius_mm / front_mm + 3) / rho,  # in uniform tissue the front moves 2 front_mm rho a day
        diffusion_white_mm2_per_day=front_mm**2 * rho,
        proliferation_per_day=rho,
        seed_sigma_mm=spacing_mm,
    )
    return growth


def _march(u: torch.Tensor, faces: list[torch.Tensor], rho: torch.Tensor, *, days: float, steps: int) -> torch.Tensor:
    """Explicit Euler: du = dt (div(D grad u) + rho u (1 - u)), in buffers made once: four times as fast as without."""
    step = days / max(steps, 1)
    faces, rho, u = [face * step for face in faces], rho * step, u.clone()
    change, fluxes = torch.empty_like(u), [torch.empty_like(face) for face in faces]
    for _ in range(steps):
        torch.addcmul(rho, rho, u, value=-1, out=change)
        change.mul_(u)
        for axis, face, flux in zip((-3, -2, -1), faces, fluxes, strict=True):
            here, there = (u.narrow(axis, start, u.shape[axis] - 1) for start in (0, 1))
            torch.sub(there, here, out=flux).mul_(face)
            # what leaves a voxel through a face enters its neighbour, so the sum is conserved
            change.narrow(axis, 0, u.shape[axis] - 1).add_(flux)
            change.narrow(axis, 1, u.shape[axis] - 1).sub_(flux)
        u.add_(change)
    return u.clamp_(0, 1)


def _check_rates(days: float, diffusion: float, proliferation: float, ratio: float, sigma_mm: float) -> None:
    above, positive = "a finite number of at least 0", "a finite number above 0"
    for name, value, allowed in (
        ("days", days, above),
        ("diffusion_white_mm2_per_day", diffusion, above),
        ("proliferation_per_day", proliferation, above),
        ("diffusion_ratio", ratio, positive),
        ("seed_sigma_mm", sigma_mm, positive),
    ):
        if not (np.isfinite(value) and (value > 0 or (value == 0 and allowed is above))):
            raise ConfigError(f"{value} given, allowed is {allowed}", where=name, fix="correct it")


def _voxel_size(spacing_mm: float | Sequence[float]) -> np.ndarray:
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), (3,))
    if not (np.isfinite(h) & (h > 0)).all():
        raise ConfigError(f"{spacing_mm} given, allowed are finite numbers above 0", where="spacing_mm")
    return h


def _shares(values: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    field = torch.as_tensor(values).to(torch.float32)
    low, high = (float(v) for v in torch.aminmax(field))
    if not (low >= 0 and high <= 1 + 1e-5):
        raise InputError(
            f"values from {low:g} to {high:g}, allowed are shares from 0 to 1",
            where=name,
            fix="clip or rescale the map, and replace what is not finite",
        )
    return field


def _same_shape(white: torch.Tensor, other: torch.Tensor, name: str) -> None:
    if other.shape != white.shape:
        raise InputError(
            f"shape {tuple(other.shape)}, but white has {tuple(white.shape)}",
            where=name,
            fix="resample both to one grid",
        )


def _start(
    tissue: torch.Tensor,
    seed_vox: Sequence[int] | None,
    initial: np.ndarray | torch.Tensor | None,
    spacing_mm: float | Sequence[float],
    sigma_mm: float,
) -> torch.Tensor:
    if (seed_vox is None) == (initial is None):
        raise InputError("seed_vox and initial: exactly one is needed to start a tumour", fix="give one")
    if initial is not None:
        u = _shares(initial, "initial")
        _same_shape(tissue, u, "initial")
    else:
        u = _gaussian(tissue.shape[-3:], seed_vox, spacing_mm, sigma_mm).expand(tissue.shape)
    u = u.to(tissue.device) * tissue
    if not u.any():
        raise InputError(
            "the tumour starts outside the tissue: its concentration is 0 wherever there is white or grey matter",
            where=f"seed_vox {seed_vox}" if initial is None else "initial",
            fix="move the start into white or grey matter",
        )
    return u


def _gaussian(
    shape: Sequence[int], centre_vox: Sequence[int], spacing_mm: float | Sequence[float], sigma_mm: float
) -> torch.Tensor:
    h = _voxel_size(spacing_mm)
    axes = [(torch.arange(n) - c) * float(s) for n, c, s in zip(shape, centre_vox, h, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    squared = x**2 + y**2 + z**2
    u = torch.exp(-squared / (2 * sigma_mm**2))
    return torch.where(squared <= (4 * sigma_mm) ** 2, u, 0.0).to(torch.float32)


def _box_around(tissue: torch.Tensor) -> tuple:
    """The smallest box of the last three axes that holds all tissue: nothing happens outside."""
    spans = []
    for axis in (-3, -2, -1):
        others = [a for a in range(tissue.ndim) if a != tissue.ndim + axis]
        found = torch.nonzero(tissue.amax(dim=others))
        spans.append(slice(int(found.min()), int(found.max()) + 1))
    return (..., *spans)


def _permeability(diffusion: torch.Tensor, spacing_mm: float | Sequence[float]) -> list[torch.Tensor]:
    """D / h^2 on the faces between neighbours, one tensor an axis.

    The harmonic mean keeps the flux continuous where D jumps, and is 0 beside a voxel without tissue.
    """
    h = _voxel_size(spacing_mm)
    faces = []
    for axis, size in zip((-3, -2, -1), h, strict=True):
        n = diffusion.shape[axis]
        a, b = diffusion.narrow(axis, 0, n - 1), diffusion.narrow(axis, 1, n - 1)
        faces.append(2 * a * b / (a + b).clamp_min(1e-30) / float(size) ** 2)
    return faces
