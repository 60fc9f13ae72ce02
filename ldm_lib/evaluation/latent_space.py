"""What an autoencoder's latents are like: their moments, and how they answer to a flip and to a hole.

    latent (c x/f y/f z/f), standardised;   cells (x/f y/f z/f) bool, a choice among its cells

Images are normalised (x, y, z) on the model's padded LPS grid.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from ldm_lib.autoencoder.model import Autoencoder, kl_divergence
from ldm_lib.autoencoder.region_decoding import Reconstruction, as_batch
from ldm_lib.devices import autocast
from ldm_lib.evaluation.image_quality import rms

FARTHEST_CELL = 6


def latent_table(latent: np.ndarray, cells: np.ndarray) -> list[dict[str, float]]:
    """Moments of each channel over some cells, for comparison with the normal distribution that sampling starts from.

    Args:
        latent: (c, x, y, z), standardised.
        cells: (x, y, z) bool.

    Returns:
        rows of `channel`, `mean`, `std` (ddof 0), `skew` (third standardised moment; 0 for a normal) and
        `beyond_3_sigma` (share of cells farther than three of these std from this mean; 0.0027 for a normal).
    """
    rows = []
    for channel, values in enumerate(latent[:, cells].astype(np.float64)):
        mean, std = values.mean(), values.std()
        z = (values - mean) / std if std > 1e-6 else np.zeros_like(values)  # a dead channel has no shape
        moments = {"mean": mean, "std": std, "skew": np.mean(z**3), "beyond_3_sigma": np.mean(np.abs(z) > 3)}
        rows.append({"channel": channel} | {name: float(value) for name, value in moments.items()})
    return rows


def posterior_kl(
    autoencoder: Autoencoder, image: np.ndarray, cells: np.ndarray, *, device: torch.device, precision: str
) -> list[float]:
    """KL divergence of the posterior from N(0, 1), nats per latent element, the mean over `cells`; one per channel."""
    with torch.inference_mode(), autocast(device, precision):
        mean, std = (
            m[0].float().cpu()[:, torch.from_numpy(cells)] for m in autoencoder.moments(as_batch(image, device))
        )
    return [kl_divergence(m, s).item() for m, s in zip(mean, std, strict=True)]


def flip_error(
    autoencoder: Autoencoder, image: np.ndarray, coded: Reconstruction, *, device: torch.device, precision: str
) -> dict[str, float]:
    """Root mean square error over the brain of coding, and of coding with the latent flipped left to right.

    A linear code's flip changes the signs of its odd numbers as well (`LinearCode.mirror`), as training does it.
    """
    lateral, brain = 1, image > 0
    signs = 1.0 if autoencoder.mirror is None else autoencoder.mirror.cpu().view(-1, 1, 1, 1)
    flipped = (signs * torch.from_numpy(np.flip(coded.latent, lateral).copy()))[None].to(device)
    with torch.inference_mode(), autocast(device, precision):
        back = autoencoder.decode(flipped)[0, 0].flip(lateral - 1).float().cpu().numpy()
    volumes = {"coding": coded.volume, "coding with a latent flip": back}
    return {name: rms((volume - image)[brain]) for name, volume in volumes.items()}


def hole_reach(full: np.ndarray, voided: np.ndarray, hole: np.ndarray, brain: np.ndarray) -> list[dict[str, float]]:
    """How far the hole's edge reaches into the latents of cells that hold none of it.

    Args:
        full, voided: (c, x, y, z) standardised latents of the two images.
        hole, brain: (x, y, z) bool, cells that hold any of the hole, and cells mostly in the brain.

    Returns:
        rows of `cells_from_hole` (Chebyshev distance from the cells that hold any of the hole; 0 is these), `cells`
        (how many of them lie mostly in the brain) and `rms_difference` between the latents of the full and of the
        voided image there, over channels and cells. NaN where there is no such cell.
    """
    distance, rows = ndimage.distance_transform_cdt(~hole, metric="chessboard"), []
    for k in range(FARTHEST_CELL + 1):
        there = brain & (distance == k)
        rows.append({"cells_from_hole": k, "cells": int(there.sum()), "rms_difference": rms((full - voided)[:, there])})
    return rows


def dilation_needed(rows: Sequence[dict[str, float]], fraction: float = 0.1) -> int:
    """The smallest dilation of the latent mask beyond which the hole changes latents little.

    Args:
        rows: of `hole_reach`.
        fraction: little is up to this share of the change in the hole's own cells.

    Returns:
        cells; the farthest distance in the rows says that at least so many are needed.
    """
    limit = fraction * rows[0]["rms_difference"]
    return max((row["cells_from_hole"] for row in rows[1:] if row["rms_difference"] > limit), default=0)
