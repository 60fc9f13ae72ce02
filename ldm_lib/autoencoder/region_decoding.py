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
    """An image that went through an autoencoder.

    Attributes:
        latent: (c, x/f, y/f, z/f) float32, the standardised posterior mean.
        rebuilt: (x, y, z) float32, decoded from it.
        encode_s, decode_s: seconds that it took.
    """

    latent: np.ndarray
    rebuilt: np.ndarray
    encode_s: float
    decode_s: float


def reconstruct(autoencoder: AnyCodec, image: np.ndarray, *, device: torch.device, precision: str) -> Reconstruction:
    """Encode and decode an image (x, y, z), both ways through the posterior mean."""
    moments = [time.perf_counter()]
    with torch.inference_mode(), autocast(device, precision):
        latent = autoencoder.encode(as_batch(image, device)).cpu()
        moments.append(time.perf_counter())
        rebuilt = autoencoder.decode(latent.to(device)).cpu()
        moments.append(time.perf_counter())
    return Reconstruction(latent[0].numpy(), rebuilt[0, 0].numpy(), *np.diff(moments).tolist())


def decode_box(autoencoder: AnyCodec, latent: Tensor, mask: np.ndarray, margin: int) -> Tensor:
    """Decode only what is needed around the hole.

    The cells that hold any of the hole, boxed, are decoded together with `margin` cells around the box, as far as the
    grid goes. With norms of one voxel and a margin as wide as the decoder's receptive field, this is full decoding;
    norms over the grid (GroupNorm) make it an approximation, see `box_loss_db`. Runs in the caller's precision.

    Args:
        latent: (b c x y z), standardised, all of one mask.
        mask: (fx, fy, fz) bool, True = fill this.
        margin: cells.

    Returns:
        (b 1 fx fy fz), 0 outside the box.

    Raises:
        InputError: the mask is empty.
    """
    factor = autoencoder.factor
    cells = latent_mask(mask, factor)
    box, wide = latent_box(cells, 0), latent_box(cells, margin)
    decoded = autoencoder.decode(latent[(..., *wide)])
    inside = tuple(
        slice((b.start - w.start) * factor, (b.stop - w.start) * factor) for b, w in zip(box, wide, strict=True)
    )
    volume = decoded.new_zeros((*decoded.shape[:2], *mask.shape))
    volume[(..., *(slice(b.start * factor, b.stop * factor) for b in box))] = decoded[(..., *inside)]
    return volume


def latent_box(cells: np.ndarray, margin: int) -> tuple[slice, ...]:
    """Bounding box of cells (x, y, z) bool, grown by `margin` cells on every side as far as the grid goes.

    Raises:
        InputError: no cell is set.
    """
    if not cells.any():
        raise InputError("the mask is empty", fix="give the mask of a hole")
    return bounding_box(cells, margin)


def as_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """(x, y, z) -> (1 1 x y z) on the device."""
    return torch.from_numpy(image)[None, None].to(device)
