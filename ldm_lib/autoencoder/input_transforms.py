"""Transform voxels before the autoencoder's network, and back after it.

plain   voxels as they are                               1 channel,   1 voxel per axis
haar    two levels of orthonormal Haar wavelet packets   64 channels, 4 voxels per axis; lossless
"""

from functools import reduce

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

HAAR_LEVELS = 2


class Plain(nn.Module):
    """Leave voxels as they are."""

    channels, factor = 1, 1

    def analyse(self, volume: Tensor) -> Tensor:
        """Transform a volume (b 1 x y z) into the input of the network."""
        return volume

    def synthesise(self, bands: Tensor) -> Tensor:
        """Transform the output of the network into a volume (b 1 x y z)."""
        return bands

    def fit(self, covariance: Tensor) -> None:
        """Fit nothing: this transform has no parameters."""


class Haar(Plain):
    """Transform blocks of 4x4x4 voxels into 64 wavelet sub-bands, each divided by its standard deviation in training.

    The transform is orthonormal, so that its transpose is its inverse; the lowest sub-band has gain 8 (Haar 1910;
    packets: Coifman & Wickerhauser, IEEE Trans. Inf. Theory 38 (1992) 713).
    """

    channels, factor = 8**HAAR_LEVELS, 2**HAAR_LEVELS

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", haar_packets(HAAR_LEVELS), persistent=False)
        self.register_buffer("deviation", torch.ones(self.channels))

    def analyse(self, volume: Tensor) -> Tensor:
        """Transform a volume (b 1 x y z) into sub-bands (b 64 x/4 y/4 z/4) of about unit variance."""
        with torch.autocast(volume.device.type, enabled=False):
            return F.conv3d(volume.float(), self.kernel, stride=self.factor) / self.deviation.view(1, -1, 1, 1, 1)

    def synthesise(self, bands: Tensor) -> Tensor:
        """Invert `analyse` exactly."""
        with torch.autocast(bands.device.type, enabled=False):
            scaled = bands.float() * self.deviation.view(1, -1, 1, 1, 1)
            return F.conv_transpose3d(scaled, self.kernel, stride=self.factor)

    @torch.no_grad()
    def fit(self, covariance: Tensor) -> None:
        """Set the standard deviations from the covariance (64, 64) of training blocks of 4x4x4 voxels."""
        basis = self.kernel.flatten(1).double()
        variance = torch.einsum("ki,ij,kj->k", basis, covariance.double(), basis)
        self.deviation.copy_(variance.clamp(min=1e-8).sqrt())


TRANSFORMS: dict[str, type[Plain]] = {"plain": Plain, "haar": Haar}


def haar_packets(levels: int) -> Tensor:
    """Return the orthonormal kernels (8^levels, 1, 2^levels, 2^levels, 2^levels) of stride 2^levels.

    The first is that of the mean.
    """
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    axis = reduce(torch.kron, [step] * levels)
    blocks = torch.einsum("ax,by,cz->abcxyz", axis, axis, axis)
    return rearrange(blocks, "a b c x y z -> (a b c) 1 x y z").float()
