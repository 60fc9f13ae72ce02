"""The synthetic cohort: brains bent from the MNI152 templates, each with a tumour grown in its own tissue.

Everything random is drawn in millimetres from (seed, patient): a patient is the same at any voxel size, up to sampling.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.atlas import mni152
from ldm_lib.errors import ConfigError
from ldm_lib.growth import GROWTH_THRESHOLD, random_tumour
from ldm_lib.masks import healthy_mask, unhealthy_mask, void
from ldm_lib.tissue import CSF, smooth_field
from ldm_lib.volumes import write_map

# Disjoint ranges: no patient that trains is ever shown in a demo or tested on.
TRAINING_PATIENTS = range(0, 8000)  # split into training and validation by patient
DEMO_PATIENTS = range(8000, 9000)
TEST_PATIENTS = range(9000, 10000)

EXTENT_MM = (240, 240, 155)  # the BraTS field of view
CENTRE_MM = (120.0, 126.0, 76.0)  # where the brain's centre lies in it, from the corner of voxel 0
ATLAS_CENTRE_VOX = (98, 117, 77)  # the middle of the MNI152 brain's bounding box
GROWTH_MM = 3.0  # voxel size of the grid on which tumours grow
SUPRATENTORIAL_MM = 62.0  # tumours start above this height
ANATOMY, TUMOUR, LOOK, NOISE, MASKS, DONORS = range(6)  # streams of random numbers; each donor takes two


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient; all volumes x y z on one grid, axes towards left, posterior, superior.

    Attributes:
        t1n: int16, above 0 in the brain and exactly 0 outside.
        tissue: uint8, 0 background, 1 CSF, 2 GM, 3 WM: the healthy brain, also beneath the tumour.
        growth: float32 tumour cell concentration in [0, 1].
        segmentation: bool, where growth is at least 0.2 and so the tumour visible.
        masks: pairs of healthy and unhealthy mask, bool.
        affine: voxel to world (RAS, mm), 4 x 4.
    """

    t1n: np.ndarray
    tissue: np.ndarray
    growth: np.ndarray
    segmentation: np.ndarray
    masks: tuple[tuple[np.ndarray, np.ndarray], ...]
    affine: np.ndarray


class Grid(NamedTuple):
    """The field of view in voxels of one size; positions of their centres along x, y, z in mm from its corner."""

    shape: tuple[int, int, int]
    spacing_mm: float

    @property
    def positions_mm(self) -> list[np.ndarray]:
        return [(np.arange(n, dtype=np.float32) + 0.5) * self.spacing_mm for n in self.shape]

    @property
    def affine(self) -> np.ndarray:
        s, shift = self.spacing_mm, (self.spacing_mm - 1) / 2
        affine = np.diag([-s, -s, s, 1.0])
        affine[:3, 3] = -shift, 239 - shift, shift
        return affine


class Anatomy(NamedTuple):
    """A healthy brain on a grid: `inside` bool x y z, and values of its voxels in that order."""

    inside: np.ndarray
    tissue: np.ndarray  # shares of CSF, GM, WM (3, n), sum 1
    detail: np.ndarray


def make_phantom(
    seed: int, patient: int, *, spacing_mm: float = 1.0, masks: int = 3, deformation: float = 1.0
) -> Phantom:
    """Make one patient: a function of (seed, patient), the same anatomy whatever the voxel size.

    Args:
        seed, patient: numbers of cohort and patient, 0 or more; see TRAINING_PATIENTS and its neighbours.
        spacing_mm: isotropic voxel size; 1 is the BraTS grid 240 x 240 x 155.
        masks: how many pairs of masks.
        deformation: factor on how far the atlas is bent; from about 2 on it folds, as no smooth map of it can.

    Raises:
        ConfigError: a number out of range.
        InputError: no place for a healthy mask.
    """
    if min(seed, patient, masks, deformation) < 0 or not 0.5 <= spacing_mm <= 12:
        given = f"seed {seed}, patient {patient}, masks {masks}, spacing_mm {spacing_mm:g}, deformation {deformation:g}"
        raise ConfigError(f"{given} given; allowed are 0 or more, and 0.5 to 12 mm", where="make_phantom")
    grid, rng = grid_of(spacing_mm), partial(_rng, seed, patient)
    anatomy = _anatomy(rng(ANATOMY), grid, deformation)
    growth = _resample(_tumour(rng(ANATOMY), rng(TUMOUR), deformation), grid) * anatomy.inside
    segmentation = growth >= GROWTH_THRESHOLD
    unhealthy = unhealthy_mask(segmentation, spacing_mm)
    pairs, places = [], rng(MASKS)
    for k in range(DONORS, DONORS + 2 * masks, 2):  # a donor is a patient of no cohort
        donor = _resample(_tumour(rng(k), rng(k + 1), deformation), grid) >= GROWTH_THRESHOLD
        pairs.append((healthy_mask(anatomy.inside, unhealthy, donor, places, spacing_mm=spacing_mm), unhealthy))
    t1n = _image(anatomy, growth, grid, rng(LOOK), rng(NOISE))
    tissue = _volume(anatomy.inside, CSF + anatomy.tissue.argmax(0), np.uint8)
    return Phantom(t1n, tissue, growth, segmentation, tuple(pairs), grid.affine)


