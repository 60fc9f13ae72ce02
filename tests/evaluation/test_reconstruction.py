"""Laws of reconstruction: the upper bound, and boxes against whole volumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_lib.autoencoder.fitting import fit_linear_codec
from ldm_lib.autoencoder.linear_codec import LinearCodec
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.autoencoder.region_decoding import decode_box, reconstruct
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.errors import InputError
from ldm_lib.evaluation.metrics import brats_scores, scores_by_tissue
from ldm_lib.evaluation.reconstruction import box_loss_db, by_tissue, upper_bound
from ldm_lib.model_io import load_model

HOW = {"device": torch.device("cpu"), "precision": "32"}


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    small = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    return Autoencoder.of(**small | options).freeze()


def linear_code(cases, latent_channels, factor):
    code = LinearCodec(latent_channels, factor).requires_grad_(False)
    fit_linear_codec(code, cases)
    return code


def box_loss(data, on_grid, coder, margin):
    return box_loss_db(data, coder, reconstruct(coder, on_grid.target, **HOW), margin, **HOW)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def data(cases):
    return load_case(cases[0])


@pytest.fixture(scope="module")
def on_grid(data):
    return grid_case(data, 2)


# ---- the upper bound, and that of the best linear codec


def test_the_upper_bound_is_the_reconstructed_target(data, on_grid, tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, Autoencoder)
    filled, scores = upper_bound(data, reconstruct(autoencoder, on_grid.target, **HOW).volume, 2)
    outside = ~data.mask
    assert np.array_equal(filled[outside], data.voided[outside])
    rebuilt = reconstruct(autoencoder, on_grid.target, **HOW).volume
    inside = data.frame(autoencoder.factor).to_model(data.mask)
    order = data.frame(autoencoder.factor).to_model(np.where(data.mask, filled, 0))
    np.testing.assert_allclose(order[inside], np.maximum(rebuilt[inside], 0) * data.scale, rtol=1e-5)
    assert scores == brats_scores(filled, data.target, data.voided, data.healthy)


def test_the_upper_bound_of_a_lossless_codec_is_the_target(data, on_grid):
    filled, scores = upper_bound(data, on_grid.target, 2)
    np.testing.assert_allclose(filled, data.target, rtol=1e-5)
    assert scores["psnr_01"] > 100


def test_errors_by_tissue_need_a_tissue_map(data, on_grid):
    filled, _ = upper_bound(data, reconstruct(fresh(), on_grid.target, **HOW).volume, 2)
    rows = by_tissue(data, filled)
    assert rows == scores_by_tissue(filled, data.target, data.voided, data.healthy, data.tissue)
    assert sum(row["voxels"] for row in rows) == (data.healthy & (data.tissue > 0)).sum() > 0
    assert by_tissue(replace(data, tissue=None), filled) == []


# ---- decoding a box


def test_an_empty_mask_has_no_box():
    with pytest.raises(InputError, match="the mask is empty"):
        decode_box(LinearCodec(2, 2), torch.zeros(1, 2, 2, 2, 2), np.zeros((4, 4, 4), bool), 1)


MASKS = {"middle": np.s_[20:23, 5:8, 3:9], "corner": np.s_[:3, :2, 9:], "whole": np.s_[:]}


def decoded(autoencoder, mask_name, margin):
    """The decoded box, the whole decoding, and where they agree: in the box of latent voxels with any of the mask."""
    latent = torch.from_numpy(noise(1, 3, 24, 6, 6))
    mask, expected = np.zeros((48, 12, 12), bool), np.zeros((48, 12, 12), bool)
    mask[MASKS[mask_name]] = True
    places = np.argwhere(mask)
    low, high = places.min(axis=0) // 2 * 2, places.max(axis=0) // 2 * 2 + 2
    expected[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    with torch.inference_mode():
        box, whole = decode_box(autoencoder, latent, mask, margin), autoencoder.decode(latent)
    return box[0, 0].numpy(), whole[0, 0].numpy(), expected


def difference_in_box(autoencoder, mask_name, margin):
    box, whole, expected = decoded(autoencoder, mask_name, margin)
    return np.abs(box - whole)[expected].max()


@pytest.mark.parametrize("mask_name", MASKS)
def test_with_local_norms_a_wide_box_is_whole_decoding(mask_name):
    box, whole, expected = decoded(fresh(norm="local"), mask_name, margin=10)
    np.testing.assert_allclose(box[expected], whole[expected], rtol=0, atol=1e-5)
    assert not box[~expected].any() and np.abs(whole[expected]).min() > 0


def test_wavelet_packets_are_decoded_in_boxes_too():
    autoencoder = fresh(input_transform="haar", channels=(8, 8))
    factor = autoencoder.factor
    latent, mask = torch.from_numpy(noise(1, 3, 16, 4, 4)), np.zeros((16 * factor, 4 * factor, 4 * factor), bool)
    mask[factor + 1, 5:9, 6] = True
    with torch.inference_mode():
        box, whole = decode_box(autoencoder, latent, mask, 10)[0, 0], autoencoder.decode(latent)[0, 0]
    assert box[factor : 2 * factor].any()
    np.testing.assert_allclose(box[mask], whole[mask], rtol=0, atol=1e-5)


def test_a_narrow_box_loses_something_and_norms_of_the_grid_always_do():
    assert difference_in_box(fresh(norm="local"), "middle", 0) > 1e-3
    assert difference_in_box(fresh(norm="group"), "middle", 10) > 1e-4
    assert difference_in_box(fresh(norm="group"), "whole", 0) == 0


def test_only_the_box_is_decoded(monkeypatch):
    autoencoder, seen = fresh(), []
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda latent: seen.append(latent.shape) or decode(latent))
    mask = np.zeros((48, 12, 12), bool)
    mask[20:23, 5:8, 3:9] = True
    with torch.inference_mode():
        decode_box(autoencoder, torch.zeros(1, 3, 24, 6, 6), mask, 1)
    assert seen == [(1, 3, 4, 4, 6)]


def test_the_loss_of_a_box_in_db(cases, data, on_grid):
    coder = linear_code(cases[:1], 3, 2)
    assert box_loss(data, on_grid, coder, 1) == pytest.approx(0, abs=1e-4)
    assert box_loss(data, on_grid, coder, 0) > 0.01
    autoencoder = fresh(norm="local", linear_start=True)
    fit_linear_codec(autoencoder.linear, cases[:1])
    torch.nn.init.normal_(autoencoder.network.decoder.blocks[-1].conv.weight, std=0.02)
    assert box_loss(data, on_grid, autoencoder, 15) == pytest.approx(0, abs=1e-4)
    narrow = box_loss(data, on_grid, autoencoder, 0)
    latent = torch.from_numpy(reconstruct(autoencoder, on_grid.target, **HOW).latent)[None]
    with torch.inference_mode():
        box = decode_box(autoencoder, latent, on_grid.mask, 0)[0, 0].numpy()
    scores = brats_scores(data.paste(box, 2), data.target, data.voided, data.healthy)
    whole = upper_bound(data, reconstruct(autoencoder, on_grid.target, **HOW).volume, 2)[1]["psnr_01"]
    assert narrow == pytest.approx(whole - scores["psnr_01"], abs=1e-4) and abs(narrow) > 1e-3


# ---- more laws


def test_reconstruction_goes_through_the_latent(on_grid, tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, Autoencoder)
    latent = torch.from_numpy(reconstruct(autoencoder, on_grid.target, **HOW).latent)[None]
    with torch.inference_mode():
        decoded = autoencoder.decode(latent)[0, 0].numpy()
    assert np.array_equal(decoded, reconstruct(autoencoder, on_grid.target, **HOW).volume)
