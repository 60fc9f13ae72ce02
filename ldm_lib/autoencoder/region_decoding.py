"""Encode and decode whole volumes, or only the region around the mask."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_lib.autoencoder.linear_codec import LinearCodec
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.devices import autocast
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box, latent_mask

AnyCodec = Autoencoder | LinearCodec


@dataclass(frozen=True)
class Reconstruction:
    """Hold an image that was encoded and decoded.

    Attributes:
        latent: (c, x/f, y/f, z/f) float32, the standardised posterior mean.
        volume: (x, y, z) float32, decoded from it.
        encode_s, decode_s: seconds for encoding and decoding.
    """

    latent: np.ndarray
    volume: np.ndarray
    encode_s: float
    decode_s: float


def reconstruct(autoencoder: AnyCodec, image: np.ndarray, *, device: torch.device, precision: str) -> Reconstruction:
    """Encode an image (x, y, z) into its posterior mean, decode it, and measure the time of both."""
    times = [time.perf_counter()]
    with torch.inference_mode(), autocast(device, precision):
        latent = autoencoder.encode(as_batch(image, device)).cpu()
        times.append(time.perf_counter())
        volume = autoencoder.decode(latent.to(device)).cpu()
        times.append(time.perf_counter())
    return Reconstruction(latent[0].numpy(), volume[0, 0].numpy(), *np.diff(times).tolist())


def decode_box(autoencoder: AnyCodec, latent: Tensor, mask: np.ndarray, margin: int) -> Tensor:
    """Decode only the region around the mask: the bounding box of its latent voxels, and a margin.

    With norms of one voxel and a margin as wide as the decoder's receptive field this equals full decoding; norms over
    the grid (GroupNorm) make it an approximation, see `box_loss_db`. Runs in the caller's precision.

    Args:
        latent: (b c x y z), standardised, all of one mask.
        mask: (fx, fy, fz) bool, True = inpaint; not empty.
        margin: latent voxels around the box, as far as the grid goes.

    Returns:
        (b 1 fx fy fz), 0 outside the box.
    """
    if not mask.any():
        raise InputError("the mask is empty", fix="give a mask of the region to inpaint")
    factor = autoencoder.factor
    masked = latent_mask(mask, factor)
    box, wide = bounding_box(masked, 0), bounding_box(masked, margin)
    decoded = autoencoder.decode(latent[(..., *wide)])
    spans = ((b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True))
    inside = tuple(slice(start * factor, stop * factor) for start, stop in spans)
    volume = decoded.new_zeros((*decoded.shape[:2], *mask.shape))
    volume[(..., *(slice(b.start * factor, b.stop * factor) for b in box))] = decoded[(..., *inside)]
    return volume


def as_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """Turn an image (x, y, z) into a batch (1 1 x y z) on the device."""
    return torch.from_numpy(image)[None, None].to(device)