def _rng(seed: int, patient: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, patient, stream])


def grid_of(spacing_mm: float) -> Grid:
    """The BraTS field of view in isotropic voxels of this size."""
    return Grid(tuple(int(np.ceil(e / spacing_mm)) for e in EXTENT_MM), float(spacing_mm))


@lru_cache(maxsize=1)
def _atlas() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """From the MNI152 head (RAS, 1 mm), x y z: brain, shares of GM and WM (the rest is CSF), T1 beyond these."""
    atlas = mni152()
    brain, (_, gm, wm) = atlas.brain, atlas.shares
    values = atlas.shares[:, brain]
    means = np.linalg.lstsq(values.T, atlas.t1[brain], rcond=None)[0]
    detail = np.zeros_like(atlas.t1)
    detail[brain] = np.clip(atlas.t1[brain] - means @ values, -0.12, 0.12)
    return brain.astype(np.float32), gm, wm, detail


def _anatomy(rng: np.random.Generator, grid: Grid, deformation: float) -> Anatomy:
    """Bend the atlas into one brain; coarse voxels are the means of eight of half their size."""
    if grid.spacing_mm < 2:
        return _bent_atlas(rng, grid, deformation)
    fine = _bent_atlas(rng, Grid(tuple(2 * n for n in grid.shape), grid.spacing_mm / 2), deformation)
    filled = _block_sum(fine.inside, np.ones(1))
    inside = filled >= 4
    values = np.stack([_block_sum(fine.inside, v)[inside] for v in (*fine.tissue, fine.detail)])
    values /= filled[inside]
    return Anatomy(inside, values[:3], values[3])


