"""An exported model has half the bytes, gives the same results, and loses nothing on the way."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_lib.data.case import load_case
from ldm_lib.errors import ConfigError, InputError, WeightsError
from ldm_lib.files import PRETRAINED, sha256
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.model_io import read_config
from ldm_lib.training.export import export_model

HOW = {"n_samples": 2, "num_inference_steps": 3, "seed": 1}


@pytest.fixture
def stage(tiny_initial_estimate_folder, tmp_path):
    """A stage 04 as a training leaves it: model, and the log next to it."""
    folder = tmp_path / "04_training"
    shutil.copytree(tiny_initial_estimate_folder, folder / "model")
    (folder / "metrics.csv").write_text("step,train_loss\n1,0.5\n")
    edit(folder / "model", temperature=0.7, optimiser_steps=12, latent_crop=6)
    return folder


def edit(folder, **facts):
    """Change entries of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | facts))


def enlarge(folder, value):
    """One weight that large, and a config that believes it."""
    tensors = load_file(folder / "model.safetensors")
    tensors[sorted(tensors)[0]].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")
    edit(folder, sha256=sha256(folder / "model.safetensors"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_tensor_is_the_sources_rounded_to_float16(stage, tmp_path):
    export_model(stage / "model", tmp_path / "weights")
    for part in ("", "autoencoder"):
        source, exported = (load_file(f / part / "model.safetensors") for f in (stage / "model", tmp_path / "weights"))
        assert source.keys() == exported.keys()
        for name, tensor in source.items():
            assert exported[name].dtype == torch.float16 and torch.equal(exported[name], tensor.half()), name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "weights", stage / "model")]
    assert sizes[0] < 0.6 * sizes[1]


def test_facts_of_a_model_are_kept_and_digests_are_those_of_what_was_written(stage, tmp_path):
    files = export_model(stage / "model", tmp_path / "weights")
    assert files == sorted(tmp_path / "weights" / name for name in contents(tmp_path / "weights"))
    assert (tmp_path / "weights" / "training.csv").read_bytes() == (stage / "metrics.csv").read_bytes()
    for part, changed in (("", {"sha256", "autoencoder_sha256"}), ("autoencoder", {"sha256"})):
        before, after = (read_config(folder / part) for folder in (stage / "model", tmp_path / "weights"))
        assert before.keys() == after.keys() and {name for name in before if before[name] != after[name]} == changed
        assert after["sha256"] == sha256(tmp_path / "weights" / part / "model.safetensors")
    assert read_config(tmp_path / "weights")["autoencoder_sha256"] == after["sha256"]


@pytest.mark.parametrize(("requested", "exported"), [(0.0, 0.7), (0.4, 0.4)])
def test_the_temperature_is_the_models_own_or_the_one_requested(stage, tmp_path, requested, exported):
    export_model(stage / "model", tmp_path / "weights", temperature=requested)
    assert Inpainter.load(tmp_path / "weights", device="cpu").model.temperature == exported


def test_results_equal_those_of_the_original_up_to_rounding(stage, cases, tmp_path):
    export_model(stage / "model", tmp_path / "weights")
    data = load_case(cases[0])
    original, exported = (
        Inpainter.load(folder, device="cpu", precision="32")(data, **HOW)
        for folder in (stage / "model", tmp_path / "weights")
    )
    for k in range(2):
        np.testing.assert_array_equal(exported.samples[k][~data.mask], data.voided[~data.mask])
    apart = np.sqrt(np.square(exported.values - original.values).mean() / original.values.var())
    assert 0 < apart < 0.01


def test_an_exported_model_may_be_exported_again_and_stays_the_same(stage, tmp_path):
    export_model(stage / "model", tmp_path / "weights")
    export_model(tmp_path / "weights", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "weights")
    export_model(tmp_path / "weights", tmp_path / "bundle", to="monai-bundle")
    assert contents(tmp_path / "bundle" / "models").items() < contents(tmp_path / "weights").items()


def test_the_pretrained_weights_are_what_their_own_export_writes(tmp_path):
    export_model(PRETRAINED, tmp_path / "weights")
    assert contents(tmp_path / "weights") == contents(PRETRAINED)


@pytest.mark.parametrize("part", ["", "autoencoder"])
def test_a_weight_beyond_float16_is_rejected_and_what_was_there_stays_whole(stage, tmp_path, part):
    export_model(stage / "model", tmp_path / "weights")
    before = contents(tmp_path / "weights")
    enlarge(stage / "model" / part, -70000.0)
    if not part:
        enlarge(stage / "model" / "autoencoder", 3.0)  # which could be exported
    edit(stage / "model", autoencoder_sha256=read_config(stage / "model" / "autoencoder")["sha256"])
    with pytest.raises(WeightsError, match=r"weights up to 70000, float16 ends at 65504\. Fix: train again"):
        export_model(stage / "model", tmp_path / "weights")
    assert contents(tmp_path / "weights") == before
    Inpainter.load(tmp_path / "weights", device="cpu")


def test_the_largest_weight_of_float16_is_none_too_large(stage, tmp_path):
    enlarge(stage / "model", 65504.0)
    export_model(stage / "model", tmp_path / "weights")
    assert max(float(t.abs().max()) for t in load_file(tmp_path / "weights" / "model.safetensors").values()) == 65504


def test_without_the_log_of_its_training_nothing_is_exported(stage, tmp_path):
    (stage / "metrics.csv").unlink()
    with pytest.raises(WeightsError, match=r"model: no log of its training, neither .*\. Fix: name the model"):
        export_model(stage / "model", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_file_is_no_folder_to_export_to(stage):
    with pytest.raises(InputError, match=r"metrics.csv: is no folder.*File exists.*Fix: name another --output"):
        export_model(stage / "model", stage / "metrics.csv")
    with pytest.raises(InputError, match=r"metrics.csv/weights: is no folder.*Not a directory"):
        export_model(stage / "model", stage / "metrics.csv" / "weights")


@pytest.mark.parametrize("temperature", [-0.5, 2.5])
def test_a_temperature_that_no_model_may_have_is_rejected(stage, tmp_path, temperature):
    with pytest.raises(ConfigError, match=rf"temperature = {temperature}: allowed: (finite )?number from 0 to 2"):
        export_model(stage / "model", tmp_path / "weights", temperature=temperature)
    assert not (tmp_path / "weights").exists()


def test_a_model_and_another_autoencoder_are_not_made_to_belong_together(stage, tmp_path):
    enlarge(stage / "model" / "autoencoder", 3.0)
    with pytest.raises(WeightsError, match=r"was trained on latents of another autoencoder\. Fix: copy the whole"):
        export_model(stage / "model", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_folder_that_holds_no_model_is_rejected(stage, tmp_path):
    with pytest.raises(WeightsError, match="no such model folder"):
        export_model(stage / "other", tmp_path / "weights")
