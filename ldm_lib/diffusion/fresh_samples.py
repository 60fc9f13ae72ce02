"""Draw every training sample afresh: another warp of a scan, mask, appearance, and the latents that follow from them.

scan (x y z) => warped box around the mask => mask => appearance => initial estimate => latents of the middle of the box

Image, masks and maps are warped together, so that the tissue map keeps the error of its registration. A mask is drawn
within the voxels that were hidden from that registration. A sample is a function of (seed, case, its number).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from ldm_lib.anatomy.appearance import RANGES, Appearance, change_appearance, expand
from ldm_lib.anatomy.deformation import interpolate
from ldm_lib.anatomy.initial_estimate import coarse_estimate, coarse_step
from ldm_lib.anatomy.tissue import TISSUES, spline_coefficients
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.model_grid import GridCase, require_spacing
from ldm_lib.diffusion.latents import Latents, LatentSpec, case_seed
from ldm_lib.diffusion.scan import BRAIN, FIRST_HEALTHY, MOST_MASKS, NEAR, TISSUE_BITS, UNHEALTHY, Scan
from ldm_lib.errors import InputError

CODE_VERSION = 3  # raise it when a draw changes
ENDLESS = 2**31 - 1
REACH = 1 / 6  # of the crop, from its centre to a voxel of the mask along each axis
RIM = 1  # latent voxels around the trained crop, from which the estimate is made
DEGREES, SCALE = 20.0, 0.2  # largest rotation about each axis, and largest logarithm of a scale
WARPS_MM = ((44.0, 7.0), (20.0, 3.0))  # coarse and fine: distance of the nodes, largest sd of their displacements
MIRRORED = 0.5  # probability of left and right exchanged
BLOB_NODE_MM = 14.0  # of the field that cuts a mask
WHOLE, CUT = 0.45, 0.35  # probabilities of a mask as it is, or of a part of it; otherwise it is joined to another
LESION = 0.5  # probability that the lesion is masked too
VISIBLE_QUANTILE = 0.995
PLANE_DEGREES, PLANE_MM = 0.5, 0.5  # standard deviations by which the mid-sagittal plane is missed


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
            drawn = _volumes([self], [number])
            growth = F.interpolate(drawn.growth, size=drawn.target.shape[2:])
        parts = (part.cpu()[0, 0].numpy() for part in (drawn.target, drawn.mask, drawn.codes, growth))
        target, mask, codes, growth = parts
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
    scan = Scan.of(loaded, spec, next(autoencoder.parameters()).device)
    return [FreshSamples(case, scan, k, autoencoder, spec, crop, seed) for k, case in enumerate(cases)]


def fresh_version() -> str:
    """Name all that draws are made with: another version draws other samples."""
    return f"{CODE_VERSION}, {RANGES}"


@dataclass(frozen=True)
class Volumes:
    """Hold the drawn boxes of a batch, each (b 1 x y z)."""

    target: Tensor
    mask: Tensor
    codes: Tensor  # of `Scan`
    growth: Tensor  # on a coarser grid
    mirrored: Tensor | None = None  # target of the other hemisphere
    hidden: Tensor | None = None  # where `mirrored` is masked


@dataclass(frozen=True)
class Box:
    """Hold where the voxels of a drawn box are in its scan: centre + matrix * voxel + displacement."""

    positions: Tensor  # (3 x y z), voxels of the scan
    centre: np.ndarray
    matrix: np.ndarray

    @classmethod
    def draw(cls, source: FreshSamples, rng: np.random.Generator, size: int, mm: float) -> "Box":
        """Draw a warped box around a voxel of the healthy mask, which stays in it however strong the warp."""
        device, centres = source.scan.image.device, source.scan.centres[source.healthy]
        reach = int(source.crop * REACH) * source.autoencoder.factor
        masked = centres[rng.integers(len(centres))]
        centre = masked + rng.integers(-reach, reach + 1, 3)
        turn = Rotation.from_euler("xyz", rng.uniform(-DEGREES, DEGREES, 3), degrees=True).as_matrix()
        matrix = turn * np.exp(rng.uniform(-SCALE, SCALE, 3)) * np.array([-1 if rng.random() < MIRRORED else 1, 1, 1])
        field = torch.stack([_displacements(rng, size, mm, *warp, device) for warp in WARPS_MM]).sum(0)
        x, y, z = np.rint(np.linalg.solve(matrix, masked - centre)).astype(int) + size // 2
        field = field - field[:, x, y, z, None, None, None]
        line = torch.arange(size, device=device) - size // 2  # whole voxels: without a warp nothing is interpolated
        axes = [line.view(-1, 1, 1), line.view(1, -1, 1), line.view(1, 1, -1)]
        rows = [sum((axis * float(a) for axis, a in zip(axes, row, strict=True)), part + float(start))
                for row, part, start in zip(matrix, field, centre, strict=True)]  # fmt: skip
        return cls(torch.stack(rows), centre, matrix)

    def linear(self, volume: Tensor, step: int = 1) -> Tensor:
        """Interpolate a volume (x y z) of the scan at every `step`-th voxel of the box: (1 1 x y z) float32."""
        every = (slice(None), *(slice(None, None, step),) * 3)
        return interpolate(volume[None, None].float(), self.positions[every])

    def nearest(self, volume: Tensor) -> Tensor:
        """Take a volume (x y z) of the scan at the nearest voxels: (1 1 x y z), 0 outside the scan."""
        return _nearest(volume, self.positions)

    def of_box(self, volume: Tensor, at: "Box") -> Tensor:
        """Take a volume (1 1 x y z) of this box at the voxels of another of the same scan, without displacements."""
        inverse, size = np.linalg.inv(self.matrix), volume.shape[2]
        moved = at.positions - torch.from_numpy(self.centre).to(at.positions)[:, None, None, None]
        places = torch.einsum("ij,jxyz->ixyz", torch.from_numpy(inverse).to(moved), moved) + size // 2
        return _nearest(volume[0, 0], places)

    def reflected(self, scan: Scan, rng: np.random.Generator, mm: float) -> "Box":
        """Return the mirror image of the box across a plane near the scan's mid-sagittal one."""
        moved = np.eye(4)
        moved[:3, :3] = Rotation.from_euler("yz", rng.normal(0, PLANE_DEGREES, 2), degrees=True).as_matrix()
        centre = np.array(scan.image.shape) / 2
        moved[:3, 3] = centre - moved[:3, :3] @ centre + [rng.normal(0, PLANE_MM / mm), 0, 0]
        matrix = torch.from_numpy(moved @ scan.reflection @ np.linalg.inv(moved)).to(self.positions)
        positions = torch.einsum("ij,jxyz->ixyz", matrix[:3, :3], self.positions) + matrix[:3, 3, None, None, None]
        return replace(self, positions=positions)


