"""Fit in closed form what an autoencoder needs from the full images of a few training patients.

blocks of voxels => standard deviations of the input transform, linear codec;   latents => their shift and scale
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import islice

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm_lib.autoencoder.linear_codec import LinearCodec
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.devices import autocast
from ldm_lib.errors import TrainingError
from ldm_lib.geometry import block_mean

PATIENTS = 24  # enough: at 1 mm and a factor of 8 more than 100,000 blocks


def fit_linear_parts(autoencoder: Autoencoder, cases: Sequence[Case]) -> None:
    """Fit the parts that gradient descent does not train: the input transform and the linear codec."""
    if autoencoder.transform.channels > 1:
        _, covariance = block_statistics(cases, autoencoder.transform.factor)
        autoencoder.transform.fit(covariance)
    if autoencoder.linear is not None:
        fit_linear_codec(autoencoder.linear, cases)


def linear_baselines(autoencoder: Autoencoder, cases: Sequence[Case]) -> dict[str, LinearCodec]:
    """Return the linear codecs of equal size that an autoencoder has to outperform, on its device.

    "pca" decodes each block separately from its principal components; "linear", the autoencoder's own or else fitted
    here, from its neighbours too.
    """
    linear = autoencoder.linear
    if linear is None:
        linear = LinearCodec(autoencoder.latent_channels, autoencoder.factor).requires_grad_(False)
        fit_linear_codec(linear, cases)
    linear = linear.to(autoencoder.latent_mean.device)
    return {"pca": deepcopy(linear).decode_blocks_separately(), "linear": linear}


def fit_linear_codec(codec: LinearCodec, cases: Sequence[Case]) -> None:
    """Fit encoder and decoder of a linear codec."""
    codec.fit(*block_statistics(cases, codec.factor))
    count, latents, products = 0, 0, 0
    for image in _images(cases, codec.factor):
        with torch.no_grad():
            around = codec.neighbourhoods(torch.from_numpy(image)[None, None])
        used = around.any(dim=1)
        around, blocks = around[used], torch.from_numpy(_blocks(image, codec.factor)).double()[used]
        count, latents, products = count + len(blocks), latents + around.T @ around, products + around.T @ blocks
    codec.fit_estimate(latents / count, products / count)


def block_statistics(cases: Sequence[Case], factor: int) -> tuple[Tensor, Tensor]:
    """Return mean (f^3,) and covariance (f^3, f^3) of the blocks that contain any brain, float64."""
    count, total, products = 0, 0, 0
    for image in _images(cases, factor):
        blocks = _blocks(image, factor)
        blocks = torch.from_numpy(blocks[(blocks > 0).any(axis=1)]).double()
        count, total, products = count + len(blocks), total + blocks.sum(0), products + blocks.T @ blocks
    mean = total / count
    return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def _images(cases: Sequence[Case], factor: int) -> Iterator[np.ndarray]:
    """Yield the full image of a few patients, or else the voided one, (x, y, z) on the model's grid."""
    first: dict[str, Case] = {}  # of each patient
    for case in cases:
        first.setdefault(case.patient, case)
    for case in islice(first.values(), PATIENTS):
        data = grid_case(load_case(case), factor)
        yield data.voided if data.target is None else data.target


def _blocks(image: np.ndarray, factor: int) -> np.ndarray:
    """Cut an image (x, y, z) into blocks (n, f^3)."""
    return rearrange(image, "(x a) (y b) (z c) -> (x y z) (a b c)", a=factor, b=factor, c=factor)


def latent_brain_mask(image: np.ndarray, factor: int) -> np.ndarray:
    """Return the latent voxels (x/f, y/f, z/f) bool that lie mostly in the brain."""
    return block_mean(image > 0, factor) > 0.5


def latent_statistics(
    autoencoder: Autoencoder, cases: Sequence[Case], *, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (c,) of the unstandardised latents over the brain, not air."""
    total, count = 0, 0
    for image in _images(cases, autoencoder.factor):
        with torch.inference_mode(), autocast(device, precision):
            mean, _ = autoencoder.moments(torch.from_numpy(image)[None, None].to(device))
        brain = torch.from_numpy(latent_brain_mask(image, autoencoder.factor)).to(device)
        inside = mean[0].double()[:, brain]
        total = total + torch.stack([inside.sum(1), inside.square().sum(1)])
        count += inside.shape[1]
    if not count:
        raise TrainingError("no latent voxel lies mostly in the brain", where="autoencoder", fix="use fewer halvings")
    mean, square = total / count
    return mean.float().cpu(), (square - mean.square()).clamp(min=0).sqrt().float().cpu()
