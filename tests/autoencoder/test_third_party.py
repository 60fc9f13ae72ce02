"""Laws of reading others' weights: what comes out computes what their authors' network computes, or is rejected."""

import io
import json
import os
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from generative.networks.nets.autoencoderkl import AutoencoderKL as GenerativeAutoencoderKL
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL, UNet
from safetensors.torch import save_file

from ldm_lib.autoencoder.fitting import latent_statistics
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.autoencoder.third_party import core_names, load_autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion.latents import LatentSpec, encode_case
from ldm_lib.errors import WeightsError
from ldm_lib.experiment.presets import resolve
from ldm_lib.geometry import block_mean
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.model_io import load_model, save_model
from ldm_lib.training.initialise import new_model

CPU = torch.device("cpu")
ONE_CHANNEL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "norm_num_groups": 2}
PLAIN = {"attention_levels": [False, False], "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
ATTENTIVE = {"attention_levels": [False, True]}
CORE = ONE_CHANNEL | {"channels": [4, 8], "num_res_blocks": [1, 1]}
OLD = ONE_CHANNEL | {"num_channels": [4, 8], "num_res_blocks": 1}
MAISI = ONE_CHANNEL | {"latent_channels": 4, "num_channels": [4, 4, 8], "num_res_blocks": [1, 1, 1], "dim_split": 1,
                       "attention_levels": [False] * 3, "norm_float16": False, "num_splits": 2}  # fmt: skip
KINDS = {
    "core": ("core", CORE | PLAIN),
    "core attention": ("core", CORE | ATTENTIVE),
    "core attention without its last layer": ("core", CORE | ATTENTIVE | {"include_fc": False}),
    "core transposed": ("core", CORE | PLAIN | {"num_res_blocks": 2, "use_convtranspose": True}),
    "core with most left to its defaults": ("core", {"spatial_dims": 3, "channels": [4] * 4, "norm_num_groups": 2}),
    "generative": ("generative", OLD | PLAIN),
    "generative attention": ("generative", OLD | ATTENTIVE | {"use_checkpointing": True, "use_flash_attention": False}),
    "generative with most left to its defaults": (
        "generative",
        {"spatial_dims": 3, "num_channels": [4] * 4, "norm_num_groups": 2},
    ),
    "maisi": ("maisi", MAISI),
}


def original(kind):
    """A network of this kind as its authors build it, random in every tensor, and its arguments."""
    whose, arguments = KINDS[kind]
    cls = {"core": AutoencoderKL, "maisi": AutoencoderKlMaisi, "generative": GenerativeAutoencoderKL}[whose]
    torch.manual_seed(len(kind))
    network = cls(**arguments).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network, arguments


def lay(folder, tensors, description, name="weights.pt"):
    """A folder with weights and JSON."""
    folder.mkdir(exist_ok=True)
    (save_file if name.endswith("safetensors") else torch.save)(tensors, folder / name)
    (folder / "arguments.json").write_text(json.dumps(description))
    return folder


def saved(folder, kind="core"):
    network, arguments = original(kind)
    return lay(folder, network.state_dict(), arguments)


def furthest(network, other, shape=(8, 32, 8)):
    """Largest difference of posterior means, and of decoded volumes."""
    volume = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        mean, mean_of_other = network.encode(volume)[0], other.encode(volume)
        ends = [(mean, mean_of_other), (network.decode(mean), other.decode(mean))]
    assert all(a.shape == b.shape and a.std() > 1e-2 for a, b in ends)
    return max((a - b).abs().max().item() for a, b in ends)


# ---- what is loaded computes what was saved


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_what_its_own_class_computes(tmp_path, kind):
    network, _ = original(kind)
    found = load_autoencoder(saved(tmp_path, kind), spacing_mm=2.0)
    assert furthest(network, found.autoencoder) < 1e-5
    assert not found.standardised and found.autoencoder.spacing_mm == 2.0
    assert not found.autoencoder.training and not any(p.requires_grad for p in found.autoencoder.parameters())
    save_model(tmp_path / "ours", found.autoencoder)
    again = load_autoencoder(tmp_path / "ours", spacing_mm=1.0)
    assert furthest(network, again.autoencoder) < 1e-5
    assert again.standardised and again.autoencoder.spacing_mm == 2.0 and "2 mm" in again.description


@pytest.mark.parametrize(("name", "wrap", "said"), [
    ("model.pth", dict, "3 latent channels"),
    ("model.safetensors", dict, "3 latent channels"),
    ("last.ckpt", lambda w: {"epoch": 3, "state_dict": w, "optimizer_states": [{"lr": 0.1}]}, "under 'state_dict'"),
    ("model.pt", lambda w: {f"module.{k}": v for k, v in w.items()}, "prefix 'module.' removed"),
    ("model.pt", lambda w: {"model": {f"module.autoencoder.{k}": v for k, v in w.items()}}, "prefix 'autoencoder.'"),
])  # fmt: skip
def test_however_a_state_dict_is_wrapped(tmp_path, name, wrap, said):
    network, arguments = original("core")
    folder = lay(tmp_path / "a", wrap(network.state_dict()), arguments, name)
    for path in (folder, folder / name):
        found = load_autoencoder(path, spacing_mm=1.0)
        assert furthest(network, found.autoencoder) < 1e-5
        assert said in found.description


def test_the_json_of_the_same_name_is_taken(tmp_path):
    network, arguments = original("core")
    folder = lay(tmp_path, network.state_dict(), arguments)
    (folder / "arguments.json").rename(folder / "weights.json")
    (folder / "notes.json").write_text("{}")
    (folder / "._weights.pt").write_bytes(b"what macOS leaves on other disks")
    assert furthest(network, load_autoencoder(folder, spacing_mm=1.0).autoencoder) < 1e-5


@pytest.mark.parametrize(("kind", "target", "block"), [
    ("core", "monai.networks.nets.AutoencoderKL", "network_def"),
    ("generative", "generative.networks.nets.AutoencoderKL", "autoencoder"),
    ("maisi", "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi", "autoencoder_def"),
])  # fmt: skip
def test_a_bundle_is_read_and_not_run(tmp_path, kind, target, block):
    network, arguments = original(kind)
    described = arguments | {"_target_": target, "_requires_": ["@load"], "in_channels": "@image_channels",
                             "latent_channels": "@latent_channels"}  # fmt: skip
    bundle = {"imports": ["$import os"], "spatial_dims": 3, "image_channels": 1, block: described,
              "load": "$os.abort()", "latent_channels": arguments["latent_channels"]}  # fmt: skip
    if block != "autoencoder":
        bundle |= {"autoencoder": "$@autoencoder_def.to(@device)"}
    if block == "autoencoder_def":
        bundle |= {"network_def": {"_target_": "DiffusionModelUNet"}}
    folder = lay(tmp_path, network.state_dict(), bundle)
    assert furthest(network, load_autoencoder(folder, spacing_mm=1.0).autoencoder) < 1e-5


# ---- monai-generative


@pytest.mark.parametrize("kind", ["generative", "generative attention"])
def test_conversion_equals_monais_where_monais_is_right(kind):
    old, arguments = original(kind)
    new = AutoencoderKL(**{k: v for k, v in arguments.items() if k not in ("num_channels", "use_checkpointing")},
                        channels=arguments["num_channels"], include_fc=False)  # fmt: skip
    with redirect_stdout(io.StringIO()):
        new.load_old_state_dict(dict(old.state_dict()))
    ours, theirs = core_names(old.state_dict()), new.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_transposed_convolutions_of_the_old_class_do_not_fit_the_new(tmp_path):
    """3 voxels wide there, 2 here; MONAI's own conversion leaves them as they were initialised."""
    arguments = OLD | PLAIN | {"use_convtranspose": True}
    rejected(lay(tmp_path, GenerativeAutoencoderKL(**arguments).state_dict(), arguments), "use_convtranspose")


# ---- MAISI


def test_maisi_gives_a_latent_voxel_for_every_four_voxels_of_any_grid(tmp_path):
    """In pieces, as its config asks for, it loses voxels of grids that they do not divide, without a warning."""
    network, _ = original("maisi")
    autoencoder = load_autoencoder(saved(tmp_path, "maisi"), spacing_mm=1.0).autoencoder
    assert network.encode(torch.zeros(1, 1, 8, 60, 8))[0].shape[-2] == 14
    assert autoencoder.encode(torch.zeros(1, 1, 8, 60, 8)).shape == (1, 4, 2, 15, 2)
    assert autoencoder.decode(torch.zeros(1, 4, 2, 15, 2)).shape == (1, 1, 8, 60, 8)
    full = autoencoder.to("meta").encode(torch.empty(1, 1, 240, 240, 160, device="meta"))
    assert autoencoder.factor == 4 and full.shape == (1, 4, 60, 60, 40)


def test_maisi_runs_in_float32_and_says_so(tmp_path):
    network, arguments = original("maisi")
    lay(tmp_path, network.state_dict(), arguments | {"norm_float16": True, "num_splits": 8})
    found = load_autoencoder(tmp_path, spacing_mm=1.0)
    assert furthest(network, found.autoencoder) < 1e-5
    assert "MAISI AutoencoderKlMaisi, factor 4, 4 latent channels" in found.description
    assert "norm_float16 off and num_splits 1" in found.description


# ---- the rest of the pipeline never knows


@pytest.mark.parametrize("kind", ["core", "generative", "maisi", "ours"])
def test_notebooks_core_path(kind, tmp_path, cases, tiny_autoencoder_folder):
    found = load_autoencoder(tiny_autoencoder_folder if kind == "ours" else saved(tmp_path, kind), spacing_mm=8.0)
    autoencoder, seen = found.autoencoder, cases[: 4 if found.standardised else 2]  # ours has seen four
    if not found.standardised:
        autoencoder.standardise(*latent_statistics(autoencoder, seen, device=CPU, precision="32"))
    save_model(tmp_path / "model", autoencoder)
    autoencoder = load_model(tmp_path / "model", Autoencoder)
    grids = [grid_case(load_case(case), autoencoder.factor) for case in seen]
    encoded = [encode_case(grid, autoencoder, LatentSpec(), device=CPU, precision="32") for grid in grids]
    inside = [e["target"][:, torch.from_numpy(block_mean(g.target > 0, autoencoder.factor) > 0.5)]
              for e, g in zip(encoded, grids, strict=True)]  # fmt: skip
    inside = torch.cat(inside, dim=1).double()
    assert torch.allclose(inside.mean(1), torch.zeros(len(inside)).double(), atol=1e-3)
    assert torch.allclose(inside.std(1, correction=0), torch.ones(len(inside)).double(), atol=1e-2)
    small = {"base_width": 8, "multipliers": "1,2", "attention_rates": "2", "precision": "32", "device": "cpu"}
    model = new_model(tmp_path / "model", resolve("smoke", small)["04_training"], LatentSpec())
    data = load_case(cases[0])
    filled = Inpainter(model)(data, num_inference_steps=2).samples[0]
    assert np.array_equal(filled[~data.mask], data.voided[~data.mask])
    assert np.isfinite(filled).all() and filled.shape == data.mask.shape


# ---- rejections: each with the reason and the fix


def rejected(path, reason):
    with pytest.raises(WeightsError, match=reason) as caught:
        load_autoencoder(path, spacing_mm=1.0)
    assert caught.value.fix and caught.value.where


def test_places_without_one_model_are_rejected(tmp_path):
    rejected(tmp_path / "nowhere", "no such file or folder")
    rejected(tmp_path, "needs one weights file, has none")
    folder = saved(tmp_path / "a")
    (folder / "arguments.json").rename(folder / "arguments.txt")
    rejected(folder, "needs one JSON with it, has none")
    rejected(folder / "weights.pt", "needs one JSON with it, has none")
    for name in ("one.json", "two.json"):
        (folder / name).write_text("{}")
    rejected(folder, r"needs one JSON with it, has one\.json, two\.json")
    (folder / "weights.pth").write_bytes(b"")
    rejected(folder, r"needs one weights file, has weights\.pt, weights\.pth")


@pytest.mark.parametrize("network", [
    lambda: UNet(3, 1, 1, channels=(4, 4, 4), strides=(2, 2)),
    lambda: torch.nn.Linear(2, 2),
    lambda: Autoencoder(network={"class": "AutoencoderKL"} | CORE | PLAIN, spacing_mm=1.0),
], ids=["unet", "linear", "ours without its config"])  # fmt: skip
def test_other_networks_are_rejected(tmp_path, network):
    folder = lay(tmp_path, network().state_dict(), original("core")[1])
    rejected(folder, "no weights of an autoencoder: without decoder, encoder, .*, but with ")


def test_our_denoiser_is_rejected(tmp_path, tiny_model_folder):
    rejected(tiny_model_folder, "holds a model of kind 'adm', need 'autoencoder'")
    rejected(tiny_model_folder / "model.safetensors", "kind 'adm'")


BIAS = "quant_conv_mu.conv.bias"


@pytest.mark.parametrize(("kind", "change", "reason"), [
    ("core", lambda w: {k: v for k, v in w.items() if k != BIAS}, r"conv\.bias is missing, needed is real \(3,\)"),
    ("generative", lambda w: w | {"decoder.stranger": torch.zeros(1)}, r"stranger is real \(1,\), needed is none"),
    ("maisi", lambda w: w | {BIAS: torch.zeros(7)}, r"conv\.bias is real \(7,\), needed is real \(4,\)"),
    ("core", lambda w: w | {BIAS: torch.tensor([1.0, float("nan"), 0.0])}, rf"non-finite weights in {BIAS}"),
    ("core", lambda w: list(w.values()), "is no state dict but a list with 0 state dicts"),
    ("core", lambda w: {}, "is no state dict but a dict with 0 state dicts"),
    ("core", lambda w: {"raw": w, "ema": w}, "is no state dict but a dict with 2 state dicts"),
])  # fmt: skip
def test_wrong_tensors_are_rejected(tmp_path, kind, change, reason):
    network, arguments = original(kind)
    rejected(lay(tmp_path, change(dict(network.state_dict())), arguments), reason)


@pytest.mark.parametrize(("kind", "change", "reason"), [
    ("core", {"num_res_blocks": [2, 2]}, r"is missing, needed is real .* and \d+ more"),
    ("core", {"latent_channels": 4}, r"is real .*, needed is real"),
    ("core", {"channels": [4, 16]}, r"is real .*, needed is real"),
    ("core", {"norm_num_groups": 0}, "does not describe AutoencoderKL"),
    ("core", {"in_channels": 4}, "in_channels = 4, out_channels = 1, where 3, 1 and 1 are needed"),
    ("core", {"_target_": "generative.networks.nets.VQVAE"}, "describes VQVAE"),
    ("core", {"channels": "4,8"}, "does not describe AutoencoderKL"),
    ("core", {"norm_num_groups": 3}, "does not describe AutoencoderKL: .*multiple of norm_num_groups"),
    ("core", {"learning_rate": 0.1}, "unexpected keyword argument 'learning_rate'"),
    ("generative", {"out_channels": 2}, "out_channels = 2, where 3, 1 and 1 are needed"),
    ("maisi", {"spatial_dims": 2}, "spatial_dims = 2, .*where 3, 1 and 1 are needed"),
    ("maisi", {"_target_": "monai.networks.nets.AutoencoderKL"}, "describes AutoencoderKL, but .* NVIDIA MAISI"),
    ("generative", {"class": "AutoencoderKlMaisi"}, "describes AutoencoderKlMaisi, but .* monai-generative"),
    ("core", {"latent_channels": "$1 + 2"}, r"latent_channels = '\$1 \+ 2' is, or refers to, an expression"),
    ("core", {"channels": [4, "@wide"]}, "channels = '@wide' is, or refers to, an expression"),
    ("core", {"latent_channels": "@a", "a": "@b", "b": 3}, "latent_channels = '@a' is, or refers to"),
    ("core", {"latent_channels": "%other.json::a"}, "is, or refers to, an expression"),
])  # fmt: skip
def test_descriptions_that_do_not_fit_are_rejected(tmp_path, kind, change, reason):
    network, arguments = original(kind)
    rejected(lay(tmp_path, network.state_dict(), arguments | change), reason)


@pytest.mark.parametrize(("text", "reason"), [
    ("\x00\xff", "not readable as JSON"), ("[" * 100000, "not readable as JSON"),
    ("[1]", "holds no mapping but list"), ("{}", "spatial_dims = None"),
], ids=["bytes", "deep", "list", "empty"])  # fmt: skip
def test_broken_json_is_rejected(tmp_path, text, reason):
    (saved(tmp_path) / "arguments.json").write_bytes(text.encode("latin-1"))
    rejected(tmp_path, reason)
    (tmp_path / "arguments.json").rename(tmp_path / "config.json")
    rejected(tmp_path, reason)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_an_executable_pickle_is_rejected_and_not_executed(tmp_path):
    folder = saved(tmp_path / "a")
    for bomb in (Bomb(tmp_path / "executed"), {"state_dict": Bomb(tmp_path / "executed")}, original("core")[0]):
        torch.save(bomb, folder / "weights.pt")
        rejected(folder, "unsafe checkpoint, holds more than tensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "reason"), [
    ("weights.pt", "damaged, not as torch.save"),
    ("weights.safetensors", "not safetensors"),
])  # fmt: skip
def test_a_truncated_file_is_rejected(tmp_path, name, reason):
    network, arguments = original("core")
    file = lay(tmp_path, network.state_dict(), arguments, name) / name
    for content in (file.read_bytes()[:-300], b""):
        file.write_bytes(content)
        rejected(tmp_path, reason)


