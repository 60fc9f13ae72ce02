"""Laws of model folders: what is saved comes back bit for bit, and nothing else is ever taken for it."""

import json
import os
import pickle
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import WeightsError
from ldm_lib.files import sha256
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.model_io import current_names, load_model, read_checkpoint, read_config, save_model


@pytest.fixture
def folder(tiny_autoencoder_folder, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_autoencoder_folder, tmp_path / "model")


def rewrite(folder, change):
    """Change the tensors and make the config believe them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, sha256=sha256(folder / "model.safetensors"))


def edit(folder, **facts):
    """Change entries of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | facts))


@pytest.mark.parametrize("model", [
    Autoencoder.of(channels=(4, 8), latent_channels=2, blocks=1, spacing_mm=3.0),
    ADM(in_channels=4, out_channels=2, base_width=4, multipliers=(1, 2), attention_rates=(), head_channels=4),
], ids=["autoencoder", "adm"])  # fmt: skip
def test_a_round_trip_is_bit_for_bit(model, tmp_path):
    digest = save_model(tmp_path / "model", model, trained_steps=7)
    again = load_model(tmp_path / "model", type(model))
    assert again.config == model.config and again.folder_config["trained_steps"] == 7
    assert digest == again.folder_config["sha256"] == sha256(tmp_path / "model" / "model.safetensors")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def nan(tensors):
    tensors["scale_factor"][0] = float("nan")


def short(tensors):
    tensors["scale_factor"] = tensors["scale_factor"][:-1].clone()


def missing(tensors):
    del tensors["latent_mean"]


def stranger(tensors):
    tensors["backdoor"] = torch.zeros(1)


def whole_numbers(tensors):
    tensors["scale_factor"] = tensors["scale_factor"].view(torch.int32).clone()


@pytest.mark.parametrize(("change", "reason"), [
    (whole_numbers, r"scale_factor is integer \(3,\), needed is real \(3,\)"),
    (nan, "non-finite weights in scale_factor"),
    (short, r"do not fit its config: scale_factor is real \(2,\), needed is real \(3,\)"),
    (missing, "do not fit its config: latent_mean is missing, needed is real"),
    (stranger, "do not fit its config: backdoor is real .*, needed is none"),
])  # fmt: skip
def test_wrong_tensors_are_rejected(folder, change, reason):
    rewrite(folder, change)
    with pytest.raises(WeightsError, match=reason):
        load_model(folder, Autoencoder)


@pytest.mark.parametrize("build", [
    {"channels": [4, 8], "latent_channels": 3, "blocks": 1},  # an argument is missing
    {"channels": [4, 8], "latent_channels": 4, "blocks": 1, "spacing_mm": 8.0},  # another size
    {"channels": [], "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0},  # no network at all
    {"channels": [4, 8], "latent_channels": 3, "blocks": "1", "spacing_mm": "wide"},
    ["channels"],
])  # fmt: skip
def test_a_config_that_builds_another_network_is_rejected(folder, build):
    edit(folder, build=build)
    with pytest.raises(WeightsError, match="do not fit its config"):
        load_model(folder, Autoencoder)


def test_a_changed_byte_is_rejected(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="sha256 differs"):
        load_model(folder, Autoencoder)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors: no such file"):
        load_model(folder, Autoencoder)
    with pytest.raises(WeightsError, match="no such model folder"):
        load_model(folder / "elsewhere", Autoencoder)


@pytest.mark.parametrize("kind", ["autoencoder", "os.system", ["adm"]])
def test_the_wrong_kind_is_rejected(folder, kind):
    edit(folder, kind=kind)
    with pytest.raises(WeightsError, match=rf"kind {re.escape(repr(kind))}, need 'adm'"):
        load_model(folder, ADM)


def test_a_folder_of_the_version_before_is_read(tmp_path):
    """Arguments and tensors had other names then."""
    haar = Autoencoder.of(channels=(4,), latent_channels=2, blocks=1, spacing_mm=3.0, input_transform="haar")
    guided = {"in_channels": 4, "out_channels": 2, "base_width": 4, "multipliers": (1, 2), "attention_rates": ()}
    denoiser = ADM(**guided, head_channels=4, conditioning=(2, 4))
    names = {"transform.deviation": "front.deviation", "unconditional_embedding": "untold", "null_conditioning": "null"}
    for model, name in ((haar, "autoencoder"), (denoiser, "adm")):
        save_model(tmp_path / name, model)

        def as_before(tensors):
            for new, old in names.items():
                if new in tensors:
                    tensors[old] = tensors.pop(new)

        rewrite(tmp_path / name, as_before)
        build = json.loads((tmp_path / name / "config.json").read_text())["build"]
        if name == "autoencoder":
            build["front_end"] = build.pop("input_transform")
        edit(tmp_path / name, build=build)
        again, expected = load_model(tmp_path / name, type(model)).state_dict(), model.state_dict()
        assert again.keys() == expected.keys() and all(torch.equal(again[k], expected[k]) for k in again)


def test_checkpoints_of_the_version_before_are_translated():
    before = {"average": {"module.front.deviation": 1, "untold": 2}, "state": {"null": {"step": 3}}, "p": ["null", 4]}
    assert current_names(before) == {
        "average": {"module.transform.deviation": 1, "unconditional_embedding": 2},
        "state": {"null_conditioning": {"step": 3}}, "p": ["null_conditioning", 4],
    }  # fmt: skip


def test_an_autoencoder_at_half_the_resolution_is_rejected_in_one_line(folder):
    edit(folder, build=json.loads((folder / "config.json").read_text())["build"] | {"input_transform": "half"})
    with pytest.raises(WeightsError, match=r"input_transform 'half' was removed in version 0\.8\. Fix: use version"):
        load_model(folder, Autoencoder)


@pytest.mark.parametrize(("text", "reason"), [
    ("{", "not readable as JSON"),
    ("\x00\xff", "not readable as JSON"),
    ("7", "holds no mapping but int"),
    ("[]", "holds no mapping but list"),
    ("[" * 100_000, "nested too deeply"),
    ("{}", "not a model's config"),
    ('{"kind": "autoencoder", "build": {}}', "not a model's config"),
])  # fmt: skip
def test_a_corrupt_config_is_rejected(folder, text, reason):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=reason):
        read_config(folder)


