"""Laws of the fixed transforms around the autoencoder's network."""

from typing import get_args

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from ldm_lib.autoencoder.input_transforms import TRANSFORMS, Haar, haar_packets
from ldm_lib.autoencoder.options import TRANSFORM_FACTORS
from ldm_lib.experiment.stages import AutoencoderConfig


def volume(*shape, seed=0):
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [1, 2])
def test_the_packets_are_orthonormal_and_of_one_sign_pattern_each(levels):
    kernels = haar_packets(levels).flatten(1).double()
    np.testing.assert_allclose(kernels @ kernels.T, np.eye(8**levels), atol=1e-6)
    expected = {tuple(row) for row in hadamard(8**levels)}  # Haar packets are Walsh functions
    assert {tuple(row) for row in kernels.sign().int().tolist()} == expected


def test_the_lowest_sub_band_is_the_mean_with_gain_8():
    transform, image = Haar(), volume(8, 4, 4)
    blocks = image[0, 0].reshape(2, 4, 4, 4).mean(dim=(1, 2, 3))
    assert torch.allclose(transform.analyse(image)[0, 0, :, 0, 0], 8 * blocks, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "haar"])
def test_the_inverse_is_exact(name):
    transform, image = TRANSFORMS[name](), volume(16, 8, 12)
    if name == "haar":
        transform.deviation.uniform_(0.01, 3)
    bands = transform.analyse(image)
    assert bands.shape == (1, transform.channels, *(n // transform.factor for n in image.shape[2:]))
    assert torch.allclose(transform.synthesise(bands), image, atol=1e-6)


def test_fitted_sub_bands_have_unit_variance():
    transform = Haar()
    draw = np.random.default_rng(0)
    smooth = draw.normal(size=(64, 64)) @ np.diag(np.linspace(0.05, 2, 64))
    blocks = draw.normal(size=(20000, 64)) @ smooth.T
    transform.fit(torch.from_numpy(np.cov(blocks.T)))
    image = torch.from_numpy(blocks.reshape(-1, 1, 4, 4, 4).astype(np.float32))
    np.testing.assert_allclose(transform.analyse(image).flatten(1).std(0), 1, rtol=1e-3)


def test_parameters_know_every_transform_and_its_factor():
    assert {name: cls.factor for name, cls in TRANSFORMS.items()} == TRANSFORM_FACTORS
    assert list(TRANSFORMS) == list(get_args(AutoencoderConfig.model_fields["input_transform"].annotation))


def test_the_inverse_is_exact_under_autocast():
    transform, image = Haar(), volume(8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(transform.synthesise(transform.analyse(image)), image, atol=1e-6)