def _displacements(
    rng: np.random.Generator, size: int, mm: float, node_mm: float, most_mm: float, device: torch.device
) -> Tensor:
    """Draw the displacements (3 x y z) of a box's voxels, in voxels, by splines between nodes `node_mm` apart."""
    nodes = np.stack([spline_coefficients(rng, (size * mm,) * 3, node_mm) for _ in range(3)])
    nodes *= rng.uniform(0, most_mm) / mm
    return expand(torch.from_numpy(nodes).to(device)[None], (size,) * 3, mm, node_mm)[0]


def _nearest(volume: Tensor, positions: Tensor) -> Tensor:
    """Take a volume (x y z) at the voxels nearest to positions (3 x y z): (1 1 x y z), 0 outside."""
    index, inside = torch.zeros_like(positions[0], dtype=torch.int64), torch.ones_like(positions[0], dtype=torch.bool)
    for position, n in zip(positions, volume.shape, strict=True):
        voxel = position.round().long()
        inside &= (voxel >= 0) & (voxel < n)
        index = index * n + voxel.clamp(0, n - 1)
    return (volume.flatten()[index] * inside)[None, None]


def draw(sources: Sequence[FreshSamples], numbers: Sequence[int]) -> list[Latents]:
    """Draw a sample of each source, on the device of its autoencoder; the results are on the CPU."""
    first = sources[0]
    with torch.inference_mode():
        latents = _latents(first.autoencoder, first.spec, _volumes(sources, numbers))
    middle = slice(RIM, RIM + first.crop)
    return [{name: part[k, :, middle, middle, middle].cpu().contiguous() for name, part in latents.items()}
            for k in range(len(sources))]  # fmt: skip


def _volumes(sources: Sequence[FreshSamples], numbers: Sequence[int]) -> Volumes:
    """Draw the volumes of a batch."""
    first = sources[0]
    mm = first.autoencoder.spacing_mm
    size = (first.crop + 2 * RIM) * first.autoencoder.factor
    rngs = [source.rng(number) for source, number in zip(sources, numbers, strict=True)]
    own = list(zip(sources, rngs, strict=True))
    boxes = [Box.draw(*each, size, mm) for each in own]
    scans = [source.scan for source in sources]
    pairs = list(zip(boxes, scans, strict=True))
    codes = [box.nearest(scan.codes) for box, scan in pairs]
    masks, lesions = zip(*(_mask(c, *each, mm) for c, each in zip(codes, own, strict=True)), strict=True)
    looks = [Appearance.draw(rng, (size * mm,) * 3, RANGES) for rng in rngs]
    target = _images(pairs, codes, looks, rngs, mm)
    mask = torch.cat(masks)
    scale = _scale(target, mask)
    growth = torch.cat([box.linear(scan.growth, coarse_step(mm)) / 255 for box, scan in pairs])
    drawn = Volumes(target / scale, mask, torch.cat(codes), growth)
    if not first.spec.contralateral:
        return drawn
    others = [box.reflected(scan, rng, mm) for (box, scan), rng in zip(pairs, rngs, strict=True)]
    pairs = list(zip(others, scans, strict=True))
    codes = [box.nearest(scan.codes) for box, scan in pairs]
    looks = [look.with_other_gain(rng, (size * mm,) * 3, RANGES) for look, rng in zip(looks, rngs, strict=True)]
    hidden = [box.of_box(m, at=other) | (lesion & ((c & UNHEALTHY) > 0))
              for box, other, m, c, lesion in zip(boxes, others, masks, codes, lesions, strict=True)]  # fmt: skip
    return replace(drawn, mirrored=_images(pairs, codes, looks, rngs, mm) / scale, hidden=torch.cat(hidden))


