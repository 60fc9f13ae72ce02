"""Other people's autoencoders: what is in a file is found out, checked and said before it is used.

weights (.pt .pth .ckpt .safetensors) and a JSON of the network's arguments => Autoencoder, and one line of what it is

Known are MONAI core's AutoencoderKL, monai-generative's (other names for attention and upsampling), NVIDIA MAISI's
AutoencoderKlMaisi, and the folders of `weights`. Nothing that is read is executed.
"""

import importlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_lib.autoencoder.model import NETWORKS, Autoencoder
from ldm_lib.errors import ConfigError, WeightsError
from ldm_lib.files import given_path, sha256
from ldm_lib.model_io import CONFIG, WEIGHTS, load_model, read_checkpoint, read_json, read_tensors, require_finite

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")
BLOCKS = ("autoencoder_def", "autoencoder", "network_def")  # where a MONAI bundle's JSON describes it
PARTS = ("encoder", "decoder", "quant_conv_mu", "quant_conv_log_sigma", "post_quant_conv")
STRANGERS = (
    ("embed.0.", "a diffusion model"),  # "time_embed" in MONAI's, "embed" in ours
    ("initial_conv.", "a discriminator"),
    ("quantizer.", "a VQ-VAE"),
    ("submodule.", "a U-Net"),
    ("latent_mean", "one of our model folders, whose config.json is not here"),
)
CORE, GENERATIVE = "MONAI core AutoencoderKL", "monai-generative AutoencoderKL"
MAISI = "NVIDIA MAISI AutoencoderKlMaisi"
OLD_UPSAMPLING = re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\.")
OLD_ATTENTION = re.compile(r"(blocks\.\d+)\.(to_[qkv]|proj_attn)\.")
OF_TRAINING = ("use_checkpoint", "use_checkpointing", "print_info")
# Half precision needs a GPU. Pieces change no value where they divide the grid, and lose cells where they do not.
FOR_EVERY_GRID = {"norm_float16": False, "num_splits": 1}
LARGEST_DIFFERENCE = 1e-3  # relative, of what two classes return with the same weights


@dataclass(frozen=True)
class Found:
    """An autoencoder somebody trained.

    Attributes:
        autoencoder: frozen, in evaluation mode.
        told: one line for people: what it is, and what was done to read it.
        standardised: the statistics of its latents came with it; if not, they are still to be measured and set.
    """

    autoencoder: Autoencoder
    told: str
    standardised: bool


def load_autoencoder(path: str | Path, *, spacing_mm: float) -> Found:
    """Load our model folder, a folder with one weights file and a JSON, or a weights file with a JSON beside it.

    The JSON holds the arguments of the class, or is a MONAI bundle's that has such a block. A reference to a literal
    is followed; an expression is never evaluated.

    Args:
        spacing_mm: voxel size it was trained at; our folders know theirs.

    Raises:
        WeightsError: nothing there, something else than an autoencoder of 3D images of one channel, damaged, unsafe,
            or a JSON that does not fit.
    """
    path = given_path(path)
    folder = path.parent if path.name == WEIGHTS else path
    if (folder / CONFIG).is_file() and _is_ours(read_json(folder / CONFIG)):
        autoencoder = load_model(folder, Autoencoder)
        notes = [f"trained at {autoencoder.spacing_mm:g} mm", f"sha256 {autoencoder.folder_config['sha256'][:12]}"]
        return Found(autoencoder, _told("our autoencoder", autoencoder, notes), standardised=True)
    file = _weights_file(path)
    description = _description(file)
    tensors, notes = _state_dict(file)
    kind = _kind(tensors, file)
    network = _network(_block(description), kind, tensors, description)
    try:
        autoencoder = Autoencoder(network=network, spacing_mm=spacing_mm)
    except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, AttributeError, ConfigError) as error:
        cause = f"does not describe {network['class']}: {error}"
        raise WeightsError(cause, where=description, fix="write the arguments it was built with") from error
    _fill(autoencoder.network, core_names(tensors) if kind == GENERATIVE else tensors, file)
    if kind == GENERATIVE:
        notes.append(_compared(autoencoder, tensors, file))
    if kind == MAISI:
        notes.append("norm_float16 off and num_splits 1, so that it runs in float32 and on every grid")
    notes.append(f"taken to be trained at {spacing_mm:g} mm, which is the data's")
    told = _told(kind, autoencoder, [*notes, f"sha256 {sha256(file)[:12]}"])
    return Found(autoencoder.freeze(), told, standardised=False)


