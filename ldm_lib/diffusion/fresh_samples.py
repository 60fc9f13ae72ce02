"""Draw every training sample afresh: another warp of a scan, mask, appearance, and the latents that follow from them.

scan (x y z) => warped box around the mask => mask => appearance => initial estimate => latents of the middle of the box

Image, masks and maps are warped together, so that the tissue map keeps the error of its registration. A mask is drawn
within the voxels that were hidden from that registration. A sample is a function of (seed, case, its number).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from ldm_lib.anatomy.appearance import RANGES, Appearance, change_appearance, expand
from ldm_lib.anatomy.initial_estimate import FAR_MM, NEAR_MM, SURFACE_MM, fill
from ldm_lib.anatomy.tissue import TISSUES, spline_coefficients
from ldm_lib.anatomy.tissue_segmentation import mixture_labels
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.model_grid import GridCase, require_spacing
from ldm_lib.data.volume import normalise
from ldm_lib.diffusion.latents import CPU, Latents, LatentSpec, case_seed
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

TISSUE_BITS, BRAIN, NEAR, UNHEALTHY, FIRST_HEALTHY = 3, 4, 8, 16, 5  # of `Scan.codes`; the last is a bit's number
CODE_VERSION = 1  # raise it when a draw changes
MOST_MASKS = 10  # bits of int16 that are left
ENDLESS = 2**31 - 1
REACH = 1 / 6  # of the crop, from its centre to a voxel of the mask along each axis
RIM = 1  # latent voxels around the trained crop, from which the estimate is made
COARSE_MM = 2.0  # voxels of the initial estimate
CENTRES = 2000  # voxels of each mask that may become the centre of a box
DEGREES, SCALE, DISPLACEMENT_MM, NODE_MM = 12.0, 0.12, 3.0, 28.0  # of the warp; the displacement is a node's largest sd
MIRRORED = 0.5  # probability of left and right exchanged
BLOB_NODE_MM = 14.0  # of the field that cuts a mask
WHOLE, CUT = 0.45, 0.35  # probabilities of a mask as it is, or of a part of it; otherwise it is joined to another
LESION = 0.5  # probability that the lesion is masked too
VISIBLE_QUANTILE = 0.995


@dataclass(frozen=True)
class Scan:
    """Hold what samples of a scan are drawn from; volumes (x y z) in LPS order, cropped to the brain."""

    image: Tensor  # float16, normalised
    codes: Tensor  # int16: tissue label, brain, near tissue, unhealthy, and a bit for each healthy mask
    growth: Tensor  # uint8, 255 is a concentration of 1
    means: tuple[float, float, float]  # intensities of CSF, GM, WM
    centres: tuple[np.ndarray, ...]  # positions (n, 3) in each healthy mask

    @classmethod
    def of(cls, cases: Sequence[CaseData], device: torch.device = CPU) -> "Scan":
        """Build it on a device from all cases of a scan, which differ in the healthy mask."""
        first = cases[0]
        image = first.lps(normalise(first.target, first.scale))
        healthy = [case.lps(case.scored) for case in cases]
        nothing = np.zeros(image.shape, np.uint8)
        tissue = nothing if first.tissue is None else first.lps(first.tissue)
        unhealthy = nothing > 0 if first.unhealthy is None else first.lps(first.unhealthy)
        box = bounding_box(np.any([image > 0, tissue > 0, *healthy], axis=0), 2)
        image, tissue, unhealthy = image[box], tissue[box], unhealthy[box]
        distance_mm = ndimage.distance_transform_edt(tissue == 0, sampling=first.lps_spacing_mm)
        codes = tissue + BRAIN * (image > 0) + NEAR * (distance_mm <= SURFACE_MM) + UNHEALTHY * unhealthy
        codes = codes.astype(np.int16)
        centres = []
        for k, mask in enumerate(healthy):
            codes |= (mask[box].astype(np.int16)) << (FIRST_HEALTHY + k)
            voxels = np.argwhere(mask[box])
            centres.append(voxels[:: max(1, len(voxels) // CENTRES)])
        growth = nothing if first.growth is None else first.lps(first.growth)
        grown = np.rint(growth[box] * 255).astype(np.uint8)
        half, coded, grown = (torch.from_numpy(each).to(device) for each in (image.astype(np.float16), codes, grown))
        return cls(half, coded, grown, _tissue_means(image, tissue), tuple(centres))


def _tissue_means(image: np.ndarray, tissue: np.ndarray) -> tuple[float, float, float]:
    """Return the mean intensities of CSF, GM and WM, increasing, by a mixture that starts from the tissue map."""
    every = (slice(None, None, 2),) * 3
    image, tissue = image[every], tissue[every]
    fractions = np.stack([ndimage.gaussian_filter((tissue == label).astype(np.float32), 1) for label in TISSUES])
    labels = mixture_labels(image, fractions)
    means = [float(image[labels == label].mean()) if (labels == label).any() else 0.0 for label in TISSUES]
    csf = max(means[0], 0.05)
    gm = max(means[1], csf + 0.05)
    return csf, gm, max(means[2], gm + 0.05)


@dataclass(frozen=True)
class FreshSamples(Sequence[Latents]):
    """Draw latents of one case: the k-th element is the k-th draw, of as many as there are numbers.

    Attributes:
        scan, healthy: the scan, and the number of the mask of this case.
        crop: edge of the latents, latent voxels.
        seed: draws of another seed are others.
    """

    case: Case
    scan: Scan
    healthy: int
    autoencoder: Autoencoder
    spec: LatentSpec
    crop: int
    seed: int

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Latents:
        (latents,) = draw([self], [number])
        return latents

    def volumes(self, number: int) -> GridCase:
        """Return image, mask and maps of a draw, for inspection; the crop and a rim of a latent voxel around it."""
        with torch.inference_mode():
            drawn = [part.cpu() for part in _volumes([self], [number])]
            drawn[3] = F.interpolate(drawn[3], size=drawn[0].shape[2:])
        target, mask, codes, growth = (part[0, 0].numpy() for part in drawn)
        return GridCase(
            voided=np.where(mask, np.float32(0), target), target=target, mask=mask, unknown=np.zeros_like(mask),
            growth=growth, tissue=(codes & TISSUE_BITS).astype(np.uint8),
        )  # fmt: skip

    def rng(self, number: int) -> np.random.Generator:
        """Return the random numbers of one draw."""
        return np.random.default_rng([self.seed, case_seed(self.case), number])


def fresh_samples(
    cases: Sequence[Case], autoencoder: Autoencoder, spec: LatentSpec, *, crop: int, seed: int
) -> list[FreshSamples]:
    """Read all cases of one scan, which share its volumes.

    Raises:
        InputError: a scan of another voxel size than the autoencoder's, or more masks than a scan can have.
    """
    if len(cases) > MOST_MASKS:
        raise InputError(f"{len(cases)} masks, at most {MOST_MASKS} are supported", where=cases[0].id,
                         fix="leave some masks out, or set fresh_samples=false")  # fmt: skip
    loaded = [load_case(case) for case in cases]
    require_spacing(loaded[0], autoencoder.spacing_mm)
    scan = Scan.of(loaded, next(autoencoder.parameters()).device)
    return [FreshSamples(case, scan, k, autoencoder, spec, crop, seed) for k, case in enumerate(cases)]


def fresh_version() -> str:
    """Name all that draws are made with: another version draws other samples."""
    return f"{CODE_VERSION}, {RANGES}"


def draw(sources: Sequence[FreshSamples], numbers: Sequence[int]) -> list[Latents]:
    """Draw a sample of each source, on the device of its autoencoder; the results are on the CPU."""
    first = sources[0]
    with torch.inference_mode():
        latents = _latents(first.autoencoder, first.spec, *_volumes(sources, numbers))
    middle = slice(RIM, RIM + first.crop)
    return [{name: part[k, :, middle, middle, middle].cpu().contiguous() for name, part in latents.items()}
            for k in range(len(sources))]  # fmt: skip


def _volumes(sources: Sequence[FreshSamples], numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the image, mask, codes (b 1 x y z) and, on a coarser grid, growth of a batch."""
    first = sources[0]
    mm, device = first.autoencoder.spacing_mm, next(first.autoencoder.parameters()).device
    size = (first.crop + 2 * RIM) * first.autoencoder.factor
    rngs = [source.rng(number) for source, number in zip(sources, numbers, strict=True)]
    warped = [_warped(source, rng, size, mm, device) for source, rng in zip(sources, rngs, strict=True)]
    image, codes, growth = (torch.cat(parts) for parts in zip(*warped, strict=True))
    mask = torch.cat([_mask(c[None], s, rng, mm) for c, s, rng in zip(codes, sources, rngs, strict=True)])
    looks = [Appearance.draw(rng, (size * mm,) * 3, RANGES) for rng in rngs]
    noise = torch.cat([_noise(rng, size, device) for rng in rngs])
    means, brain = [source.scan.means for source in sources], (codes & BRAIN) > 0
    target = change_appearance(image, brain, means, looks, spacing_mm=mm, noise=noise)
    return target / _scale(target, mask), mask, codes, growth


