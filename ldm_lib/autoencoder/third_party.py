"""Load autoencoders that were trained with MONAI, monai-generative or NVIDIA MAISI, or with this library.

weights (.pt .pth .ckpt .safetensors) and a JSON of the network's arguments => Autoencoder, and a description of it
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lib import model_io
from ldm_lib.autoencoder.model import Autoencoder, network_class
from ldm_lib.errors import WeightsError
from ldm_lib.files import expand_path, sha256
from ldm_lib.model_io import CONFIG, WEIGHTS

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")
BLOCKS = ("autoencoder_def", "autoencoder", "network_def")  # where the JSON of a MONAI bundle describes it
PARTS = {"encoder", "decoder", "quant_conv_mu", "quant_conv_log_sigma", "post_quant_conv"}
CORE, GENERATIVE = "MONAI core AutoencoderKL", "monai-generative AutoencoderKL"
MAISI = "NVIDIA MAISI AutoencoderKlMaisi"
# Names of monai-generative -> of MONAI core. The last layer of its attention, proj_attn, is left out, because its own
# class never applies it (MONAI's load_old_state_dict does where include_fc is True, without a warning).
GENERATIVE_NAMES = (
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
    (re.compile(r"(blocks\.\d+)\.(to_[qkv]|proj_attn)\."), r"\1.attn.\2."),
)
UNUSED_ARGUMENTS = ("class", "use_checkpoint", "use_checkpointing", "use_flash_attention", "print_info")
# Half precision needs a GPU. Splits change no value where they divide the grid, and lose voxels where they do not.
FOR_EVERY_GRID = {"norm_float16": False, "num_splits": 1}


@dataclass(frozen=True)
class ImportedAutoencoder:
    """Hold a frozen autoencoder that was trained elsewhere."""

    autoencoder: Autoencoder
    description: str  # one line: what it is, and what was done to read it
    standardised: bool  # whether the statistics of its latents came with it; if not, measure and set them


def load_autoencoder(path: str | Path, *, spacing_mm: float) -> ImportedAutoencoder:
    """Load a model folder of this library, or a weights file with the JSON of its network in the same folder.

    The JSON holds the arguments of the class, or is that of a MONAI bundle with such a block. A reference to a literal
    is followed; an expression is never evaluated.

    Args:
        path: a folder with one weights file and one JSON, or the weights file.
        spacing_mm: voxel size it was trained at; folders of this library state theirs.

    Raises:
        WeightsError: nothing there, not a 3D autoencoder of one channel, damaged, unsafe, or a JSON that does not fit.
    """
    path = expand_path(path)
    folder = path.parent if path.name == WEIGHTS else path
    if (folder / CONFIG).is_file() and {"kind", "build"} <= set(model_io.read_json(folder / CONFIG)):
        autoencoder = model_io.load_model(folder, Autoencoder)
        notes = [f"trained at {autoencoder.spacing_mm:g} mm", f"sha256 {autoencoder.folder_config['sha256'][:12]}"]
        return ImportedAutoencoder(autoencoder, _describe("our autoencoder", autoencoder, notes), standardised=True)
    file, description = _files(path)
    tensors, notes = _state_dict(file)
    kind = _kind(tensors, file)
    network = _network_arguments(kind, tensors, description)
    try:
        autoencoder = Autoencoder(network=network, spacing_mm=spacing_mm)
    except model_io.UNBUILDABLE as error:
        cause = f"does not describe {network['class']}: {error}"
        raise WeightsError(cause, where=description, fix="write the arguments it was built with") from error
    tensors = core_names(tensors) if kind == GENERATIVE else tensors
    fix = "give the JSON these weights were trained with"
    model_io.require_fit(tensors, autoencoder.network.state_dict(), where=file, fix=fix)
    autoencoder.network.load_state_dict(tensors)
    if kind == MAISI:
        notes.append("norm_float16 off and num_splits 1, so that it runs in float32 and on every grid")
    notes += [f"taken to be trained at {spacing_mm:g} mm, as the data", f"sha256 {sha256(file)[:12]}"]
    return ImportedAutoencoder(autoencoder.freeze(), _describe(kind, autoencoder, notes), standardised=False)


def core_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename monai-generative's tensors as in MONAI core, for a network built with include_fc=False."""
    kept = {name: tensor for name, tensor in tensors.items() if ".proj_attn." not in name}
    for pattern, name in GENERATIVE_NAMES:
        kept = {pattern.sub(name, old): tensor for old, tensor in kept.items()}
    return kept


def _files(path: Path) -> tuple[Path, Path]:
    """Return the weights file and the JSON with it: of the same name, or the only one in its folder."""
    if not path.exists():
        raise WeightsError("no such file or folder", where=path, fix="name a weights file, or a folder with one")
    inside = [p for p in path.glob("*") if p.suffix in ENDINGS] if path.is_dir() else [path]
    file = _only(inside, "weights file", where=path, fix=f"name the file itself; it ends in {', '.join(ENDINGS)}")
    same_name = file.with_suffix(".json")
    fix = f"write the arguments of its class to {same_name.name} in the same folder"
    described = [same_name] if same_name.is_file() else file.parent.glob("*.json")
    return file, _only(described, "JSON with it", where=file, fix=fix)


