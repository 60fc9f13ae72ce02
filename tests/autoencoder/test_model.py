"""Laws of the autoencoder: what its numbers mean, and what it rejects."""

import doctest

import numpy as np
import pytest
import torch
from monai.networks.blocks import SABlock, SpatialAttentionBlock
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from ldm_lib.autoencoder import model
from ldm_lib.autoencoder.fitting import fit_linear_parts
from ldm_lib.autoencoder.model import Autoencoder, LocalNorm, kl_divergence
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.geometry import block_mean
from ldm_lib.model_io import load_model


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    small = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    return Autoencoder.of(**small | options)


def volume(*shape, seed=0):
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def test_kl_is_that_of_two_normals():
    mean, std = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4) + 0.1
    oracle = torch_kl(Normal(mean, std), Normal(0.0, 1.0)).mean()
    assert kl_divergence(mean, std).item() == pytest.approx(oracle.item(), rel=1e-5)
    assert kl_divergence(torch.zeros(1), torch.ones(1)) == 0


@pytest.mark.parametrize(("transform", "channels", "factor"), [
    ("plain", (8,), 1), ("plain", (4, 8, 8), 4), ("haar", (8,), 4), ("haar", (8, 8), 8),
])  # fmt: skip
def test_a_latent_voxel_is_factor_voxels_wide(transform, channels, factor):
    autoencoder = fresh(channels=channels, input_transform=transform).freeze()
    latent = autoencoder.encode(volume(8, 24, 16))
    assert autoencoder.factor == factor
    assert latent.shape == (1, 3, 8 // factor, 24 // factor, 16 // factor)
    assert autoencoder.decode(latent).shape == (1, 1, 8, 24, 16)


def test_a_shape_that_would_be_shortened_is_rejected():
    autoencoder = fresh(channels=(4, 4, 4)).freeze()
    with pytest.raises(InputError, match=r"\(8, 8, 155\) is not divisible by 4"):
        autoencoder.encode(volume(8, 8, 155))


def test_encoding_is_the_posterior_mean_and_draws_nothing():
    autoencoder = fresh().freeze()
    image, state = volume(8, 8, 8), torch.get_rng_state()
    latent = autoencoder.encode(image)
    mean, std = autoencoder.moments(image)
    assert torch.equal(latent, mean) and torch.equal(latent, autoencoder.encode(image))
    assert std.min() > 0
    assert torch.equal(state, torch.get_rng_state())


def test_standardising_is_undone_in_decoding():
    autoencoder, image = fresh().freeze(), volume(8, 8, 8)
    mean, std = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.01, 2.0, 30.0])
    raw = autoencoder.encode(image)
    before = autoencoder.decode(raw)
    autoencoder.standardise(mean, std)
    assert torch.allclose(autoencoder.scale_factor, 1 / std)
    latent = autoencoder.encode(image)
    assert torch.allclose(latent, (raw - mean.view(1, 3, 1, 1, 1)) / std.view(1, 3, 1, 1, 1), atol=1e-4)
    assert torch.allclose(autoencoder.decode(latent), before, atol=1e-4)


