"""Encode blocks of voxels linearly, fitted in closed form: where an autoencoder starts, or all that it is."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

QUIET_LOG_VARIANCE = -6.0  # of the posterior with a linear codec: 1/20 of the latents' unit standard deviation
ALIKE = 0.999  # cosine of an axis and its mirror image, from which on it counts as even, or as odd below its negative


class LinearCodec(nn.Module):
    """Encode blocks of f x f x f voxels linearly, c numbers each.

    A block is projected on principal components. It is decoded from its own latent and those of the 26 blocks around
    it, by least squares, as lapped transforms do (Malvar & Staelin, IEEE Trans. ASSP 37 (1989) 553): no edges show
    between blocks, and the neighbours supply much that a block's own latent lacks. Air is 0 both ways.
    """

    def __init__(self, latent_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.project = nn.Conv3d(1, latent_channels, factor, stride=factor, bias=False)
        self.air = nn.Parameter(torch.zeros(latent_channels))  # the latent of air, so that latents have mean 0
        self.estimate = nn.Conv3d(latent_channels, factor**3, 3, padding=1, bias=False)

    def encode(self, volume: Tensor) -> Tensor:
        """Encode (b 1 x y z) into (b c x/f y/f z/f), float32 whatever the caller's precision."""
        with torch.autocast(volume.device.type, enabled=False):
            return self.project(volume.float()) + per_channel(self.air)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode (b c x y z) into (b 1 fx fy fz), float32 whatever the caller's precision."""
        with torch.autocast(latent.device.type, enabled=False):
            blocks, f = self.estimate(latent.float() - per_channel(self.air)), self.factor
            return rearrange(blocks, "b (i j k) x y z -> b 1 (x i) (y j) (z k)", i=f, j=f, k=f)

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Fit encoder and decoder to the mean (f^3,) and covariance (f^3, f^3) of blocks, each block separately.

        Without an offset the best axes are those of the second moment. A block and its mirror image, left to right,
        count as equally likely, so that each axis is even or odd. Latents have mean 0 and unit variance.
        """
        mean, covariance = mean.double(), covariance.double()
        other = self._mirrored
        second = covariance + torch.outer(mean, mean)
        mean, second = (mean + mean[other]) / 2, (second + second[other][:, other]) / 2
        covariance = second - torch.outer(mean, mean)
        _, axes = torch.linalg.eigh(second)
        axes = axes[:, [-1 - k % len(mean) for k in range(self.project.out_channels)]].T
        deviation = torch.einsum("ki,ij,kj->k", axes, covariance, axes).clamp(min=1e-8).sqrt()[:, None]
        self.project.weight.copy_((axes / deviation).view_as(self.project.weight))
        self.air.copy_(-(axes / deviation) @ mean)
        self.decode_blocks_separately()

    @property
    def _mirrored(self) -> Tensor:
        """Return (f^3,) the index of each voxel of a block, x y z, in its mirror image."""
        f = self.factor
        return torch.arange(f**3).view(f, f, f).flip(0).flatten()

    @property
    def mirror(self) -> Tensor | None:
        """Return (c,) 1 for even axes, -1 for odd ones: the latent of a mirror image is mirror * latent, flipped.

        None if an axis is neither.
        """
        axes = self.project.weight.detach().flatten(1)
        alike = F.cosine_similarity(axes, axes[:, self._mirrored.to(axes.device)])
        return alike.sign() if bool((alike.abs() > ALIKE).all()) else None

    @torch.no_grad()
    def decode_blocks_separately(self) -> "LinearCodec":
        """Decode each block from its own latent alone from here on."""
        self.estimate.weight.zero_()
        self.estimate.weight[:, :, 1, 1, 1] = torch.linalg.pinv(self.project.weight.flatten(1).double()).float()
        return self

    @torch.no_grad()
    def fit_estimate(self, latents: Tensor, blocks: Tensor) -> None:
        """Fit the decoder by least squares, in the presence of the posterior's noise.

        Args:
            latents: (27 c, 27 c) mean products of `neighbourhoods` with themselves.
            blocks: (27 c, f^3) mean products of `neighbourhoods` with the voxels of the block in their centre.
        """
        noise = math.exp(QUIET_LOG_VARIANCE) * torch.eye(len(latents), dtype=torch.float64)
        weight = torch.linalg.solve(latents.double() + noise, blocks.double())
        self.estimate.weight.copy_(weight.T.view_as(self.estimate.weight))

    def neighbourhoods(self, volume: Tensor) -> Tensor:
        """Return (x/f y/f z/f, 27 c) float64: latents less that of air, of each block of (1 1 x y z) and around it."""
        latent = F.pad(self.encode(volume)[0] - self.air.view(-1, 1, 1, 1), (1,) * 6).double()
        return rearrange(latent.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1), "c x y z i j k -> (x y z) (c i j k)")


def per_channel(values: Tensor) -> Tensor:
    """Reshape (c,) so that it broadcasts over (b c x y z)."""
    return values.view(1, -1, 1, 1, 1)