def _warped(
    source: FreshSamples, rng: np.random.Generator, size: int, mm: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample image (float32), codes (int16) and, on a coarser grid, growth of a scan at warped voxels (1 1 x y z)."""
    scan = source.scan
    centres = scan.centres[source.healthy]
    reach = int(source.crop * REACH) * source.autoencoder.factor
    centre = centres[rng.integers(len(centres))] + rng.integers(-reach, reach + 1, 3)
    turn = Rotation.from_euler("xyz", rng.uniform(-DEGREES, DEGREES, 3), degrees=True).as_matrix()
    matrix = turn * np.exp(rng.uniform(-SCALE, SCALE, 3)) * np.array([-1 if rng.random() < MIRRORED else 1, 1, 1])
    extent = (size * mm,) * 3
    nodes = np.stack([spline_coefficients(rng, extent, NODE_MM) for _ in range(3)])
    nodes *= rng.uniform(0, DISPLACEMENT_MM) / mm
    field = expand(torch.from_numpy(nodes).to(device)[None], (size,) * 3, mm, NODE_MM)[0]
    line = torch.arange(size, device=device) - size // 2  # whole voxels: without a warp nothing is interpolated
    axes = [line.view(-1, 1, 1), line.view(1, -1, 1), line.view(1, 1, -1)]
    places = []
    for row, n in zip(range(3), scan.image.shape, strict=True):
        position = field[row] + float(centre[row])
        for column, axis in enumerate(axes):
            position = position + float(matrix[row, column]) * axis
        places.append(position * (2 / (n - 1)) - 1)
    grid = torch.stack(places[::-1], dim=-1)[None]
    coarse = grid[:, :: (step := _step(mm)), ::step, ::step]

    def sampled(volume: Tensor, at: Tensor, mode: str) -> Tensor:
        return F.grid_sample(volume[None, None].float(), at, mode=mode, align_corners=True)

    growth = sampled(scan.growth, coarse, "bilinear") / 255
    return sampled(scan.image, grid, "bilinear"), sampled(scan.codes, grid, "nearest").short(), growth


def _mask(codes: Tensor, source: FreshSamples, rng: np.random.Generator, mm: float) -> Tensor:
    """Draw the mask (1 1 x y z): the healthy mask, a part of it, or it and others; and the lesion in some samples."""
    own = (codes & (1 << (FIRST_HEALTHY + source.healthy))) > 0
    size, kind, shift = codes.shape[2], rng.random(), rng.uniform(-0.7, 0.5)
    blob = spline_coefficients(rng, (size * mm,) * 3, BLOB_NODE_MM)
    other = FIRST_HEALTHY + int(rng.integers(len(source.scan.centres)))
    mask = own
    if WHOLE <= kind < WHOLE + CUT:
        field = expand(torch.from_numpy(blob).to(codes.device)[None, None], (size,) * 3, mm, BLOB_NODE_MM)
        mask = own & (field > shift)
    elif kind >= WHOLE + CUT:
        mask = own | ((codes & (1 << other)) > 0)
    if rng.random() < LESION:
        mask = mask | ((codes & UNHEALTHY) > 0)
    return mask if mask.any() else own


def _noise(rng: np.random.Generator, size: int, device: torch.device) -> Tensor:
    draw = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    return torch.randn((1, 2, size, size, size), generator=draw, device=device)


def _scale(target: Tensor, mask: Tensor) -> Tensor:
    """Return the intensity that becomes 1: a quantile of the visible brain, from every fourth voxel along each axis."""
    every = (..., *(slice(None, None, 4),) * 3)
    values = torch.where(mask | (target <= 0), torch.nan, target)[every].flatten(1)
    return values.nanquantile(VISIBLE_QUANTILE, dim=1).nan_to_num(1.0).clamp(min=0.05).view(-1, 1, 1, 1, 1)


def _step(mm: float) -> int:
    return max(1, round(COARSE_MM / mm))


def _latents(
    autoencoder: Autoencoder, spec: LatentSpec, target: Tensor, mask: Tensor, codes: Tensor, growth: Tensor
) -> Latents:
    """Encode a batch as `latents.encode_case` encodes one case."""
    factor, voided = autoencoder.factor, target.masked_fill(mask, 0)
    tissue = codes & TISSUE_BITS
    latents = {}
    if spec.context == "initial_estimate":
        latents["initial_estimate"] = autoencoder.encode(_estimate(voided, mask, codes, autoencoder.spacing_mm))
        latents["target"] = autoencoder.encode(target) - latents["initial_estimate"]
        latents["target"] = latents["target"] / spec.residual_scale(target)
        latents["voided"] = torch.zeros_like(latents["target"])
    else:
        latents |= {"voided": autoencoder.encode(voided), "target": autoencoder.encode(target)}
    fraction = F.avg_pool3d(mask.float(), factor)
    latent_mask = (fraction > 0).float()
    for _ in range(spec.mask_dilation):
        latent_mask = F.max_pool3d(latent_mask, 3, 1, 1)
    tumour = torch.where(growth >= spec.growth_threshold, growth, 0)
    channels = [_pooled(tumour, factor // _step(autoencoder.spacing_mm), spec.pooling)]
    channels += [_pooled((tissue == label).float(), factor, spec.pooling) for label in TISSUES]
    return latents | {"conditioning": torch.cat(channels, dim=1), "mask": latent_mask, "loss": latent_mask,
                      "mask_fraction": fraction}  # fmt: skip


def _pooled(volume: Tensor, factor: int, pooling: str) -> Tensor:
    middle = slice(factor // 2, None, factor)
    return F.avg_pool3d(volume, factor) if pooling == "area" else volume[..., middle, middle, middle]


def _estimate(voided: Tensor, mask: Tensor, codes: Tensor, mm: float) -> Tensor:
    """Return the initial estimate (b 1 x y z), made on voxels of about `COARSE_MM`."""
    step = _step(mm)
    visible = F.avg_pool3d((~mask).float(), step)
    hidden = visible < 0.5
    image = torch.where(hidden, 0, F.avg_pool3d(voided, step) / visible.clamp(min=0.5))
    every = (..., *(slice(None, None, step),) * 3)
    tissue, near = (codes & TISSUE_BITS)[every], (codes[every] & NEAR) > 0
    air = ~hidden & (image <= 0) & near
    filled = fill(image, hidden, tissue, air, _weight(hidden, step * mm), spacing_mm=step * mm)
    return torch.where(mask, F.interpolate(filled, scale_factor=step, mode="trilinear"), voided)


def _weight(hidden: Tensor, mm: float) -> Tensor:
    """Return the weights of the regression: exp(-distance / NEAR_MM), in steps of two voxels to the 26 neighbours."""
    weight = F.max_pool3d(hidden.float(), 2, ceil_mode=True)
    for _ in range(round(FAR_MM / (2 * mm))):
        weight = torch.maximum(weight, F.max_pool3d(weight, 3, 1, 1) * float(np.exp(-2 * mm / NEAR_MM)))
    weight = F.interpolate(weight, scale_factor=2, mode="nearest")[..., *(slice(0, n) for n in hidden.shape[2:])]
    return torch.where(hidden | (weight < float(np.exp(-FAR_MM / NEAR_MM))), 0, weight)