def _only(paths: Iterable[Path], what: str, *, where: Path, fix: str) -> Path:
    found = sorted(p for p in paths if p.is_file() and not p.name.startswith("."))
    if len(found) != 1:
        raise WeightsError(f"needs one {what}, has {', '.join(p.name for p in found) or 'none'}", where=where, fix=fix)
    return found[0]


def _state_dict(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a file, without the dictionary around them and without a common prefix, and say so."""
    fix, notes = "save the autoencoder's state_dict() alone, by torch.save or as safetensors", []
    content = model_io.read_tensors(file) if file.suffix == ".safetensors" else model_io.read_checkpoint(file, fix=fix)
    if not _is_state_dict(content):
        inside = {k: v for k, v in content.items() if _is_state_dict(v)} if isinstance(content, dict) else {}
        if len(inside) != 1:
            cause = f"is no state dict but a {type(content).__name__} with {len(inside)} state dicts in it"
            raise WeightsError(cause, where=file, fix=fix)
        ((name, content),) = inside.items()
        notes.append(f"found under {name!r}")
    while len(first := {name.partition(".")[0] for name in content}) == 1 and all("." in name for name in content):
        notes.append(f"prefix '{first.pop()}.' removed")
        content = {name.partition(".")[2]: value for name, value in content.items()}
    model_io.require_finite(content, where=file, fix="take an earlier checkpoint")
    return dict(content), notes


def _is_state_dict(content: Any) -> bool:
    pairs = content.items() if isinstance(content, dict) else ()
    return bool(pairs) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs)


def _kind(tensors: Mapping[str, Tensor], where: Path) -> str:
    """Recognise the class by the names of its tensors."""
    if missing := sorted(PARTS - {name.partition(".")[0] for name in tensors}):
        cause = f"these are no weights of an autoencoder: without {', '.join(missing)}, but with {next(iter(tensors))}"
        raise WeightsError(cause, where=where, fix="name the autoencoder's own weights")
    if "encoder.blocks.0.conv.conv.weight" in tensors:
        return MAISI
    return GENERATIVE if any(old.search(name) for old, _ in GENERATIVE_NAMES for name in tensors) else CORE


def _network_arguments(kind: str, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read every argument of the class that is to hold these tensors from its JSON; "class" names it."""
    content = model_io.read_json(path)
    block = next((content[name] for name in BLOCKS if isinstance(content.get(name), dict)), content)
    given = {name: _literal(name, value, content, path) for name, value in block.items() if not name.startswith("_")}
    name, width = ("AutoencoderKlMaisi", "num_channels") if kind == MAISI else ("AutoencoderKL", "channels")
    named = str(block.get("_target_", block.get("class", name))).rpartition(".")[2]  # compared, never imported
    if named != name:
        cause = f"describes {named}, but these are weights of {kind}"
        raise WeightsError(cause, where=path, fix=f"give the JSON of the {name}")
    defaults = {k: p.default for k, p in signature(network_class(name)).parameters.items() if p.default is not p.empty}
    network = {width if k in ("channels", "num_channels") else k: v for k, v in (defaults | given).items()}
    network = {k: list(v) if isinstance(v, tuple) else v for k, v in network.items() if k not in UNUSED_ARGUMENTS}
    shape = {k: network.get(k) for k in ("spatial_dims", "in_channels", "out_channels")}
    if tuple(shape.values()) != (3, 1, 1):
        cause = f"{', '.join(f'{k} = {v}' for k, v in shape.items())}, where 3, 1 and 1 are needed"
        raise WeightsError(cause, where=path, fix="take an autoencoder of 3D images of one channel")
    if kind == GENERATIVE and network["use_convtranspose"]:
        cause = "use_convtranspose: monai-generative's are 3 voxels wide and do not fit MONAI core's, which are 2"
        raise WeightsError(cause, where=path, fix="take an autoencoder without transposed convolutions")
    network["include_fc"] = any(".out_proj." in key for key in tensors)
    return {"class": name} | network | (FOR_EVERY_GRID if kind == MAISI else {})


def _literal(name: str, value: Any, content: Mapping[str, Any], where: Path) -> Any:
    """Follow a reference of a MONAI bundle to a literal."""
    if isinstance(value, list):
        return [_literal(name, item, content, where) for item in value]
    found = content.get(value[1:], value) if isinstance(value, str) and value.startswith("@") else value
    if isinstance(found, str) and found.startswith(("@", "$", "%")):
        cause = f"{name} = {value!r} is, or refers to, an expression; none is evaluated"
        raise WeightsError(cause, where=where, fix=f"write the value of {name} in its place")
    return found


def _describe(kind: str, autoencoder: Autoencoder, notes: Iterable[str]) -> str:
    millions = sum(parameter.numel() for parameter in autoencoder.parameters()) / 1e6
    facts = f"factor {autoencoder.factor}, {autoencoder.latent_channels} latent channels, {millions:.1f} M parameters"
    return "; ".join([f"{kind}, {facts}", *notes])