def core_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """monai-generative's tensors under the names of MONAI core, for a network built with include_fc=False.

    The last layer of its attention, proj_attn, is left out, because its own class never applies it. (MONAI's
    load_old_state_dict puts it to use if include_fc is True, and tells nothing.)
    """
    kept = {OLD_UPSAMPLING.sub(r"\1.postconv.conv.", k): v for k, v in tensors.items() if ".proj_attn." not in k}
    return {OLD_ATTENTION.sub(r"\1.attn.\2.", name): value for name, value in kept.items()}


def _is_ours(content: Mapping[str, Any]) -> bool:
    return {"kind", "build"} <= set(content)


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise WeightsError("no such file or folder", where=path, fix="name a weights file, or a folder with one")
    inside = [p for p in path.glob("*") if p.suffix in ENDINGS] if path.is_dir() else [path]
    return _one(inside, "weights file", where=path, fix=f"name the file itself; it ends in {', '.join(ENDINGS)}")


def _description(file: Path) -> Path:
    beside = file.with_suffix(".json")
    fix = f"write the arguments of its class to {beside.name} beside it"
    return beside if beside.is_file() else _one(file.parent.glob("*.json"), "JSON beside it", where=file, fix=fix)


def _one(paths: Iterable[Path], what: str, *, where: Path, fix: str) -> Path:
    found = sorted(p for p in paths if p.is_file() and not p.name.startswith("."))
    if len(found) != 1:
        raise WeightsError(f"needs one {what}, has {', '.join(p.name for p in found) or 'none'}", where=where, fix=fix)
    return found[0]


