"""The pretrained weights: as their config says, small, and better than the baselines."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.synthetic_cohort import TEST_PATIENTS, write_patient
from ldm_lib.diffusion.latents import mirror_image
from ldm_lib.evaluation.metrics import brats_scores
from ldm_lib.experiment.presets import resolve
from ldm_lib.files import AUTOENCODER_FOLDER, PRETRAINED
from ldm_lib.inpainting.baselines import harmonic_fill
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.model_io import WEIGHTS, read_tensors
from ldm_lib.training.export import LOG

CARD = PRETRAINED / "README.md"


@pytest.fixture(scope="module")
def pretrained():
    return Inpainter.load(device="cpu")


def test_all_of_it_is_below_64_mb_and_in_half_precision():
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 64e6
    for folder in (PRETRAINED, PRETRAINED / AUTOENCODER_FOLDER):
        assert {t.dtype for t in read_tensors(folder / WEIGHTS).values()} == {torch.float16}


def test_loading_it_imports_no_network_of_monai_and_no_compiler():
    """Each would take seconds, and the pretrained model uses neither."""
    script = "import sys, ldm_lib as ldm; ldm.Inpainter.load(); print({'monai', 'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_networks_are_small(pretrained):
    networks = {name: getattr(pretrained.model, name) for name in NETWORKS}
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert count["autoencoder"] <= 10e6 and count["denoiser"] <= 20e6


NETWORKS = ("autoencoder", "denoiser")


@pytest.mark.parametrize("preset", ["demo", "weights", "people"])
def test_the_presets_describe_the_pretrained_model(pretrained, preset):
    """Else `demo` could not go on from it, and `make weights` would make another."""
    from ldm_lib.training.initialise import build_denoiser

    configs = resolve(preset)
    training, conditioning = configs["04_training"], configs["03_conditioning"]
    channels = pretrained.model.autoencoder.latent_channels
    built = build_denoiser(training, in_channels=pretrained.model.denoiser.config["in_channels"], out_channels=channels)
    assert {**built.config, "dropout": 0} == {**pretrained.model.denoiser.config, "dropout": 0}
    assert (training.prediction, training.latent_crop) == (pretrained.model.prediction, pretrained.model.crop)
    names = ("context", "contralateral", "bias_field_correction", "mask_dilation", "pooling", "growth_threshold")
    for name in names:
        assert getattr(conditioning, name) == getattr(pretrained.model.spec, name)
    assert configs["02_autoencoder_check"].latent_channels == channels
    assert configs["01_data_audit"].spacing_mm == pretrained.model.autoencoder.spacing_mm == 1.0


def test_a_flip_of_its_latents_is_exact(pretrained):
    volume = torch.rand((1, 1, 48, 32, 32), generator=torch.Generator().manual_seed(0))
    flipped = pretrained.model.autoencoder.encode(volume.flip(2))
    again = pretrained.model.autoencoder.encode(volume).flip(2) * pretrained.model.autoencoder.mirror.view(
        1, -1, 1, 1, 1
    )
    torch.testing.assert_close(flipped, again, atol=2e-2, rtol=0)  # of numbers around 1, from axes in half precision


def test_the_estimate_of_a_mirror_image_is_the_mirror_image_of_the_estimate(pretrained):
    model, draw = pretrained.model, torch.Generator().manual_seed(0)
    shapes = {"conditioning": 4, "mask_fraction": 1, "contralateral_known": 1}
    names = ("voided", "initial_estimate", "contralateral", *shapes)
    latents = {n: torch.rand(shapes.get(n, 16), 12, 12, 12, generator=draw) for n in names}
    latents["mask"] = torch.zeros(1, 12, 12, 12)
    latents["mask"][:, 2:6, 3:8, 4:9] = 1
    sampling = {"seed": 0, "sampler": "ddim", "num_inference_steps": 1}
    own = model.sample(latents, ["a/0"], **sampling)
    other = model.sample(mirror_image(latents, model.autoencoder.mirror), ["b/0"], **sampling)
    turned = mirror_image({"target": other}, model.autoencoder.mirror)["target"]
    torch.testing.assert_close(own, turned, atol=1e-4, rtol=1e-4)
    masked = (latents["mask"] > 0).expand_as(own)
    assert (own - latents["initial_estimate"])[masked].abs().max() > 0.01


def test_the_log_of_its_training_and_its_card_are_there():
    steps = [line.split(",") for line in (PRETRAINED / LOG).read_text().splitlines()]
    assert "train_loss" in steps[0] and len(steps) > 20
    card = CARD.read_text()
    for heading in ("Intended use", "Limits", "Data", "Scores", "Research"):
        assert heading in card
    assert "@" not in card, "a figure that was to be filled in"


def test_the_makefile_exports_at_the_temperature_of_the_pretrained_model(pretrained):
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert re.findall(r" export .*--temperature ([\d.]+)", makefile) == [f"{pretrained.model.temperature:g}"]


@pytest.mark.slow
def test_one_sample_is_better_than_the_harmonic_fill_in_a_brain_never_seen(pretrained, tmp_path):
    write_patient(tmp_path, 0, TEST_PATIENTS[-1], masks=1, domain_randomisation="wide", tissue_map="registered")
    data = load_case(find_cases(tmp_path / "data")[0])
    fills = {"proposed": pretrained(data).samples[0], "harmonic": harmonic_fill(data.voided, data.mask)}
    scores = {name: brats_scores(v, data.target, data.voided, data.scored)["psnr_01"] for name, v in fills.items()}
    assert scores["proposed"] > scores["harmonic"], scores
    np.testing.assert_array_equal(fills["proposed"][~data.mask], data.voided[~data.mask])


def test_a_wheel_would_carry_them():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "pretrained/**" in project["tool"]["setuptools"]["package-data"]["ldm_lib"]