def _images(
    pairs: Sequence[tuple[Box, Scan]], codes: Sequence[Tensor], looks: Sequence[Appearance],
    rngs: Sequence[np.random.Generator], mm: float,
) -> Tensor:  # fmt: skip
    """Sample the images of boxes in scans, and change their appearance: (b 1 x y z)."""
    image, brain = torch.cat([box.linear(scan.image) for box, scan in pairs]), (torch.cat(list(codes)) & BRAIN) > 0
    noise = torch.cat([_noise(rng, image.shape[2], image.device) for rng in rngs])
    return change_appearance(image, brain, [scan.means for _, scan in pairs], looks, spacing_mm=mm, noise=noise)


def _mask(codes: Tensor, source: FreshSamples, rng: np.random.Generator, mm: float) -> tuple[Tensor, bool]:
    """Draw the mask (1 1 x y z): the healthy mask, a part of it, or it and others; in some samples with the lesion."""
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
    lesion = rng.random() < LESION
    if lesion:
        mask = mask | ((codes & UNHEALTHY) > 0)
    return (mask if mask.any() else own), lesion


def _noise(rng: np.random.Generator, size: int, device: torch.device) -> Tensor:
    draw = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    return torch.randn((1, 2, size, size, size), generator=draw, device=device)


def _scale(target: Tensor, mask: Tensor) -> Tensor:
    """Return the intensity that becomes 1: a quantile of the visible brain, from every fourth voxel along each axis."""
    every = (..., *(slice(None, None, 4),) * 3)
    values = torch.where(mask | (target <= 0), torch.nan, target)[every].flatten(1)
    return values.nanquantile(VISIBLE_QUANTILE, dim=1).nan_to_num(1.0).clamp(min=0.05).view(-1, 1, 1, 1, 1)


def _latents(autoencoder: Autoencoder, spec: LatentSpec, drawn: Volumes) -> Latents:
    """Encode a batch as `latents.encode_case` encodes one case."""
    factor, target, mask, growth = autoencoder.factor, drawn.target, drawn.mask, drawn.growth
    voided, tissue = target.masked_fill(mask, 0), drawn.codes & TISSUE_BITS
    latents = {}
    if spec.context == "initial_estimate":
        near = (drawn.codes & NEAR) > 0
        estimate = coarse_estimate(voided, mask, tissue, near, spacing_mm=autoencoder.spacing_mm)
        start, scale = autoencoder.encode(estimate), spec.residual_scale(target)
        latents |= {"initial_estimate": start, "voided": torch.zeros_like(start)}
        latents["target"] = (autoencoder.encode(target) - start) / scale
        if spec.contralateral:
            mirrored = torch.where(drawn.hidden, estimate, drawn.mirrored)
            latents["contralateral"] = (autoencoder.encode(mirrored) - start) / scale
            latents["contralateral_known"] = F.avg_pool3d((~drawn.hidden).float(), factor)
    else:
        latents |= {"voided": autoencoder.encode(voided), "target": autoencoder.encode(target)}
    fraction = F.avg_pool3d(mask.float(), factor)
    latent_mask = (fraction > 0).float()
    for _ in range(spec.mask_dilation):
        latent_mask = F.max_pool3d(latent_mask, 3, 1, 1)
    tumour = torch.where(growth >= spec.growth_threshold, growth, 0)
    channels = [_pooled(tumour, factor // coarse_step(autoencoder.spacing_mm), spec.pooling)]
    channels += [_pooled((tissue == label).float(), factor, spec.pooling) for label in TISSUES]
    return latents | {"conditioning": torch.cat(channels, dim=1), "mask": latent_mask, "loss": latent_mask,
                      "mask_fraction": fraction}  # fmt: skip


def _pooled(volume: Tensor, factor: int, pooling: str) -> Tensor:
    middle = slice(factor // 2, None, factor)
    return F.avg_pool3d(volume, factor) if pooling == "area" else volume[..., middle, middle, middle]