def _state_dict(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file, out of the dictionary around them and without a common prefix, and what was done."""
    fix, notes = "save the autoencoder's state_dict() alone, by torch.save or as safetensors", []
    content = read_tensors(file) if file.suffix == ".safetensors" else read_checkpoint(file, fix=fix)
    if not _is_state_dict(content):
        inside = {k: v for k, v in content.items() if _is_state_dict(v)} if isinstance(content, dict) else {}
        if len(inside) != 1:
            cause = f"is no state dict but a {type(content).__name__} with {_some(list(inside))} state dicts in it"
            raise WeightsError(cause, where=file, fix=fix)
        ((name, content),) = inside.items()
        notes.append(f"found under {name!r}")
    while len(first := {name.partition(".")[0] for name in content}) == 1 and all("." in name for name in content):
        notes.append(f"prefix '{first.pop()}.' taken off")
        content = {name.partition(".")[2]: value for name, value in content.items()}
    require_finite(content, where=file, fix="take an earlier checkpoint")
    return dict(content), notes


def _is_state_dict(content: Any) -> bool:
    pairs = content.items() if isinstance(content, dict) else ()
    return bool(pairs) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs)


def _kind(tensors: Mapping[str, Tensor], where: Path) -> str:
    """Whose class has these names."""
    strange = [name for name in tensors if name.partition(".")[0] not in PARTS]
    missing = [part for part in PARTS if not any(name.startswith(f"{part}.") for name in tensors)]
    if missing:
        whose = next((what for mark, what in STRANGERS if any(mark in name for name in tensors)), "another network")
        cause = f"these are keys of {whose}, not of an autoencoder: {_some(missing)} missing, {_some(strange)} strange"
        raise WeightsError(cause, where=where, fix="name the autoencoder's own weights")
    if "encoder.blocks.0.conv.conv.weight" in tensors:
        return MAISI
    return GENERATIVE if any(OLD_UPSAMPLING.search(k) or OLD_ATTENTION.search(k) for k in tensors) else CORE


def _block(path: Path) -> dict[str, Any]:
    """The arguments of the network in a JSON, "_target_" among them."""
    content = read_json(path)
    block = next((content[name] for name in BLOCKS if isinstance(content.get(name), dict)), content)
    given = {name: value for name, value in block.items() if name == "_target_" or not name.startswith("_")}
    return {name: _literal(name, value, content, path) for name, value in given.items()}


def _literal(name: str, value: Any, content: Mapping[str, Any], where: Path) -> Any:
    if isinstance(value, list):
        return [_literal(name, item, content, where) for item in value]
    found = content.get(value[1:], value) if isinstance(value, str) and value.startswith("@") else value
    if isinstance(found, str) and found.startswith(("@", "$", "%")):
        cause = f"{name} = {value!r} is, or refers to, an expression; none is evaluated"
        raise WeightsError(cause, where=where, fix=f"write the value of {name} in its place")
    return found


def _network(block: dict[str, Any], kind: str, tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """Every argument of the class that holds these tensors, "class" among them."""
    name, width = ("AutoencoderKlMaisi", "num_channels") if kind == MAISI else ("AutoencoderKL", "channels")
    named = str(block.pop("_target_", block.pop("class", name))).rpartition(".")[2]
    if named != name:
        cause = f"describes {named}, but these are weights of {kind}"
        raise WeightsError(cause, where=where, fix=f"bring the JSON of the {name}")
    given = {width if k in ("channels", "num_channels") else k: v for k, v in block.items() if k not in OF_TRAINING}
    defaults = {k: p.default for k, p in signature(NETWORKS[name]).parameters.items() if p.default is not p.empty}
    network = {k: list(v) if isinstance(v, tuple) else v for k, v in (defaults | given).items()}
    shape = {k: network.get(k) for k in ("spatial_dims", "in_channels", "out_channels")}
    if tuple(shape.values()) != (3, 1, 1):
        cause = f"{', '.join(f'{k} = {v}' for k, v in shape.items())}, where 3, 1 and 1 are needed"
        raise WeightsError(cause, where=where, fix="take an autoencoder of 3D images of one channel")
    if kind == GENERATIVE and network["use_convtranspose"]:
        cause = "use_convtranspose: monai-generative's are 3 voxels wide and do not fit MONAI core's, which are 2"
        raise WeightsError(cause, where=where, fix="take an autoencoder without transposed convolutions")
    network["include_fc"] = any(".out_proj." in key for key in tensors)
    return {"class": name} | network | (FOR_EVERY_GRID if kind == MAISI else {})


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    wanted, fix = network.state_dict(), "bring the JSON these weights were trained with"
    missing, strange = [k for k in wanted if k not in tensors], [k for k in tensors if k not in wanted]
    if missing or strange:
        cause = f"its JSON describes another network: {_some(missing)} keys missing, {_some(strange)} unexpected"
        raise WeightsError(cause, where=where, fix=fix)
    other = [k for k, v in wanted.items() if tensors[k].shape != v.shape]
    if other:
        cause = f"{list(tensors[other[0]].shape)}, its JSON means {list(wanted[other[0]].shape)}"
        raise WeightsError(f"{_some(other)} tensors of another shape: {cause}", where=where, fix=fix)
    network.load_state_dict(tensors, strict=True)


def _compared(autoencoder: Autoencoder, tensors: Mapping[str, Tensor], where: Path) -> str:
    """Encode and decode noise with monai-generative's own class and with ours; how far they are apart, in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about modules it imports along
            cls = importlib.import_module("generative.networks.nets.autoencoderkl").AutoencoderKL
    except (ImportError, AttributeError):
        return "not compared: monai-generative is not installed"
    network = autoencoder.config["network"]
    known = network | {"num_channels": network["channels"], "use_flash_attention": False}
    old, new = cls(**{k: known[k] for k in signature(cls).parameters if k in known}).eval(), autoencoder.network.eval()
    _fill(old, tensors, where)
    volume = torch.randn((1, 1, *[2 * autoencoder.factor] * 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = old.encode(volume)[0]
        pairs = (mean, new.encode(volume)[0]), (old.decode(mean), new.decode(mean))
    difference = max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)
    if not difference <= LARGEST_DIFFERENCE:
        cause = f"differs by {difference:.1e} from monai-generative's own class once it is read as MONAI core's"
        raise WeightsError(cause, where=where, fix="convert it with the versions it was trained with")
    return f"compared with monai-generative's own class: largest difference {difference:.0e}"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({names[0]}{', ...' if len(names) > 1 else ''})" if names else "0"


def _told(kind: str, autoencoder: Autoencoder, notes: Iterable[str]) -> str:
    millions = sum(parameter.numel() for parameter in autoencoder.parameters()) / 1e6
    facts = f"{autoencoder.factor} voxels a cell, {autoencoder.latent_channels} channels, {millions:.1f} M parameters"
    return "; ".join([f"{kind}, {facts}", *notes])
