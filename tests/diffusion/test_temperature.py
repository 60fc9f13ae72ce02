"""Laws of the temperature: it scales the noise that sampling starts from, and nothing else."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import changed

from ldm_lib.data.case import load_case
from ldm_lib.diffusion.samplers import samplers_for
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.errors import ConfigError, WeightsError
from ldm_lib.experiment.presets import resolve
from ldm_lib.images.volume import read_volume
from ldm_lib.inpainting.folder import FILLED, FOUND, fill_cases
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.single_file import inpaint

HOW = {"seed": 0, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def inpainter(tiny_model_folder):
    return Inpainter.load(tiny_model_folder, device="cpu", precision="32")


@pytest.fixture(scope="module")
def gaussian(inpainter):
    """Of data that are standard normal in every voxel, the predicted noise is sigma x: linear."""

    def denoiser(shown, t, conditioned=None):
        _, sigma = inpainter.model.schedule.alpha_sigma(t, shown)
        return sigma * shown[:, :3]

    return changed(inpainter, denoiser=denoiser)


@pytest.fixture(scope="module")
def encoded(cases, inpainter):
    return inpainter.encode(load_case(cases[0]))


def drawn(inpainter, encoded, temperature, sampler):
    """What two samples hold in the masked region, at some temperature."""
    found = changed(inpainter, temperature=temperature).model.sample(encoded, ["a/0", "a/1"], sampler=sampler, **HOW)
    return found[:, :, encoded["mask"][0] > 0].double()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_of_gaussian_data_samples_scale_as_their_first_noise(gaussian, encoded, sampler, temperature):
    plain = drawn(gaussian, encoded, 1.0, sampler)
    torch.testing.assert_close(
        drawn(gaussian, encoded, temperature, sampler), temperature * plain, atol=1e-5, rtol=1e-4
    )
    assert 0.5 < plain.std() < 1.5


def test_noise_that_is_drawn_on_the_way_is_not_scaled(gaussian, encoded):
    """Samples are then affine in the temperature, and do not vanish with it."""
    cold, plain, hot = (drawn(gaussian, encoded, temperature, "ddpm") for temperature in (1e-6, 1.0, 2.0))
    torch.testing.assert_close(hot - plain, plain - cold, atol=1e-4, rtol=1e-4)
    assert (hot - plain).abs().max() > 0.1 and cold.std() > 0.1


def test_colder_samples_of_a_case_lie_nearer_to_each_other(inpainter, cases):
    data = load_case(cases[0])
    std = [changed(inpainter, temperature=t)(data, n_samples=2, **HOW).std.sum() for t in (0.25, 0.5, 1.0)]
    assert 0 < std[0] < 0.8 * std[1] < 0.8 * 0.8 * std[2]


# ---- whose temperature


@pytest.fixture
def folder_with(tiny_model_folder, tmp_path):
    """A model folder whose config states a temperature, or something else, or nothing."""

    def make(**facts):
        folder = shutil.copytree(tiny_model_folder, tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | facts))
        return folder

    return make


@pytest.mark.parametrize(("facts", "requested", "taken"), [
    ({}, 0.0, 1.0), ({"temperature": 0.7}, 0.0, 0.7), ({"temperature": 0.7}, 0.3, 0.3),
])  # fmt: skip
def test_it_is_the_one_requested_or_the_models_own_or_1(folder_with, facts, requested, taken):
    assert Inpainter.load(folder_with(**facts), device="cpu", temperature=requested).model.temperature == taken


@pytest.mark.parametrize("temperature", [-0.1, "hot", None])
def test_a_models_own_that_cannot_be_is_rejected(folder_with, temperature):
    with pytest.raises(WeightsError, match=r"does not say how it was trained \(temperature = .*Fix: copy"):
        Inpainter.load(folder_with(temperature=temperature), device="cpu")


@pytest.mark.parametrize("temperature", [2.5, float("nan")])
def test_one_that_is_out_of_range_is_rejected(cases, tiny_model_folder, tmp_path, temperature):
    how = {"model": tiny_model_folder, "device": "cpu", "temperature": temperature}
    with pytest.raises(ConfigError, match=r"temperature = (-0\.1|2\.5|nan): allowed: (finite )?number from 0 to 2\."):
        inpaint(cases[0].t1n_voided, cases[0].mask, tmp_path / "out.nii.gz", **how)
    assert not list(tmp_path.iterdir())


def test_another_temperature_is_another_result(inpainter, cases, tmp_path):
    config, case = resolve("smoke", {"num_inference_steps": 2, "samples": 1})["05_sampling"], cases[0]
    made = []
    for temperature, status in ((1.0, FILLED), (0.5, FILLED), (0.5, FOUND)):
        at = changed(inpainter, temperature=temperature)
        assert [row["status"] for row in fill_cases(at, [case], config, tmp_path, say=lambda line: None)] == [status]
        made.append((tmp_path / case.result_name).read_bytes())
    assert made[0] != made[1] == made[2]


# ---- more laws


@pytest.mark.parametrize("sampler", samplers_for(noise_schedule()))
def test_known_voxels_do_not_depend_on_it(inpainter, encoded, sampler):
    found = changed(inpainter, temperature=0.3).model.sample(encoded, ["a/0"], sampler=sampler, **HOW)[0]
    known = (encoded["mask"] == 0).expand_as(found)
    assert torch.equal(found[known], encoded["voided"][known])


def test_a_file_is_filled_at_the_requested_temperature(cases, tiny_model_folder, inpainter, tmp_path):
    case, how = cases[0], {"model": tiny_model_folder, "device": "cpu", "num_inference_steps": 2}
    inpaint(case.t1n_voided, case.mask, tmp_path / "out.nii.gz", temperature=0.4, **how)
    data = load_case(replace(case.to_inpaint(), growth=None, tissue=None))
    expected = changed(inpainter, temperature=0.4)(data, num_inference_steps=2)
    mask, found = data.mask, read_volume(tmp_path / "out.nii.gz").voxels
    np.testing.assert_allclose(found[mask], expected.mean[mask], atol=0.51)  # int16
    assert np.abs(inpainter(data, num_inference_steps=2).mean - expected.mean).max() > 2
