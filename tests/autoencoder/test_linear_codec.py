"""Laws of the linear codec's mirror image: which latent channels change their sign when a head is flipped."""

import pytest
import torch

from ldm_lib.autoencoder.linear_codec import LinearCodec
from ldm_lib.autoencoder.model import Autoencoder

CHANNELS, FACTOR = 12, 3
LEFT_RIGHT = 2  # axis of a batch (b c x y z)


def statistics(factor=FACTOR, seed=0):
    """Mean and covariance of blocks that know left from right: nothing about them is symmetric."""
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(factor**3, factor**3, generator=draw, dtype=torch.float64)
    return torch.randn(factor**3, generator=draw, dtype=torch.float64), root @ root.T


def volume(factor=FACTOR):
    return torch.rand(2, 1, 4 * factor, 2 * factor, 3 * factor, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def codec():
    """A fitted codec whose latent of air is not 0."""
    made = LinearCodec(CHANNELS, FACTOR).requires_grad_(False)
    made.fit(*statistics())
    return made


@pytest.fixture
def autoencoder(codec):
    made = Autoencoder.of(channels=(4, 4, 4), latent_channels=CHANNELS, blocks=1, spacing_mm=1.0, learned="none")
    made.linear.fit(*statistics(made.factor))
    return made.freeze()


def test_the_latent_of_a_mirror_image_is_the_latent_mirrored(codec):
    image, signs = volume(), codec.mirror.view(1, -1, 1, 1, 1)
    found, flipped = codec.encode(image.flip(LEFT_RIGHT)), codec.encode(image).flip(LEFT_RIGHT)
    torch.testing.assert_close(found, signs * flipped, atol=1e-4, rtol=1e-4)
    assert set(codec.mirror.tolist()) == {-1.0, 1.0}
    assert (found - flipped).abs().max() > 0.1, "without the signs it would not be"


def test_a_codec_of_axes_that_are_neither_even_nor_odd_has_no_mirror(codec):
    axes = codec.project.weight
    even, odd = (int((codec.mirror == sign).nonzero()[0]) for sign in (1, -1))
    axes[even] += axes[odd] * axes[even].norm() / axes[odd].norm()
    assert codec.mirror is None


def test_what_changes_its_sign_has_mean_0_whatever_was_found(autoencoder):
    mean, odd = torch.linspace(1, 2, CHANNELS), autoencoder.mirror < 0
    autoencoder.standardise(mean, torch.full((CHANNELS,), 2.0))
    assert 0 < odd.sum() < CHANNELS and not autoencoder.latent_mean[odd].any()
    assert torch.equal(autoencoder.latent_mean[~odd], mean[~odd])
    assert torch.equal(autoencoder.scale_factor, torch.full((CHANNELS,), 0.5))


def test_an_encoder_that_is_learnt_has_no_mirror_and_keeps_the_mean_that_was_found():
    learnt = Autoencoder.of(channels=(4, 4), latent_channels=8, blocks=1, spacing_mm=1.0)
    learnt.linear.fit(*statistics(2))
    learnt.standardise(torch.arange(1.0, 9.0), torch.ones(8))
    assert (learnt.linear.mirror < 0).any(), "its linear part has one"
    assert learnt.mirror is None and torch.equal(learnt.latent_mean, torch.arange(1.0, 9.0))


def test_odd_axes_see_nothing_of_what_is_symmetric(codec):
    image = volume()
    seen = codec.encode(image + image.flip(LEFT_RIGHT))
    odd = seen[:, codec.mirror < 0]
    torch.testing.assert_close(odd, -odd.flip(LEFT_RIGHT), atol=1e-4, rtol=0)
    assert codec.air[codec.mirror < 0].abs().max() < 1e-4, "air is symmetric"


def test_latents_that_are_standardised_have_the_mirror_of_their_codec(autoencoder):
    image = volume(autoencoder.factor)
    autoencoder.standardise(torch.linspace(-1, 2, CHANNELS), torch.linspace(0.1, 3, CHANNELS))
    found = autoencoder.encode(image.flip(LEFT_RIGHT))
    mirrored = autoencoder.mirror.view(1, -1, 1, 1, 1) * autoencoder.encode(image).flip(LEFT_RIGHT)
    torch.testing.assert_close(found, mirrored, atol=1e-3, rtol=1e-4)
