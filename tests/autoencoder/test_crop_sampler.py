"""Laws of the crops that the autoencoder is trained on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm_lib.autoencoder import crop_sampler as module
from ldm_lib.autoencoder.crop_sampler import CropLoader
from ldm_lib.experiment.presets import resolve


def settings(**changes):
    small = {"channels": "4,8", "autoencoder_steps": 30, "autoencoder_batch_size": 2, "crop": 8, "final_crop": 8,
             "intensity_shift": 0.0}  # fmt: skip
    return resolve("smoke", small | changes)["02_autoencoder_check"]


@pytest.fixture
def labelled(monkeypatch):
    """Load crops of images that are constant in a small brain: 1 in the voided one, 2 in the full one."""

    def load(*, factor=2, target=True, **changes):
        brain = np.zeros((24, 24, 24), np.float32)
        brain[10:14, 10:14, 10:14] = 1
        case = SimpleNamespace(voided=brain, target=2 * brain if target else None)
        monkeypatch.setattr(module, "load_case", lambda case: case)
        monkeypatch.setattr(module, "grid_case", lambda data, factor: case)
        return CropLoader([SimpleNamespace(key="case")], settings(**changes), factor).batch(0)[0]

    return load


def test_half_of_the_crops_show_the_voided_image(labelled):
    brightest = labelled(final_crop=12, crop=12, autoencoder_batch_size=400).amax(dim=(1, 2, 3, 4))
    voided, full, air = ((brightest == value).sum().item() for value in (1, 2, 0))
    assert voided + full + air == 400
    assert abs(voided - full) < 4 * 20  # four standard deviations of a fair coin
    assert air < 0.1 * 400  # only crops that are placed anywhere can miss the brain


def test_a_case_without_a_target_shows_what_it_has(labelled):
    assert labelled(target=False, final_crop=24, crop=24, autoencoder_batch_size=20).amax() == 1


@pytest.mark.parametrize(("crop", "factor", "edge"), [(8, 2, 8), (11, 4, 8), (48, 2, 48)])
def test_crops_are_divisible(labelled, crop, factor, edge):
    batch = labelled(factor=factor, final_crop=crop, crop=crop)
    assert batch.shape == (2, 1, edge, edge, edge) and batch.dtype == torch.float32


def test_a_crop_is_a_function_of_seed_step_and_place(cases):
    def crops(step, **changes):
        return CropLoader(cases, settings(**changes), factor=2).batch(step)[0]

    first = crops(3, autoencoder_batch_size=3)
    assert torch.equal(first, crops(3, autoencoder_batch_size=3))
    assert torch.equal(first[:2], crops(3, autoencoder_batch_size=2))
    assert not torch.equal(first, crops(4, autoencoder_batch_size=3))
    assert not torch.equal(first, crops(3, autoencoder_batch_size=3, seed=1))


def test_large_crops_come_last_in_smaller_batches(cases):
    loader = CropLoader(cases, settings(autoencoder_batch_size=16, final_crop=16), factor=2)
    assert loader.batch(26)[0].shape == (16, 1, 8, 8, 8)
    assert loader.batch(27)[0].shape == (2, 1, 16, 16, 16)


def test_gain_and_gamma_stay_within_their_range_and_leave_air(labelled, monkeypatch):
    monkeypatch.setattr(module, "VOIDED_FRACTION", 0.0)
    batch = labelled(crop=24, final_crop=24, autoencoder_batch_size=200, intensity_shift=0.2)
    brightest = batch.amax(dim=(1, 2, 3, 4))  # gain * 2^gamma
    assert 0.8 * 2**0.8 < brightest.min() < 1.8 and 2.3 < brightest.max() < 1.2 * 2**1.2
    assert (batch == 0).float().mean() > 0.9