def test_a_pipe_in_a_configs_place_is_waited_for_by_nobody(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(WeightsError, match=r"config\.json: not readable as JSON \(is not a file\)"):
        read_config(folder)


@pytest.mark.parametrize("change", [
    {"spacing_mm": 1e9}, {"spacing_mm": -1}, {"spacing_mm": "nan"}, {"input_transform": ["haar"]},
])  # fmt: skip
def test_an_autoencoder_that_cannot_be_is_rejected_at_once(folder, change):
    edit(folder, build=json.loads((folder / "config.json").read_text())["build"] | change)
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"do not fit its config.*Fix: copy"):
        load_model(folder, Autoencoder)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("change", [
    {"blocks_per_level": 1_000_000}, {"base_width": 4096}, {"multipliers": [1] * 64}, {"base_width": 10**9},
    {"attention_rates": [3]}, {"in_channels": 9}, {"dropout": "0.1"},
])  # fmt: skip
def test_a_denoiser_that_cannot_be_is_rejected_before_memory_is_taken_for_it(tiny_model_folder, tmp_path, change):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "adm")
    edit(folder, build=json.loads((folder / "config.json").read_text())["build"] | change)
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"do not fit its config.*Fix: copy"):
        load_model(folder, ADM)
    assert time.monotonic() - started < 20


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [
    lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    lambda bomb, path: torch.save({"scale_factor": bomb}, path),
], ids=["pickle", "torch.save"])  # fmt: skip
def test_a_pickle_is_never_executed(folder, tmp_path, write):
    write(Bomb(tmp_path / "executed"), folder / "model.safetensors")
    edit(folder, sha256=sha256(folder / "model.safetensors"))
    with pytest.raises(WeightsError, match="not safetensors"):
        load_model(folder, Autoencoder)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_is_read_and_never_executed(tmp_path):
    torch.save({"state_dict": {"w": torch.arange(3)}}, tmp_path / "good.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "good.ckpt")["state_dict"]["w"], torch.arange(3))
    torch.save({"state_dict": Bomb(tmp_path / "executed")}, tmp_path / "bomb.ckpt")
    with pytest.raises(WeightsError, match=r"(damaged|unsafe checkpoint), "):
        read_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_checkpoint_is_rejected(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.arange(1000)}}, path)
    for content in (b"", b"half", path.read_bytes()[:-300]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"(damaged|unsafe checkpoint), "):
            read_checkpoint(path)


def test_a_model_and_another_autoencoder_do_not_go_together(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    assert Inpainter.load(folder, device="cpu").model.spec.mask_dilation == 1
    save_model(folder / "autoencoder", Autoencoder.of(channels=(4, 8), latent_channels=3, blocks=1, spacing_mm=8.0))
    with pytest.raises(WeightsError, match="latents of another autoencoder"):
        Inpainter.load(folder, device="cpu")


@pytest.mark.parametrize("facts", [
    {"settings": {"mood": 1}}, {"settings": None}, {"settings": []}, {"settings": {"pooling": "nonsense"}},
    {"settings": {"growth_threshold": [1]}}, {"settings": {"mask_dilation": 1.5}}, {"settings": {"mask_dilation": -1}},
    {"settings": {"mask_dilation": 10**9}}, {"settings": {"context": "bad"}}, {"latent_crop": -3},
    {"latent_crop": None}, {"latent_crop": 10**12}, {"schedule": {"steps": "many"}}, {"schedule": {"steps": 10**12}},
    {"schedule": [1]}, {"schedule": {"steps": 1.5}}, {"schedule": {"mood": 1}}, {"prediction": "mood"},
    {"prediction": ["noise"]},
], ids=str)  # fmt: skip
def test_a_model_that_does_not_say_how_it_was_trained_is_rejected(tiny_model_folder, tmp_path, facts):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    edit(folder, **facts)
    with pytest.raises(WeightsError, match="does not say how it was trained"):
        Inpainter.load(folder, device="cpu")


def test_saving_over_a_model_replaces_it_whole(folder):
    other = Autoencoder.of(channels=(4,), latent_channels=5, blocks=1, spacing_mm=1.0)
    save_model(folder, other)
    assert load_model(folder, Autoencoder).latent_channels == 5