def test_standardised_latents_of_the_brain_have_mean_0_and_std_1(cases, tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, Autoencoder)  # standardised on these four cases
    seen = []
    for case in cases[:4]:
        image = grid_case(load_case(case), autoencoder.factor).target
        latent = autoencoder.encode(torch.from_numpy(image)[None, None])[0].numpy()
        seen.append(latent[:, block_mean(image > 0, autoencoder.factor) > 0.5])
    seen = np.concatenate(seen, axis=1)
    assert seen.shape[1] > 100
    np.testing.assert_allclose(seen.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(seen.std(axis=1), 1, atol=1e-3)


def test_a_local_norm_is_that_of_one_voxel():
    norm, x = LocalNorm(6, 1e-6), torch.randn(2, 6, 3, 4, 5)
    norm.weight.data.uniform_(), norm.bias.data.uniform_()
    voxel = x[1, :, 2, 1, 3].double()
    oracle = (voxel - voxel.mean()) / (voxel.var(correction=0) + 1e-6).sqrt() * norm.weight + norm.bias
    assert torch.allclose(norm(x)[1, :, 2, 1, 3].double(), oracle, atol=1e-5)


@pytest.mark.parametrize(("norm", "same"), [("local", True), ("group", False)])
def test_with_a_local_norm_a_crop_is_encoded_as_within_its_volume(norm, same):
    autoencoder = fresh(norm=norm).freeze()
    image = volume(40, 16, 16)
    whole, crop = autoencoder.encode(image)[0, :, :10], autoencoder.encode(image[:, :, :32])[0, :, :10]
    assert torch.allclose(whole, crop, atol=1e-5) is same


def test_without_a_learned_encoder_a_latent_voxel_sees_its_own_voxels_and_the_decoder_is_a_network():
    autoencoder = fresh(channels=(4, 8, 8), linear_start=True, learned="decoder")
    torch.nn.init.normal_(autoencoder.linear.project.weight)
    torch.nn.init.normal_(autoencoder.network.decoder.blocks[-1].conv.weight)
    image = volume(16, 16, 16)
    changed = image.clone()
    changed[..., :4, 4:8, 8:12] += 1
    with torch.inference_mode():
        before, after = autoencoder.encode(image), autoencoder.encode(changed)
        farther = (autoencoder.decode(after) != autoencoder.decode(before))[..., 8:, :, :].any()
    assert torch.equal(before, autoencoder.linear.encode(image))
    assert np.argwhere((before != after)[0].any(0).numpy()).tolist() == [[0, 1, 2]] and farther
    assert not [name for name in autoencoder.state_dict() if name.startswith(("network.encoder", "network.quant_conv"))]


def test_what_has_no_network_is_the_linear_codec(cases):
    autoencoder = fresh(channels=(4, 8, 8), linear_start=True, learned="none").freeze()
    fit_linear_parts(autoencoder, cases[:1])
    image = torch.from_numpy(grid_case(load_case(cases[0]), 4).target)[None, None]
    latent = autoencoder.linear.encode(image)
    assert torch.equal(autoencoder.encode(image), latent)
    assert torch.equal(autoencoder.decode(latent), autoencoder.linear.decode(latent))
    assert autoencoder.factor == 4 and {name.partition(".")[0] for name in autoencoder.state_dict()} == {
        "linear", "latent_mean", "scale_factor"}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), [
    ({"norm": "batch"}, "norm 'batch'"), ({"input_transform": "fourier"}, "input_transform 'fourier'"),
    ({"network": {"class": "VQVAE"}}, "class 'VQVAE'"), ({"learned": "all"}, "learned 'all'"),
    ({"learned": "none"}, "learned 'none' without linear_start"),
])  # fmt: skip
def test_what_cannot_be_built_is_rejected(changes, reason):
    with pytest.raises(ConfigError, match=f"no autoencoder with {reason}"):
        Autoencoder(**fresh().config | changes)


def test_the_example_is_right():
    found = doctest.testmod(model)
    assert found.attempted and not found.failed


def test_what_is_saved_is_loaded(tmp_path):
    autoencoder = fresh(linear_start=True).freeze()
    digest = autoencoder.save(tmp_path / "own", note="mine")
    again = Autoencoder.load(tmp_path / "own")
    assert again.folder_config["sha256"] == digest and again.folder_config["note"] == "mine"
    assert all(torch.equal(a, b) for a, b in zip(autoencoder.state_dict().values(), again.state_dict().values()))  # noqa: B905
    (tmp_path / "model").mkdir()
    autoencoder.save(tmp_path / "model" / "autoencoder")  # of a latent diffusion model
    assert Autoencoder.load(tmp_path / "model").folder_config["sha256"] == digest


def test_an_image_of_any_shape_is_reconstructed_within_its_padding():
    autoencoder = fresh(channels=(4, 8, 8)).freeze()
    image = volume(16, 16, 12)[0, 0].numpy()
    whole = autoencoder.decode(autoencoder.encode(torch.from_numpy(image)[None, None]))[0, 0].numpy()
    np.testing.assert_array_equal(autoencoder.reconstruct(image), whole)
    padded = np.pad(image, [(1, 1), (0, 0), (1, 2)])[:, :, :15]  # the padding of an odd shape is 0 on both sides
    assert autoencoder.reconstruct(padded).shape == padded.shape == (18, 16, 15)


def test_there_is_no_attention():
    kinds = {type(module) for module in fresh(channels=(4, 4, 4)).modules()}
    assert not kinds & {SpatialAttentionBlock, SABlock}


def test_the_statistics_are_kept_with_the_weights(tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, Autoencoder)
    assert autoencoder.spacing_mm == 8.0
    assert not torch.equal(autoencoder.scale_factor, torch.ones(3)) and autoencoder.latent_mean.any()


def test_the_build_is_plain_json_and_builds_the_same_again():
    one = fresh(input_transform="haar", channels=(8, 16), linear_start=True)
    again = Autoencoder(**one.config)
    again.load_state_dict(one.state_dict())
    image = volume(16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(one.moments(image)[0], again.moments(image)[0])


def test_the_linear_codec_is_not_trained():
    autoencoder = fresh(linear_start=True)
    assert not any(p.requires_grad for p in autoencoder.linear.parameters())
    assert all(p.requires_grad for p in autoencoder.network.parameters())
