"""Encode and decode whole volumes, or only the region around the mask."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_lib.autoencoder.linear_codec import LinearCodec
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.devices import autocast, timed
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box, in_voxels, latent_mask

AnyCodec = Autoencoder | LinearCodec


@dataclass(frozen=True)
class Reconstruction:
    """Hold an image that was encoded and decoded, and the seconds that each took."""

    latent: np.ndarray  # (c, x/f, y/f, z/f) float32, the standardised posterior mean
    volume: np.ndarray  # (x, y, z) float32, decoded from it
    encode_s: float
    decode_s: float


def reconstruct(autoencoder: AnyCodec, image: np.ndarray, *, device: torch.device, precision: str) -> Reconstruction:
    """Encode an image (x, y, z) into its posterior mean, decode it, and measure the time of both."""
    with torch.inference_mode(), autocast(device, precision):
        encode_s, latent = timed(lambda: autoencoder.encode(as_batch(image, device)).cpu(), device)
        decode_s, volume = timed(lambda: autoencoder.decode(latent.to(device)).cpu(), device)
    return Reconstruction(latent[0].numpy(), volume[0, 0].numpy(), encode_s, decode_s)


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
    inside = in_voxels((slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True)), factor)
    volume = decoded.new_zeros((*decoded.shape[:2], *mask.shape))
    volume[(..., *in_voxels(box, factor))] = decoded[(..., *inside)]
    return volume


def as_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """Turn an image (x, y, z) into a batch (1 1 x y z) on the device."""
    return torch.from_numpy(image)[None, None].to(device)
