"""Laws of what is fitted in closed form, against loops and decompositions by numpy."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm_lib.autoencoder import fitting
from ldm_lib.autoencoder.fitting import (
    block_statistics,
    fit_linear_codec,
    fit_linear_parts,
    latent_statistics,
    linear_baselines,
)
from ldm_lib.autoencoder.linear_codec import LinearCodec
from ldm_lib.autoencoder.model import QUIET_LOG_VARIANCE, Autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.errors import TrainingError
from ldm_lib.geometry import block_mean

HOW = {"device": torch.device("cpu"), "precision": "32"}


def fresh(**options):
    torch.manual_seed(0)
    small = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": True}
    return Autoencoder.of(**small | options)


def fitted(cases, latent_channels=3, factor=2, *, alone=False):
    """A linear codec of some cases; alone: each block decoded by itself."""
    codec = LinearCodec(latent_channels, factor)
    if alone:
        codec.fit(*block_statistics(cases, factor))
    else:
        fit_linear_codec(codec, cases)
    return codec


def image_of(case, factor=2):
    return torch.from_numpy(grid_case(load_case(case), factor).target)[None, None]


def blocks_of(cases):
    """Every 2 x 2 x 2 block with any brain in it, as rows of eight voxels: a loop as oracle."""
    rows = []
    for case in cases:
        image = grid_case(load_case(case), 2).target
        for x, y, z in np.argwhere(block_mean(image > 0, 2) > 0):
            rows.append(image[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].ravel())
    return np.array(rows, np.float64)


def mean_square(codec, image):
    with torch.inference_mode():
        return float((codec.decode(codec.encode(image)) - image)[image > 0].square().mean())


# ---- blocks and their principal components


def test_block_statistics_are_mean_and_covariance(cases):
    blocks = blocks_of([cases[0], cases[2]])
    mean, covariance = block_statistics([cases[0], cases[2]], 2)
    np.testing.assert_allclose(mean, blocks.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(blocks.T), rtol=1e-6, atol=1e-12)


def test_a_few_patients_are_enough_and_each_is_seen_once(cases, monkeypatch):
    monkeypatch.setattr(fitting, "PATIENTS", 2)
    mean, _ = block_statistics(cases, 2)
    np.testing.assert_allclose(mean, blocks_of([cases[0], cases[2]]).mean(axis=0), rtol=1e-9)


def with_mirror_images(blocks):
    """(n, 8) -> (2n, 8): the blocks, and each mirrored left to right."""
    return np.concatenate([blocks, blocks.reshape(-1, 2, 2, 2)[:, ::-1].reshape(-1, 8)])


def test_a_block_is_projected_on_its_principal_components(cases):
    """Against numpy's SVD of the blocks, which takes no mean off: air is encoded without an offset too."""
    few = [cases[0], cases[2]]
    codec, blocks = fitted(few, alone=True), with_mirror_images(blocks_of(few))
    axes = np.linalg.svd(blocks, full_matrices=False)[2][:3]
    volume = torch.from_numpy(blocks.astype(np.float32)).view(-1, 1, 2, 2, 2)
    with torch.inference_mode():
        latents = codec.encode(volume)
        decoded = codec.decode(latents)
    np.testing.assert_allclose(decoded.numpy().reshape(blocks.shape), blocks @ axes.T @ axes, atol=1e-4)
    np.testing.assert_allclose(latents.flatten(1).numpy().mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(latents.flatten(1).numpy().std(axis=0), 1, atol=1e-3)


# ---- a block by itself and its neighbours


def test_the_estimate_is_least_squares_on_27_latents(cases):
    """Against a loop over blocks and numpy's solver."""
    codec, image = fitted(cases[:1]), image_of(cases[0])
    with torch.inference_mode():
        latents = (codec.encode(image)[0] - codec.air.view(-1, 1, 1, 1)).double().numpy()
        decoded = codec.decode(codec.encode(image))[0, 0].numpy()
    padded, volume = np.pad(latents, [(0, 0), (1, 1), (1, 1), (1, 1)]), image[0, 0].double().numpy()
    around, blocks, places = [], [], []
    for x, y, z in product(*map(range, latents.shape[1:])):
        near = padded[:, x : x + 3, y : y + 3, z : z + 3].ravel()
        if near.any():
            around.append(near)
            blocks.append(volume[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].ravel())
            places.append((x, y, z))
    around, blocks = np.array(around), np.array(blocks)
    noise = np.exp(QUIET_LOG_VARIANCE) * len(around) * np.eye(around.shape[1])
    oracle = around @ np.linalg.solve(around.T @ around + noise, around.T @ blocks)
    found = [decoded[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].ravel() for x, y, z in places]
    np.testing.assert_allclose(np.array(found), oracle, atol=2e-4)


def test_neighbours_tell_what_a_block_leaves_out(monkeypatch):
    """On a smooth field that it was not fitted on."""
    rng = np.random.default_rng(0)
    fields = [1 + ndimage.gaussian_filter(rng.standard_normal((48, 48, 48)), 2).astype(np.float32) for _ in range(3)]
    monkeypatch.setattr(fitting, "_images", lambda cases, factor: fields[:2])
    unseen = torch.from_numpy(fields[2])[None, None]
    lapped, alone = (mean_square(fitted([], 6, 4, alone=alone), unseen) for alone in (False, True))
    assert lapped < 0.8 * alone


def test_a_latent_sees_its_block_alone_and_a_block_its_neighbours_latents(cases):
    codec, image = fitted(cases[:1]), image_of(cases[0])
    changed = image.clone()
    changed[..., 14:16, 14:16, 8:10] += 1  # the block of latent voxel (7, 7, 4)
    with torch.inference_mode():
        before, after = codec.encode(image), codec.encode(changed)
        moved = (codec.decode(after) != codec.decode(before))[0, 0].numpy()
    assert np.argwhere((before != after)[0].any(0).numpy()).tolist() == [[7, 7, 4]]
    latent_voxels = np.argwhere(block_mean(moved, 2) > 0)
    assert latent_voxels.min(axis=0).tolist() == [6, 6, 3] and latent_voxels.max(axis=0).tolist() == [8, 8, 5]


@pytest.mark.parametrize("alone", [True, False])
def test_air_is_air_both_ways(cases, alone):
    codec = fitted(cases[:1], alone=alone)
    with torch.inference_mode():
        assert not codec.decode(codec.encode(torch.zeros(1, 1, 8, 8, 8))).any()


def test_a_linear_codec_is_computed_in_full_precision(cases):
    codec, image = fitted(cases[:1]), image_of(cases[0])
    with torch.inference_mode():
        whole = codec.decode(codec.encode(image))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(codec.decode(codec.encode(image)), whole)


# ---- the autoencoder's parts


def test_the_network_added_to_a_linear_codec_is_silent_at_first(cases):
    autoencoder, image = fresh(), image_of(cases[0])
    fit_linear_parts(autoencoder, cases[:4])
    codec = fitted(cases[:4])
    with torch.inference_mode():
        mean, std = autoencoder.moments(image)
        assert torch.equal(mean, codec.encode(image)) and std.max() == pytest.approx(np.exp(QUIET_LOG_VARIANCE / 2))
        assert torch.equal(autoencoder.decode_raw(mean), codec.decode(mean))


def test_the_haar_transform_is_fitted_before_the_first_step(cases):
    autoencoder = fresh(input_transform="haar", channels=(8, 8))
    fit_linear_parts(autoencoder, cases[:1])
    bands = autoencoder.transform.analyse(image_of(cases[0], 4))[0].flatten(1)
    inside = bands[:, (bands != 0).any(dim=0)]
    np.testing.assert_allclose(inside.std(dim=1), 1, rtol=1e-3)


def test_no_latent_voxel_in_the_brain_is_an_error(monkeypatch, cases):
    monkeypatch.setattr(fitting, "block_mean", lambda image, factor: np.zeros([n // factor for n in image.shape]))
    with pytest.raises(TrainingError, match="no latent voxel lies mostly in the brain"):
        latent_statistics(fresh().freeze(), cases[:1], **HOW)


# ---- more laws


def test_what_is_lost_is_the_second_moment_of_the_axes_left_out(cases):
    """Eckart-Young on the blocks it was fitted on, and their mirror images."""
    codec, image = fitted(cases[:1], alone=True), image_of(cases[0])
    blocks = with_mirror_images(blocks_of(cases[:1]))
    moments = np.linalg.eigvalsh(blocks.T @ blocks / len(blocks))
    with torch.inference_mode():
        errors = [codec.decode(codec.encode(side)) - side for side in (image, image.flip(2))]
    lost = sum(float(error.square().sum()) for error in errors) / len(blocks)
    assert lost == pytest.approx(moments[:5].sum(), rel=1e-3)


def test_more_channels_than_voxels_of_a_block_still_rebuild_it(cases):
    image = image_of(cases[0])
    power = float(image[image > 0].square().mean())
    for alone in (True, False):
        assert mean_square(fitted(cases[:1], 10, alone=alone), image) < 0.05**2 * power


@pytest.mark.parametrize("own", [True, False])
def test_the_baselines_are_the_autoencoders_own_codec_or_one_that_is_fitted(cases, own):
    autoencoder, image = fresh(linear_start=own), image_of(cases[4])
    if own:
        fit_linear_parts(autoencoder, cases[:4])
    bounds = linear_baselines(autoencoder, [] if own else cases[:4])
    for name, oracle in (("linear", fitted(cases[:4])), ("pca", fitted(cases[:4], alone=True))):
        assert mean_square(bounds[name], image) == pytest.approx(mean_square(oracle, image), rel=1e-4)
