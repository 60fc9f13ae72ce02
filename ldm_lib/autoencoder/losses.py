"""Compute the adversarial loss of the autoencoder: a patch discriminator and its least-squares GAN losses.

reconstructed and original volumes (b 1 x y z) => a loss
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.func import functional_call

from ldm_lib.autoencoder._monai import PatchDiscriminator
from ldm_lib.autoencoder.options import SMALLEST_DISCRIMINATOR_CROP_VOX as SMALLEST
from ldm_lib.errors import InputError


def patch_discriminator() -> nn.Module:
    """Build a patch discriminator (Isola et al., arXiv 1611.07004): (b 1 x y z) -> list of maps, the last its output.

    Each output is about a patch of 34 voxels per axis and depends on that patch alone. There is no normalisation
    layer: batch statistics would mix crops of the batch, and those of an instance hide a patch's level and contrast.
    """
    return PatchDiscriminator(spatial_dims=3, channels=16, in_channels=1, num_layers_d=2, norm=None, bias=True)


def generator_loss(discriminator: nn.Module, reconstruction: Tensor) -> Tensor:
    """Return mean (D(reconstruction) - 1)^2 (least-squares GAN, Mao et al., arXiv 1611.04076, labels 0 and 1).

    Gradients reach `reconstruction`, and not the discriminator.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return (_last_map(partial(functional_call, discriminator, frozen), reconstruction) - 1).square().mean()


def discriminator_loss(discriminator: nn.Module, reconstruction: Tensor, image: Tensor) -> Tensor:
    """Return (mean D(reconstruction)^2 + mean (D(image) - 1)^2) / 2; gradients reach the discriminator only."""
    fake, real = _last_map(discriminator, reconstruction.detach()), _last_map(discriminator, image.detach())
    return (fake.square().mean() + (real - 1).square().mean()) / 2


def _last_map(discriminator: Callable[[Tensor], Sequence[Tensor]], volume: Tensor) -> Tensor:
    """Return the discriminator's output (b 1 x' y' z'), float32.

    With two outputs per axis torch 2.13 returns NaN as bfloat16 weight gradient, hence the smallest crop.
    """
    if min(volume.shape[-3:]) < SMALLEST:
        cause = f"the discriminator needs {SMALLEST} voxels per axis, a crop has {list(volume.shape[-3:])}"
        raise InputError(cause, fix="enlarge crop, or set adversarial_weight to 0")
    return discriminator(volume.float())[-1].float()
