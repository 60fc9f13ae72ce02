"""The adversarial loss of the autoencoder: a patch discriminator and its least-squares GAN losses.

volumes rebuilt and original (b 1 x y z) => a loss
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.func import functional_call

from ldm_lib.autoencoder._monai import PatchDiscriminator
from ldm_lib.autoencoder.options import SMALLEST_DISCRIMINATOR_CROP_VOX
from ldm_lib.errors import InputError


def patch_discriminator() -> nn.Module:
    """A patch discriminator (Isola et al., arXiv 1611.07004): (b 1 x y z) -> list of maps, the last its answers.

    Each answer judges a patch of 34 voxels an axis by that patch alone. There is no normalisation layer: statistics of
    a batch would tie an answer to the other crops and to how much of them is air or hole, those of an instance hide
    a patch's level and contrast.
    """
    return PatchDiscriminator(spatial_dims=3, channels=16, in_channels=1, num_layers_d=2, norm=None, bias=True)


def generator_loss(discriminator: nn.Module, rebuilt: Tensor) -> Tensor:
    """mean (D(rebuilt) - 1)^2 (least squares GAN: Mao et al., arXiv 1611.04076, labels 0 and 1).

    Gradients reach `rebuilt`, and not the discriminator.

    Raises:
        InputError: crops of fewer than 20 voxels an axis.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return (_answers(partial(functional_call, discriminator, frozen), rebuilt) - 1).square().mean()


def discriminator_loss(discriminator: nn.Module, rebuilt: Tensor, image: Tensor) -> Tensor:
    """(mean D(rebuilt)^2 + mean (D(image) - 1)^2) / 2; gradients reach the discriminator only.

    Raises:
        InputError: crops of fewer than 20 voxels an axis.
    """
    fake, real = _answers(discriminator, rebuilt.detach()), _answers(discriminator, image.detach())
    return (fake.square().mean() + (real - 1).square().mean()) / 2


def _answers(discriminator: Callable[[Tensor], Sequence[Tensor]], volume: Tensor) -> Tensor:
    """Its last map (b 1 x' y' z'), float32; of two answers an axis torch 2.13 takes NaN as bfloat16 weight gradient."""
    if min(volume.shape[-3:]) < SMALLEST_DISCRIMINATOR_CROP_VOX:
        given = f"the discriminator needs {SMALLEST_DISCRIMINATOR_CROP_VOX} voxels an axis, a crop has {list(volume.shape[-3:])}"
        raise InputError(given, fix="enlarge crop, or set adversarial_weight to 0")
    return discriminator(volume.float())[-1].float()
