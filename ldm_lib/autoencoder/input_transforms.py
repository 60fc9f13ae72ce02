"""What stands before and after the autoencoder's network: fixed transforms between voxels and what it works on.

plain   voxels as they are                               1 channel,   1 voxel an axis
haar    two levels of orthonormal Haar wavelet packets   64 channels, 4 voxels an axis; loses nothing
half    half the resolution and back                     1 channel,   2 voxels an axis; loses the finest detail
"""

from functools import reduce

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

HAAR_LEVELS = 2


class Plain(nn.Module):
    """Voxels as they are."""

    channels, factor = 1, 1

    def analyse(self, volume: Tensor) -> Tensor:
        """(b 1 x y z) -> what the network sees."""
        return volume

    def synthesise(self, bands: Tensor) -> Tensor:
        """What the network returns -> (b 1 x y z)."""
        return bands

    def fit(self, covariance: Tensor) -> None:
        """Nothing to learn."""


class Haar(Plain):
    """Wavelet packets of blocks of 4x4x4 voxels: 64 sub-bands, each divided by its standard deviation in training.

    The transform is orthonormal, so that its transpose is its inverse; the lowest sub-band has gain 8 (Haar 1910;
    packets: Coifman & Wickerhauser, IEEE Trans. Inf. Theory 38 (1992) 713).
    """

    channels, factor = 8**HAAR_LEVELS, 2**HAAR_LEVELS

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", haar_packets(HAAR_LEVELS), persistent=False)
        self.register_buffer("deviation", torch.ones(self.channels))

    def analyse(self, volume: Tensor) -> Tensor:
        """(b 1 x y z) -> (b 64 x/4 y/4 z/4), sub-bands of about unit variance."""
        with torch.autocast(volume.device.type, enabled=False):
            return F.conv3d(volume.float(), self.kernel, stride=self.factor) / self.deviation.view(1, -1, 1, 1, 1)

    def synthesise(self, bands: Tensor) -> Tensor:
        """The exact inverse of `analyse`."""
        with torch.autocast(bands.device.type, enabled=False):
            scaled = bands.float() * self.deviation.view(1, -1, 1, 1, 1)
            return F.conv_transpose3d(scaled, self.kernel, stride=self.factor)

    @torch.no_grad()
    def fit(self, covariance: Tensor) -> None:
        """Set the deviations from the covariance (64, 64) of training blocks of 4x4x4 voxels."""
        basis = self.kernel.flatten(1).double()
        variance = torch.einsum("ki,ij,kj->k", basis, covariance.double(), basis)
        self.deviation.copy_(variance.clamp(min=1e-8).sqrt())


class Half(Plain):
    """Half the resolution: the mean of 2x2x2 voxels on the way in, linear interpolation on the way out."""

    factor = 2

    def analyse(self, volume: Tensor) -> Tensor:
        """(b 1 x y z) -> (b 1 x/2 y/2 z/2)."""
        return F.avg_pool3d(volume, self.factor)

    def synthesise(self, bands: Tensor) -> Tensor:
        """(b 1 x y z) -> (b 1 2x 2y 2z)."""
        return F.interpolate(bands, scale_factor=self.factor, mode="trilinear")


TRANSFORMS: dict[str, type[Plain]] = {"plain": Plain, "haar": Haar, "half": Half}


def haar_packets(levels: int) -> Tensor:
    """Orthonormal kernels (8^levels, 1, 2^levels, 2^levels, 2^levels) of stride 2^levels; the first is the mean's."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    axis = reduce(torch.kron, [step] * levels)
    blocks = torch.einsum("ax,by,cz->abcxyz", axis, axis, axis)
    return rearrange(blocks, "a b c x y z -> (a b c) 1 x y z").float()