def _block_sum(inside: np.ndarray, values: np.ndarray) -> np.ndarray:
    x, y, z = (n // 2 for n in inside.shape)
    return _volume(inside, values).reshape(x, 2, y, 2, z, 2).sum((1, 3, 5))


def _volume(inside: np.ndarray, values: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Values of the voxels inside, 0 outside: x y z."""
    volume = np.zeros(inside.shape, dtype)
    volume[inside] = values
    return volume


def _bent_atlas(rng: np.random.Generator, grid: Grid, deformation: float) -> Anatomy:
    points = _atlas_points(rng, grid, deformation)
    brain, *maps = _atlas()
    brain = ndimage.map_coordinates(brain, points, order=1)
    inside = brain >= 0.5
    points, brain = points[:, inside], brain[inside]
    grey, white, detail = (ndimage.map_coordinates(m, points, order=1) for m in maps)
    sharpness, atrophy = rng.uniform(1.4, 2.4), rng.uniform(-0.7, 0.8)
    shares = np.maximum(np.stack([brain - grey - white, grey, white]), 1e-3) ** sharpness
    shares[0] *= np.exp(atrophy)
    return Anatomy(inside, shares / shares.sum(0), detail)


def _atlas_points(rng: np.random.Generator, grid: Grid, deformation: float) -> np.ndarray:
    """Where in the atlas (voxels) each voxel of the grid takes its tissue from: float32 (3, x, y, z)."""
    x, y, z = (p - c for p, c in zip(grid.positions_mm, CENTRE_MM, strict=True))
    position = np.stack(np.meshgrid(-x, -y, z, indexing="ij")).astype(np.float32)
    turn = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    matrix = turn / (rng.uniform(0.90, 0.97) * rng.uniform(0.95, 1.05, 3))
    points = np.tensordot(matrix.astype(np.float32), position, axes=1)
    points += rng.normal(0, 2, (3, 1, 1, 1)).astype(np.float32)
    # ventricles: the map is zoomed about a point between their bodies
    zoom = rng.uniform(-0.25, 0.45)
    hub, radius = (np.array(v, np.float32).reshape(3, 1, 1, 1) for v in ((0, -3, 8), (22, 40, 22)))
    points -= zoom * (points - hub) * np.exp(-(((points - hub) / radius) ** 2).sum(0) / 2)
    for node_mm, size_mm in ((45, 2.8), (18, 1.9), (9, 0.8)):
        for axis in range(3):
            points[axis] += deformation * size_mm * smooth_field(rng, grid.positions_mm, node_mm, EXTENT_MM)
    return points + np.array(ATLAS_CENTRE_VOX, np.float32).reshape(3, 1, 1, 1)


def _tumour(anatomy_rng: np.random.Generator, rng: np.random.Generator, deformation: float) -> np.ndarray:
    """Growth on the grid of GROWTH_MM in the brain that `anatomy_rng` draws: float32 x y z in [0, 1]."""
    grid = grid_of(GROWTH_MM)
    anatomy = _bent_atlas(anatomy_rng, grid, deformation)
    # tissue lets cells through unevenly: tumours are lobed, not round
    patchy = 0.08 + 0.92 / (1 + np.exp(-3 * smooth_field(rng, grid.positions_mm, 9, EXTENT_MM)))
    grey, white = (_volume(anatomy.inside, share) * patchy for share in anatomy.tissue[1:])
    depth = ndimage.distance_transform_edt(anatomy.inside, sampling=GROWTH_MM)
    allowed = (white > 0.3) & (depth > 10) & (grid.positions_mm[2] > SUPRATENTORIAL_MM)
    return random_tumour(white, grey, allowed, rng, spacing_mm=GROWTH_MM)


def _resample(field: np.ndarray, grid: Grid) -> np.ndarray:
    """Linear interpolation from the grid of GROWTH_MM, axis by axis."""
    for positions in grid.positions_mm:
        nodes = np.arange(field.shape[0])[:, None] + 0.5
        weights = np.clip(1 - np.abs(positions[None] / GROWTH_MM - nodes), 0, None)
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 0))
    return field


def _image(
    anatomy: Anatomy, growth: np.ndarray, grid: Grid, look: np.random.Generator, noise: np.random.Generator
) -> np.ndarray:
    """T1n of a brain and its tumour: int16 x y z, background 0."""
    inside = anatomy.inside
    csf, gm = look.uniform(0.12, 0.30), look.uniform(0.60, 0.74)
    values = np.array([csf, gm, 1.0]) @ anatomy.tissue + look.uniform(0.6, 1.2) * anatomy.detail
    texture = smooth_field(look, grid.positions_mm, 2.5, EXTENT_MM)[inside]
    values *= 1 + look.uniform(0.015, 0.035) * texture
    values = _blurred(values, inside, look.uniform(0.4, 1.4), int(look.integers(3)), grid)
    values = _with_tumour(values, growth[inside], texture, csf, gm, look)
    bias = smooth_field(look, grid.positions_mm, 90, EXTENT_MM)[inside]
    values *= np.exp(look.uniform(0.03, 0.12) * bias)
    sd = look.uniform(0.008, 0.035) / max(1.0, grid.spacing_mm) ** 1.5
    real, imaginary = noise.standard_normal((2, values.size), dtype=np.float32) * sd
    values = np.hypot(values + real, imaginary)
    white = np.exp(look.uniform(np.log(400), np.log(3000)))
    return _volume(inside, np.clip(np.rint(values * white), 1, 32000), np.int16)


def _blurred(values: np.ndarray, inside: np.ndarray, thick_mm: float, axis: int, grid: Grid) -> np.ndarray:
    """The scan's resolution: 0.4 mm in the plane, `thick_mm` (standard deviation) through the slices."""
    sigma = np.where(np.arange(3) == axis, thick_mm, 0.4) / grid.spacing_mm
    weight = ndimage.gaussian_filter(inside.astype(np.float32), sigma)
    return (ndimage.gaussian_filter(_volume(inside, values), sigma) / np.maximum(weight, 1e-6))[inside]


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


def write_patient(folder: str | Path, seed: int, patient: int, **how: float) -> str:
    """Make one patient (`make_phantom`) and write it below `folder` in the seed layout; returns the patient's id.

    Files are `data/<ID>/<ID>-t1n.nii.gz` and, for each mask k, `-t1n-voided-000k`, `-mask-000k`, `-mask-healthy-000k`,
    `-mask-unhealthy-000k`; `conditioning_data/{growth_model,tissue_segmentation}/<ID>.nii.gz`. Written twice on one
    machine the bytes are the same; another processor may round a few voxels otherwise.
    """
    phantom = make_phantom(seed, patient, **how)
    case = f"Synthetic_{patient:05d}"
    data, conditioning = Path(folder) / "data" / case, Path(folder) / "conditioning_data"
    volumes = {
        data / f"{case}-t1n": phantom.t1n,
        conditioning / "growth_model" / case: phantom.growth,
        conditioning / "tissue_segmentation" / case: phantom.tissue,
    }
    for k, (healthy, unhealthy) in enumerate(phantom.masks):
        mask = healthy | unhealthy
        volumes |= {
            data / f"{case}-t1n-voided-{k:04d}": void(phantom.t1n, mask),
            data / f"{case}-mask-{k:04d}": mask.astype(np.uint8),
            data / f"{case}-mask-healthy-{k:04d}": healthy.astype(np.uint8),
            data / f"{case}-mask-unhealthy-{k:04d}": unhealthy.astype(np.uint8),
        }
    for path, volume in volumes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_map(path.with_name(f"{path.name}.nii.gz"), volume, phantom.affine)
    return case


def write_cohort(
    folder: str | Path,
    *,
    seed: int,
    patients: Iterable[int],
    on_patient: Callable[[str], None] | None = None,
    **how: float,
) -> list[str]:
    """Write several patients as `write_patient` does; `on_patient` is called with each finished id."""
    written = []
    for patient in patients:
        written.append(write_patient(folder, seed, patient, **how))
        if on_patient is not None:
            on_patient(written[-1])
    return written
