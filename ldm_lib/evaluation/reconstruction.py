"""Measure an autoencoder's reconstruction error, and where it arises.

    image (x y z) => encode => latent (c x/f y/f z/f) => decode => image (x y z)

Images are normalised numpy volumes on the model's padded LPS grid unless said otherwise; air is 0, and brain is what
is above it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldm_lib.autoencoder.region_decoding import AnyCodec, Reconstruction, decode_box, reconstruct
from ldm_lib.data.case import CaseData
from ldm_lib.data.model_grid import GridCase, grid_case
from ldm_lib.devices import autocast
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.evaluation.image_quality import brain_scores
from ldm_lib.evaluation.metrics import brats_scores, scores_by_tissue
from ldm_lib.geometry import latent_mask
from ldm_lib.images.volume import write_like

BOX_LOSS_LIMIT_DB = 0.1  # if decoding a box changes the mask's PSNR by more, the whole volume is decoded


def upper_bound(data: CaseData, rebuilt: np.ndarray, factor: int) -> tuple[np.ndarray, dict[str, float]]:
    """Paste the reconstructed target into the mask, and score it: about the best that a latent model can reach.

    The mask's edge is not corrected (`edge_blending`), which would cost some tenths of a decibel. Return the volume
    (x, y, z) in the file's order and units, and the challenge's scores on the healthy mask.
    """
    filled = data.paste(rebuilt, factor)
    return filled, brats_scores(filled, data.target, data.voided, data.scored, where=data.case.key)


def write_upper_bound(model: LatentDiffusion, data: CaseData, path: Path) -> Path:
    """Write the volume of `upper_bound` as a file on the case's grid."""
    autoencoder = model.autoencoder
    target = grid_case(data, autoencoder.factor).target
    coded = reconstruct(autoencoder, target, device=model.device, precision=model.precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_like(path, data.source, data.paste(coded.volume, autoencoder.factor), data.mask)


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
