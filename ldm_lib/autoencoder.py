"""The autoencoder: volumes to latents and back, MONAI's AutoencoderKL behind a contract of four words.

volume (b 1 x y z) => posterior mean => standardised latent (b c x/f y/f z/f) => volume
"""

import math
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

from ldm_lib.errors import InputError


class Autoencoder(nn.Module):
    """AutoencoderKL (Rombach et al., arXiv 2112.10752) without attention, and the statistics of its latents.

    Args:
        channels: width of each level; each level but the last halves every axis.
        latent_channels: numbers per latent cell.
        blocks: residual blocks per level.
        spacing_mm: voxel size it was trained at.
    """

    def __init__(self, *, channels: tuple[int, ...], latent_channels: int, blocks: int, spacing_mm: float) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": list(channels),
            "latent_channels": latent_channels,
            "blocks": blocks,
            "spacing_mm": float(spacing_mm),
        }
        self.network = AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=tuple(channels),
            attention_levels=(False,) * len(channels),
            num_res_blocks=(blocks,) * len(channels),
            latent_channels=latent_channels,
            norm_num_groups=math.gcd(8, *channels),
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("scale_factor", torch.ones(latent_channels))

    @property
    def factor(self) -> int:
        """Voxels per latent cell and axis."""
        return 2 ** (len(self.config["channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    @property
    def spacing_mm(self) -> float:
        return self.config["spacing_mm"]

    def moments(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, before standardisation."""
        self._require_divisible(volume)
        return self.network.encode(volume)

    def encode(self, volume: Tensor) -> Tensor:
        """Normalised volume (b 1 x y z) -> standardised posterior mean (b c x/f y/f z/f), float32."""
        mean, _ = self.moments(volume)
        return (mean.float() - _per_channel(self.latent_mean)) * _per_channel(self.scale_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Standardised latent (b c x y z) -> normalised volume (b 1 fx fy fz), float32."""
        raw = latent / _per_channel(self.scale_factor) + _per_channel(self.latent_mean)
        return self.network.decode(raw).float()

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set shift and scale (c,) from latents' statistics before standardisation; scale factor = 1 / std."""
        self.latent_mean.copy_(mean)
        self.scale_factor.copy_(1 / std.clamp(min=1e-6))

    def freeze(self) -> "Autoencoder":
        """Evaluation mode, no gradients."""
        return self.eval().requires_grad_(False)

    def _require_divisible(self, volume: Tensor) -> None:
        if any(n % self.factor for n in volume.shape[-3:]):
            raise InputError(
                f"shape {tuple(volume.shape[-3:])} is not divisible by {self.factor}: the network would shorten it",
                fix="pad it with geometry.Frame",
            )


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), the mean over latent elements (Kingma & Welling, arXiv 1312.6114, app. B)."""
    return 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).mean()


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
