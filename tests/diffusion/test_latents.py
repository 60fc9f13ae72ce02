"""Laws of latents: what a case becomes, and what the denoiser is shown of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion.latents import LatentSpec, collate, denoiser_input, encode_case, input_channels, keep_known
from ldm_lib.geometry import latent_mask
from ldm_lib.model_io import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dilation", [0, 1])
def test_a_case_is_encoded_by_its_definition(cases, tiny_autoencoder_folder, dilation):
    autoencoder = load_model(tiny_autoencoder_folder, Autoencoder)
    case = grid_case(load_case(cases[0]), 2)
    latents = encode_case(case, autoencoder, LatentSpec(mask_dilation=dilation), device=CPU, precision="32")
    for name, image in (("target", case.target), ("voided", case.voided)):
        with torch.inference_mode():
            assert torch.equal(latents[name], autoencoder.encode(torch.from_numpy(image)[None, None])[0])
    assert np.array_equal(latents["mask"][0].numpy() > 0, latent_mask(case.mask, 2, dilation))
    blocks = case.mask.reshape(15, 2, 15, 2, 10, 2)
    assert np.array_equal(latents["mask_fraction"][0].numpy(), blocks.mean((1, 3, 5), dtype=np.float32))
    without = encode_case(replace(case, target=None), autoencoder, LatentSpec(), device=CPU, precision="32")
    assert without.keys() == latents.keys() - {"target"} and torch.equal(without["voided"], latents["voided"])


def random_batch(c=3, shape=(4, 4, 4), b=2):
    draw = torch.Generator().manual_seed(0)
    sizes = {"voided": c, "target": c, "conditioning": 4, "mask_fraction": 1}
    batch = {name: torch.randn(b, n, *shape, generator=draw) for name, n in sizes.items()}
    return batch | {"mask": (torch.rand(b, 1, *shape, generator=draw) > 0.5).float()}


def test_known_latent_voxels_are_the_voided_ones_whatever_the_rest():
    batch = random_batch()
    kept = keep_known(torch.full_like(batch["voided"], 9.0), batch)
    masked = batch["mask"].expand_as(kept) > 0
    assert (kept[masked] == 9).all() and torch.equal(kept[~masked], batch["voided"][~masked])


@pytest.mark.parametrize("context", ["composite", "concat"])
def test_the_denoiser_sees_what_the_context_says(context):
    batch, settings, noisy = random_batch(), LatentSpec(context=context), torch.randn(2, 3, 4, 4, 4)
    seen = denoiser_input(noisy, batch, settings)
    assert seen.shape[1] == input_channels(3, settings) == (8 if context == "composite" else 12)
    assert torch.equal(seen[:, :3], keep_known(noisy, batch))
    assert torch.equal(seen[:, 3:7], batch["conditioning"]) and torch.equal(seen[:, 7:8], batch["mask"])
    if context == "concat":
        assert torch.equal(seen[:, 8:11], batch["voided"]) and torch.equal(seen[:, 11:], batch["mask_fraction"])


def test_collating_pads_behind_with_what_no_loss_sees():
    small, large = ({k: v[0] for k, v in random_batch(shape=s).items()} for s in ((3, 4, 2), (4, 4, 4)))
    batch = collate([small | {"t": torch.tensor(5)}, large | {"t": torch.tensor(6)}])
    assert batch["t"].tolist() == [5, 6]
    for name in small:
        assert torch.equal(batch[name][0][:, :3, :4, :2], small[name]) and torch.equal(batch[name][1], large[name])
        assert not batch[name][0][:, 3:].any() and not batch[name][0][..., 2:].any()
