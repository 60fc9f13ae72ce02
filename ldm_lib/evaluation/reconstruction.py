"""Measure an autoencoder's reconstruction error, and where it arises.

    image (x y z) => encode => latent (c x/f y/f z/f) => decode => image (x y z)

Images are normalised numpy volumes on the model's padded LPS grid unless said otherwise; air is 0, and brain is what
is above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ldm_lib.autoencoder.region_decoding import AnyCodec, Reconstruction, decode_box, reconstruct
from ldm_lib.data.case import CaseData
from ldm_lib.data.model_grid import GridCase, grid_case
from ldm_lib.devices import autocast
from ldm_lib.evaluation.image_quality import brain_scores, psnr
from ldm_lib.evaluation.metrics import brats_scores, scores_by_tissue
from ldm_lib.geometry import Frame, bounding_box, latent_mask

FARTHEST_SHIFT_VOX = 2
COLUMN_VOX = 64
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # affine of a grid in the model's orientation
ALIKE = 0.9  # correlation from which on a shift can be measured
BOX_LOSS_LIMIT_DB = 0.1  # if decoding a box changes the mask's PSNR by more, the whole volume is decoded


def upper_bound(data: CaseData, rebuilt: np.ndarray, factor: int) -> tuple[np.ndarray, dict[str, float]]:
    """Paste the reconstructed target into the mask, and score it: about the best that a latent model can reach.

    The mask's edge is not corrected (`edge_blending`), which would cost some tenths of a decibel. Return the volume
    (x, y, z) in the file's order and units, and the challenge's scores on the healthy mask.
    """
    filled = data.paste(rebuilt, factor)
    return filled, brats_scores(filled, data.target, data.voided, data.scored, where=data.case.key)


@dataclass(frozen=True)
class CheckedCase:
    """Hold what an autoencoder makes of one case: reconstructions of the full and of the voided image, and scores."""

    grid: GridCase
    latent_mask: np.ndarray  # bool, the latent voxels that contain any of the mask
    full: Reconstruction
    voided: Reconstruction
    pasted: np.ndarray  # the reconstructed target in the mask, (x, y, z) in the file's order and units
    scores: dict[str, float]  # of the upper bound and the reference codecs, `outside_psnr` of `voided`, and seconds


def check_case(
    data: CaseData, autoencoder: AnyCodec, references: Mapping[str, AnyCodec], *, device: torch.device, precision: str
) -> CheckedCase:
    """Reconstruct a case, and score the upper bound next to that of reference codecs by name on the same grid."""
    compute = {"device": device, "precision": precision}
    grid = grid_case(data, autoencoder.factor)
    full, voided = (reconstruct(autoencoder, image, **compute) for image in (grid.target, grid.voided))
    pasted, scores = upper_bound(data, full.volume, autoencoder.factor)
    for name, codec in references.items():
        rebuilt = reconstruct(codec, grid.target, **compute).volume
        scores[f"{name}_psnr"] = upper_bound(data, rebuilt, autoencoder.factor)[1]["psnr_01"]
    scores["outside_psnr"] = brain_scores(voided.volume, grid.voided)["psnr"]
    seconds = {"encode_s": full.encode_s, "decode_s": full.decode_s}
    return CheckedCase(grid, latent_mask(grid.mask, autoencoder.factor), full, voided, pasted, scores | seconds)


def by_tissue(data: CaseData, filled: np.ndarray) -> list[dict[str, str | int | float]]:
    """Score an inpainted volume (file's order and units) in each tissue; no row without a tissue map."""
    if data.tissue is None:
        return []
    return scores_by_tissue(filled, data.target, data.voided, data.scored, data.tissue, where=data.case.key)


def crop_against_whole(
    autoencoder: AnyCodec, image: np.ndarray, rebuilt: np.ndarray, edge: int, *, device: torch.device, precision: str
) -> dict[str, float]:
    """Compute PSNR in dB over the brain of crops reconstructed alone, and of the same voxels in the whole volume.

    Up to eight crops of `edge` voxels, rounded down to whole latent voxels, meet in the middle of the brain. If the
    whole volume is reconstructed no worse than its crops, training on crops is sufficient.
    """
    brain, errors = image > 0, {"crop_psnr": [], "whole_psnr": []}
    for box in _central_boxes(brain, edge - edge % autoencoder.factor, autoencoder.factor):
        alone = reconstruct(autoencoder, np.ascontiguousarray(image[box]), device=device, precision=precision).volume
        errors["crop_psnr"].append((alone - image[box])[brain[box]])
        errors["whole_psnr"].append((rebuilt - image)[box][brain[box]])
    return {name: psnr(np.concatenate(parts)) for name, parts in errors.items()}


def alignment(
    autoencoder: AnyCodec,
    image: np.ndarray,
    depths: Sequence[int] = (155, 156),
    *,
    device: torch.device,
    precision: str,
) -> list[dict[str, float]]:
    """Measure by how many slices padding, encoding, decoding and cropping shift a volume; must be 0.

    Args:
        image: (x, y, z) normalised, LPS, without padding. The column of 64 x 64 voxels in its middle is used;
            along z the middle is cut, or zeros are added behind, to each depth.

    Returns:
        rows of `slices`, `shift_vox` along z with the highest correlation of -2..2 (positive: the result lies
        higher), and that `correlation`.
    """
    rows = []
    column = _middle(image, (COLUMN_VOX, COLUMN_VOX, image.shape[2]))
    for depth in depths:
        cut = _middle(column, (*column.shape[:2], depth))
        cut = np.pad(cut, [(0, 0), (0, 0), (0, depth - cut.shape[2])])
        frame = Frame.of(LPS, cut.shape, autoencoder.factor)
        rebuilt = reconstruct(autoencoder, frame.to_model(cut), device=device, precision=precision).volume
        rows.append({"slices": depth, **_shift(frame.to_file(rebuilt), cut)})
    return rows


def box_loss_db(
    data: CaseData, autoencoder: AnyCodec, coded: Reconstruction, margin: int, *, device: torch.device, precision: str
) -> float:
    """Compute the upper bound's PSNR in dB by full decoding of `coded` less that by `decode_box`."""
    mask = data.frame(autoencoder.factor).to_model(data.mask)
    with torch.inference_mode(), autocast(device, precision):
        box = decode_box(autoencoder, torch.from_numpy(coded.latent)[None].to(device), mask, margin)
    volumes = coded.volume, box[0, 0].float().cpu().numpy()
    whole, boxed = (upper_bound(data, volume, autoencoder.factor)[1]["psnr_01"] for volume in volumes)
    return whole - boxed


def _central_boxes(brain: np.ndarray, edge: int, factor: int) -> list[tuple[slice, ...]]:
    """Return distinct cubes on the latent grid on all sides of the brain's middle, shifted into the volume."""
    spans, corners = bounding_box(brain), []
    for span, n in zip(spans, brain.shape, strict=True):
        middle = (span.start + span.stop) // 2 // factor * factor
        corners.append(sorted({min(max(start, 0), max(n - edge, 0)) for start in (middle - edge, middle)}))
    return [tuple(slice(start, start + edge) for start in corner) for corner in product(*corners)]


def _middle(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the middle of an image, of at most this shape."""
    starts = [max(n - size, 0) // 2 for n, size in zip(image.shape, shape, strict=True)]
    return image[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


def _shift(rebuilt: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Find the shift along z with the highest correlation between a volume and the image."""
    far, n = FARTHEST_SHIFT_VOX, image.shape[2]
    still, shifts = image[..., far : n - far].ravel(), sorted(range(-far, far + 1), key=abs)
    found = {k: float(np.corrcoef(still, rebuilt[..., far + k : n - far + k].ravel())[0, 1]) for k in shifts}
    best = max(found, key=found.get)
    return {"shift_vox": best, "correlation": found[best]}
