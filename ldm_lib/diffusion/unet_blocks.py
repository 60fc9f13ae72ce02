"""Define the building blocks of the denoiser: residual blocks, attention, and norms in float32."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BlockSequence(nn.Sequential):
    """Apply residual blocks, which see the timestep, and attention, which does not, one after another."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (b c x y z), given the embedding (b e) of the timestep."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class ResidualBlock(nn.Module):
    """Apply a BigGAN-style residual block: both branches resampled, the second norm scaled and shifted by t.

    Source: Dhariwal & Nichol 2021, section 3.1 (adaptive group normalisation, eq. 3).
    """

    def __init__(
        self, inside: int, outside: int, embedding: int, *, dropout: float = 0.0, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1, self.conv1 = Norm(inside), conv(inside, outside)
        self.scale_shift = nn.Linear(embedding, 2 * outside)
        self.norm2, self.conv2 = Norm(outside), zero(conv(outside, outside))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if inside == outside else nn.Conv3d(inside, outside, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (b c x y z), given the embedding (b e) of the timestep."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.scale_shift(embedding)[:, :, None, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Add multi-head self-attention over all latent voxels."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b c x y z)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.projection(attended).transpose(1, 2).unflatten(2, x.shape[2:])


class Conv(nn.Conv3d):
    """Convolve, in float32 on a CPU where an axis has one or two voxels.

    There the bfloat16 weight gradient of torch 2.13 reads uninitialised memory and is sometimes NaN.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (b c x y z)."""
        if x.device.type != "cpu" or min(x.shape[2:]) > 2:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Norm(nn.GroupNorm):
    """Normalise over groups of channels, in float32 under any autocast.

    There are 32 groups, or fewer where the channels do not divide or a group would have fewer than four channels: a
    group of one channel would lose the channel's mean.
    """

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        super().__init__(max(n for n in range(1, most + 1) if channels % n == 0), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b c x y z); the result has the dtype of x."""
        return super().forward(x.float()).to(x.dtype)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Return cosines and sines of t (b,) at width // 2 frequencies from 1 down to 1e-4: (b width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    """Build a 3x3x3 convolution that keeps the size of its input."""
    return Conv(in_channels, out_channels, 3, padding=1)


def zero(module: nn.Module) -> nn.Module:
    """Set the weights of a module to 0 and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