# ---- more laws


def test_weights_of_half_precision_are_computed_with_in_float32(tmp_path):
    network, arguments = original("core")
    lay(tmp_path, {name: value.half() for name, value in network.state_dict().items()}, arguments)
    assert furthest(network.half().float(), load_autoencoder(tmp_path, spacing_mm=1.0).autoencoder) < 1e-5


@pytest.mark.parametrize("kind", ["core attention", "core attention without its last layer"])
def test_the_weights_say_whether_attention_has_a_last_layer(tmp_path, kind):
    network, arguments = original(kind)
    lay(tmp_path, network.state_dict(), {k: v for k, v in arguments.items() if k != "include_fc"})
    assert furthest(network, load_autoencoder(tmp_path, spacing_mm=1.0).autoencoder) < 1e-5


def test_flash_attention_of_the_old_class_needs_no_gpu(tmp_path):
    network, arguments = original("generative attention")
    lay(tmp_path, network.state_dict(), arguments | {"use_flash_attention": True})
    found = load_autoencoder(tmp_path, spacing_mm=1.0)
    assert furthest(network, found.autoencoder) < 1e-5


def test_a_damaged_file_of_the_old_format_is_rejected(tmp_path):
    """torch before 1.6 wrote no archive, and its reader fails in many ways."""
    network, arguments = original("core")
    file = lay(tmp_path, network.state_dict(), arguments) / "weights.pt"
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    assert furthest(network, load_autoencoder(tmp_path, spacing_mm=1.0).autoencoder) < 1e-5
    storage = str(next(iter(network.state_dict().values())).untyped_storage()._cdata).encode()
    assert storage in whole, "the address that names a storage in the file"
    for damaged in [whole[: len(whole) * k // 10] for k in range(10)] + [whole.replace(storage, b"?" + storage[1:], 1)]:
        file.write_bytes(damaged)
        rejected(tmp_path, "damaged, not as torch.save")
