"""Laws of the adversarial loss: least squares, which network the gradients reach, and what an output depends on."""

import pytest
import torch
from monai.losses import PatchAdversarialLoss
from torch import nn
from torch.nn import functional as F

from ldm_lib.autoencoder.losses import discriminator_loss, generator_loss, patch_discriminator
from ldm_lib.errors import InputError


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(volume):
    """What a blurry autoencoder returns: means of 3 x 3 x 3 voxels."""
    return F.avg_pool3d(volume, 3, stride=1, padding=1)


def fresh_discriminator():
    torch.manual_seed(0)
    discriminator = patch_discriminator()
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter, std=0.1)  # outputs far from zero, on both sides
    return discriminator


class MeanOfInput(nn.Module):
    """Return maps of which the last is the mean of the input."""

    def forward(self, volume):
        return [100 * volume, volume.mean().expand(len(volume), 1, 3, 3, 3)]


@pytest.mark.parametrize(("fake", "real"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.8), (-0.5, -2.0), (3.0, 2.0)])
def test_the_losses_are_those_of_least_squares(fake, real):
    reconstruction, image = torch.full((2, 1, 20, 20, 20), fake), torch.full((2, 1, 20, 20, 20), real)
    discriminator = MeanOfInput()
    assert generator_loss(discriminator, reconstruction).item() == pytest.approx((fake - 1) ** 2, abs=1e-6)
    oracle = 0.5 * (fake**2 + (real - 1) ** 2)
    assert discriminator_loss(discriminator, reconstruction, image).item() == pytest.approx(oracle, abs=1e-6)


def test_the_losses_are_monais_without_its_activation():
    oracle = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
    discriminator = fresh_discriminator()
    reconstruction, image = noise(2, 1, 28, 24, 20), noise(2, 1, 28, 24, 20, seed=1)
    fake, real = discriminator(reconstruction)[-1], discriminator(image)[-1]
    assert fake.min() < -0.01 and fake.numel() == 2 * 5 * 4 * 3
    halves = [oracle(fake, target_is_real=False, for_discriminator=True), oracle(real, True, True)]
    assert torch.allclose(discriminator_loss(discriminator, reconstruction, image), sum(halves) / 2)
    assert torch.allclose(generator_loss(discriminator, reconstruction), oracle(fake, True, False))


def test_the_discriminators_loss_trains_the_discriminator_alone():
    discriminator, reconstruction = fresh_discriminator(), noise(1, 1, 20, 20, 20).requires_grad_()
    image = noise(1, 1, 20, 20, 20, seed=1).requires_grad_()
    discriminator_loss(discriminator, reconstruction, image).backward()
    assert reconstruction.grad is None and image.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.parameters())


def test_the_generators_loss_trains_the_generator_alone():
    """And its gradient is the one that a discriminator with gradients gives."""
    discriminator, reconstruction = fresh_discriminator(), noise(1, 1, 20, 20, 20).requires_grad_()
    (oracle,) = torch.autograd.grad((discriminator(reconstruction)[-1] - 1).square().mean(), reconstruction)
    generator_loss(discriminator, reconstruction).backward()
    assert torch.allclose(reconstruction.grad, oracle) and oracle.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())


def test_a_discriminator_learns_to_tell_blurred_from_sharp():
    """Better than 1/4, the least that an output which ignores its input can have, on crops it has not seen."""
    torch.manual_seed(0)
    discriminator = patch_discriminator().train()
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=5e-4)

    def loss(seed):
        image = noise(2, 1, 20, 20, 20, seed=seed)
        return discriminator_loss(discriminator, smooth(image), image)

    for step in range(60):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    assert loss(1000).item() < 0.05


def test_an_output_depends_on_no_other_crop_of_the_batch():
    discriminator, image = fresh_discriminator().train(), noise(3, 1, 16, 16, 16)
    alone = discriminator(image[:1])[-1]
    image[1] = 0
    image[2] *= 10
    assert torch.allclose(discriminator(image)[-1][:1], alone, atol=1e-6)
    assert not list(discriminator.buffers())  # no running statistics either


def test_an_output_depends_on_its_patch_of_34_voxels_alone():
    discriminator, image = fresh_discriminator().train(), noise(1, 1, 48, 48, 48).requires_grad_()
    output = discriminator(image)[-1]
    output[0, 0, 5, 5, 5].backward()
    for axes in ((1, 2), (0, 2), (0, 1)):
        seen = image.grad[0, 0].abs().amax(dim=axes).nonzero()
        assert seen.max() - seen.min() + 1 == 34
    crop = discriminator(image[..., 4:, 4:, 4:])[-1]  # by one output voxel; those at the cut see padding
    assert torch.allclose(crop[..., 4:-4, 4:-4, 4:-4], output[..., 5:-4, 5:-4, 5:-4], atol=1e-5)


@pytest.mark.parametrize("edge", [20, 24, 32])
def test_bfloat16_gives_the_same_loss_and_gradient(edge):
    discriminator, shape = fresh_discriminator(), (1, 1, edge, edge, edge)
    reconstruction, image = noise(*shape), noise(*shape, seed=1)

    def gradient():
        loss = discriminator_loss(discriminator, reconstruction, image)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, list(discriminator.parameters()))
        return loss.item(), torch.cat([one.flatten() for one in found])

    loss, exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half = gradient()
    assert half_loss == pytest.approx(loss, rel=0.03)
    assert discriminator_loss(discriminator, reconstruction.bfloat16(), image).item() == pytest.approx(loss, rel=0.03)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_too_small_crops_are_rejected():
    with pytest.raises(InputError, match=r"needs 20 voxels per axis, a crop has \[24, 19, 24\]"):
        generator_loss(patch_discriminator(), noise(1, 1, 24, 19, 24))
