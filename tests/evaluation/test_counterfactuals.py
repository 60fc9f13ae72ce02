"""Laws of conditioning variants: the same mask and noise, another conditioning and nothing else."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import changed

from ldm_lib.anatomy.initial_estimate import initial_estimate
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion.latents import collate
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.evaluation.counterfactuals import (
    conditioning_variants,
    inpaint_variants,
    inpaint_with_growths,
    on_grid_of,
    tumour_seed_mm,
    tumours_in_time,
)
from ldm_lib.inpainting.inpainter import Inpainter

HOW = {"seed": 0, "sampler": "ddim", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def inpainter(tiny_model_folder):
    return Inpainter.load(tiny_model_folder, device="cpu")


@pytest.fixture(scope="module")
def free(inpainter):
    """The same with a denoiser that can do without its conditioning."""
    torch.manual_seed(3)
    denoiser = ADM(in_channels=8, out_channels=3, base_width=8, multipliers=(1, 2), blocks_per_level=1,
                   attention_rates=(2,), head_channels=8, conditioning=(3, 7)).eval().requires_grad_(False)  # fmt: skip
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return changed(inpainter, denoiser=denoiser)


@pytest.fixture(scope="module")
def data(cases):
    return load_case(cases[0])


def test_guidance_is_linear_in_the_conditional_and_unconditional_prediction(free, data):
    batch = collate([free.encode(data)] * 2)
    x, t = torch.randn(batch["voided"].shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    with torch.inference_mode():
        unconditional, conditional = (free.model.predict(x, t, batch, scale) for scale in (0.0, 1.0))
        for scale in (0.5, 2.0, 3.0):
            found, line = free.model.predict(x, t, batch, scale), unconditional + scale * (conditional - unconditional)
            torch.testing.assert_close(found, line, atol=1e-4, rtol=1e-4)
    assert (conditional - unconditional).abs().max() > 1e-3
    empty = batch | {"conditioning": torch.zeros_like(batch["conditioning"])}
    with torch.inference_mode():
        assert torch.equal(free.model.predict(x, t, empty, 0.0), unconditional)
        assert not torch.allclose(free.model.predict(x, t, empty, 1.0), unconditional)


def test_a_model_without_conditioning_dropout_cannot_be_guided(inpainter, data):
    with pytest.raises(ConfigError, match="train with conditioning_dropout above 0"):
        inpainter(data, guidance=2.0, **HOW)


def test_variants_differ_in_their_conditioning_alone(inpainter, free, data, cases):
    other, bare = load_case(cases[2]), replace(data, tissue=0 * data.tissue)
    variants = conditioning_variants(inpainter, data, other=other, given=bare)
    assert list(variants) == ["as used", "given", "shuffled", "empty"]
    own = inpainter.encode(data)
    for variant in variants.values():
        for name in set(own) - {"conditioning"}:
            assert torch.equal(variant.latents[name], own[name])
    assert torch.equal(variants["as used"].latents["conditioning"], own["conditioning"])
    assert torch.equal(variants["given"].latents["conditioning"], inpainter.encode(bare)["conditioning"])
    assert torch.equal(variants["shuffled"].latents["conditioning"], inpainter.encode(other)["conditioning"])
    assert not variants["empty"].latents["conditioning"].any() and variants["empty"].guidance == 1
    assert conditioning_variants(free, data, other=other)["empty"].guidance == 0


def test_each_variant_has_the_initial_estimate_of_its_own_map(tiny_initial_estimate_folder, data, cases):
    """The initial estimate depends on the map too, and would otherwise reveal the case's own."""
    inpainter, other = Inpainter.load(tiny_initial_estimate_folder, device="cpu", precision="32"), load_case(cases[2])
    given = replace(data, tissue=np.where(data.tissue == 2, 3, data.tissue).astype(np.uint8))
    variants, case = conditioning_variants(inpainter, data, other=other, given=given), grid_case(data, 2)
    maps = {"as used": data.tissue, "given": given.tissue, "shuffled": other.tissue, "empty": 0 * data.tissue}
    for name, tissue in maps.items():
        labels = data.frame(2).to_model(tissue)
        image = torch.from_numpy(initial_estimate(case.voided, case.mask, labels, spacing_mm=8.0))
        with torch.inference_mode():
            assert torch.equal(
                variants[name].latents["initial_estimate"], inpainter.model.autoencoder.encode(image[None, None])[0]
            ), name
        for same in ("voided", "mask", "mask_fraction"):
            assert torch.equal(variants[name].latents[same], variants["as used"].latents[same])
    assert len({variant.latents["initial_estimate"].numpy().tobytes() for variant in variants.values()}) == 4


def test_a_map_of_another_grid_is_cut_or_padded_behind(data):
    x, y, z = data.lps(data.mask).shape
    theirs = np.arange(1.0, (x + 2) * (y - 1) * z + 1).reshape(x + 2, y - 1, z)
    other = types.SimpleNamespace(tissue=theirs, growth=None, lps=lambda volume: volume)
    found = on_grid_of(data, other, "tissue")
    assert found.shape == data.mask.shape and on_grid_of(data, other, "growth") is None
    np.testing.assert_array_equal(data.lps(found)[:, :-1], theirs[:x])
    assert not data.lps(found)[:, -1].any()


def test_all_variants_share_one_noise(free, data, cases):
    variants = conditioning_variants(free, data, other=load_case(cases[2]))
    fills = inpaint_variants(free, data, variants, **HOW)
    np.testing.assert_array_equal(fills["as used"], free(data, **HOW).samples[0])
    for name, volume in fills.items():
        np.testing.assert_array_equal(volume[~data.mask], data.voided[~data.mask])
        assert name == "as used" or not np.array_equal(volume, fills["as used"])


def test_a_growth_map_conditions_as_the_cases_own_does(inpainter, data):
    fills = inpaint_with_growths(inpainter, data, {"own": data.growth, "none": 0 * data.growth}, **HOW)
    np.testing.assert_array_equal(fills["own"], inpainter(data, **HOW).samples[0])
    assert not np.array_equal(fills["own"], fills["none"])


def voxel_of(data, position_mm):
    return tuple(np.rint(np.linalg.solve(data.source.affine, [*position_mm, 1])[:3]).astype(int))


def test_a_tumour_starts_in_the_masked_tissue(data):
    at = voxel_of(data, tumour_seed_mm(data))
    solid = data.mask & np.isin(data.tissue, (2, 3))
    assert solid[at] and data.growth[at] == data.growth[solid].max()
    unknown = replace(data, growth=None)
    assert solid[voxel_of(unknown, tumour_seed_mm(unknown))]
    with pytest.raises(InputError, match=r"no white or grey matter in its mask\. Fix: give a tissue map"):
        tumour_seed_mm(replace(data, tissue=None))


def test_an_older_tumour_is_larger_and_without_days_there_is_none(data):
    grown = tumours_in_time(data, (0, 200, 300))
    assert list(grown) == ["healthy", "200 days", "300 days"] and not grown["healthy"].any()
    assert 0 < grown["200 days"].sum() < grown["300 days"].sum()
    assert (grown["300 days"] >= grown["200 days"] - 0.02).all()
