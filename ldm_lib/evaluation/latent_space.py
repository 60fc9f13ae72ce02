"""Measure an autoencoder's latents: their moments, and their response to a flip and to a mask.

Latents are (c, x/f, y/f, z/f), standardised, and `chosen`, bool, some of their voxels. Images are normalised (x, y, z)
on the model's padded LPS grid.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from ldm_lib.autoencoder.model import Autoencoder, kl_divergence
from ldm_lib.autoencoder.region_decoding import Reconstruction, as_batch
from ldm_lib.devices import autocast
from ldm_lib.evaluation.image_quality import rms

LARGEST_DISTANCE = 6


def latent_table(latent: np.ndarray, chosen: np.ndarray) -> list[dict[str, float]]:
    """Compute the moments of each channel, for comparison with the normal distribution that sampling starts from.

    Returns:
        rows of `channel`, `mean`, `std` (ddof 0), `skew` (third standardised moment; 0 for a normal) and
        `beyond_3_sigma` (fraction of latent voxels farther than 3 std from the mean; 0.0027 for a normal).
    """
    rows = []
    for channel, values in enumerate(latent[:, chosen].astype(np.float64)):
        mean, std = values.mean(), values.std()
        z = (values - mean) / std if std > 1e-6 else np.zeros_like(values)  # a constant channel has no shape
        moments = {"mean": mean, "std": std, "skew": np.mean(z**3), "beyond_3_sigma": np.mean(np.abs(z) > 3)}
        rows.append({"channel": channel} | {name: float(value) for name, value in moments.items()})
    return rows


def posterior_kl(
    autoencoder: Autoencoder, image: np.ndarray, chosen: np.ndarray, *, device: torch.device, precision: str
) -> list[float]:
    """Compute the mean KL divergence of each channel's posterior from N(0, 1), nats per latent element."""
    with torch.inference_mode(), autocast(device, precision):
        mean, std = (
            m[0].float().cpu()[:, torch.from_numpy(chosen)] for m in autoencoder.moments(as_batch(image, device))
        )
    return [kl_divergence(m, s).item() for m, s in zip(mean, std, strict=True)]


def flip_error(
    autoencoder: Autoencoder, image: np.ndarray, coded: Reconstruction, *, device: torch.device, precision: str
) -> dict[str, float]:
    """Compute the RMS error over the brain of reconstruction, without and with a left-right flip of the latent.

    The flip of a linear codec also changes the signs of its odd channels (`LinearCodec.mirror`), as in training.
    """
    lateral, brain = 1, image > 0
    signs = 1.0 if autoencoder.mirror is None else autoencoder.mirror.cpu().view(-1, 1, 1, 1)
    flipped = (signs * torch.from_numpy(np.flip(coded.latent, lateral).copy()))[None].to(device)
    with torch.inference_mode(), autocast(device, precision):
        back = autoencoder.decode(flipped)[0, 0].flip(lateral - 1).float().cpu().numpy()
    volumes = {"coding": coded.volume, "coding with a latent flip": back}
    return {name: rms((volume - image)[brain]) for name, volume in volumes.items()}


def mask_reach(full: np.ndarray, voided: np.ndarray, mask: np.ndarray, brain: np.ndarray) -> list[dict[str, float]]:
    """Measure how far the masked region affects the latent voxels outside it.

    Args:
        full, voided: (c, x, y, z) standardised latents of the two images.
        mask, brain: (x, y, z) bool, latent voxels that contain any of the mask, and those mostly in the brain.

    Returns:
        rows of `latent_voxels_from_mask` (Chebyshev distance), `latent_voxels` (their number at that distance) and
        `rms_difference` between both latents there; NaN if there are none.
    """
    distance, rows = ndimage.distance_transform_cdt(~mask, metric="chessboard"), []
    for k in range(LARGEST_DISTANCE + 1):
        there = brain & (distance == k)
        row = {"latent_voxels_from_mask": k, "latent_voxels": int(there.sum())}
        rows.append(row | {"rms_difference": rms((full - voided)[:, there])})
    return rows


def dilation_needed(rows: Sequence[dict[str, float]], fraction: float = 0.1) -> int:
    """Find the smallest dilation of the latent mask beyond which the masked region has little effect, latent voxels.

    A change up to `fraction` of that in the masked latent voxels is little. The largest distance in the rows, those of
    `mask_reach`, means at least that many.
    """
    limit = fraction * rows[0]["rms_difference"]
    return max((row["latent_voxels_from_mask"] for row in rows[1:] if row["rms_difference"] > limit), default=0)
