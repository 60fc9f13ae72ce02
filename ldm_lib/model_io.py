"""Save and load models: a folder with model.safetensors and config.json.

The config holds the kind of network, the arguments that build it and the sha256 of its weights. Loading reads tensors
and JSON, and never executes what it reads.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from ldm_lib import files
from ldm_lib.errors import ConfigError, WeightsError

Network = TypeVar("Network", bound=nn.Module)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
UNREADABLE = (  # what torch raises instead of executing code, and where bytes are missing or changed
    torch.serialization.pickle.UnpicklingError, struct.error, AssertionError, AttributeError, EOFError, LookupError,
    OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
# What a network's class raises where its arguments cannot be built.
UNBUILDABLE = (
    TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, AttributeError, ConfigError,
)  # fmt: skip
# Names in model folders and checkpoints before version 0.8 -> now: arguments of networks, and parts of tensors' names.
BUILD_NAMES = {"front_end": "input_transform"}
TENSOR_NAMES = {"untold": "unconditional_embedding", "null": "null_conditioning", "front": "transform"}
DERIVED = ("kind", "build", "sha256")  # entries of config.json that `save_model` writes itself
BUILDERS = {"_instantiator", "_class_path", "_target_"}  # keys by which other libraries name code to call


def save_model(folder: Path, model: nn.Module, **facts: Any) -> str:
    """Write a model folder, weights before the config and each atomically; return the sha256 of the weights.

    Args:
        model: a network with a `config`: the arguments that build it, as plain JSON values.
        facts: plain JSON values to keep with the weights, such as provenance or the sha256 of the autoencoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with files.replacing(folder / WEIGHTS) as partial:
        save_file(tensors, partial)
    digest = files.sha256(folder / WEIGHTS)
    kind = type(model).__name__.lower()
    files.write_json(folder / CONFIG, {"kind": kind, "build": model.config, "sha256": digest, **facts})
    return digest


def without_derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a config.json without what `save_model` writes itself."""
    return {name: value for name, value in config.items() if name not in DERIVED}


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model folder."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise WeightsError("no such model folder", where=path, fix="name a folder with config.json and weights")
    config = read_json(path)
    if not {"kind", "build", "sha256"} <= set(config):
        raise WeightsError("not a model's config: kind, build or sha256 is missing", where=path,
                           fix="name a folder that a training wrote")  # fmt: skip
    return config


def load_model(folder: str | Path, cls: type[Network]) -> Network:
    """Load the network of a model folder, frozen and in evaluation mode; its `folder_config` is its config.json.

    Folders that a version before 0.8 wrote are read, too.

    Raises:
        WeightsError: another kind, a missing file, a file that differs from its sha256, wrong or non-finite tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config["kind"] != (kind := cls.__name__.lower()):
        cause = f"holds a model of kind {config['kind']!r}, need {kind!r}"
        raise WeightsError(cause, where=folder, fix=f"name a folder of kind {kind!r}")
    weights, fix = folder / WEIGHTS, "copy the model folder again"
    if not weights.is_file():
        raise WeightsError("no such file", where=weights, fix="copy the whole model folder")
    if files.sha256(weights) != config["sha256"]:
        raise WeightsError("sha256 differs from its config's", where=weights, fix=fix)
    tensors = current_names(read_tensors(weights))
    require_finite(tensors, where=weights, fix="train again")
    try:
        build = {BUILD_NAMES.get(name, name): value for name, value in config["build"].items()}
        with torch.device("meta"):  # before any memory is taken for it
            expected = cls(**build).state_dict()
    except UNBUILDABLE as error:
        detail = str(error).splitlines()[0]
        cause = f"its weights do not fit its config, from which nothing can be built ({detail})"
        raise WeightsError(cause, where=folder, fix=fix) from error
    require_fit(tensors, expected, where=folder, fix=fix)
    model = cls(**build)
    model.load_state_dict(tensors)
    model.folder_config = config
    return model.eval().requires_grad_(False)


def require_pair(denoiser: nn.Module, autoencoder: nn.Module, *, where: Path) -> None:
    """Reject a denoiser that was trained on latents of another autoencoder; both as `load_model` returns them."""
    if denoiser.folder_config.get("autoencoder_sha256") != autoencoder.folder_config["sha256"]:
        raise WeightsError("was trained on latents of another autoencoder", where=where,
                           fix="copy the whole model folder, its autoencoder included")  # fmt: skip


def current_names(content: Any) -> Any:
    """Translate the names of tensors that a version before 0.8 wrote, as keys and items of dictionaries and lists."""
    if isinstance(content, dict):
        return {current_names(name): current_names(value) for name, value in content.items()}
    if isinstance(content, list):
        return [current_names(item) for item in content]
    if isinstance(content, str):
        return ".".join(TENSOR_NAMES.get(part, part) for part in content.split("."))
    return content


def require_fit(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, where: Path, fix: str
) -> None:
    """Reject weights whose names, shapes or kinds of numbers are not those of the network that a config describes."""
    given, needed = (
        {name: f"{'real' if t.is_floating_point() else 'integer'} {tuple(t.shape)}" for name, t in some.items()}
        for some in (tensors, expected)
    )
    if wrong := sorted(name for name in {*given, *needed} if given.get(name) != needed.get(name)):
        detail = f"{wrong[0]} is {given.get(wrong[0], 'missing')}, needed is {needed.get(wrong[0], 'none')}"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise WeightsError(f"its weights do not fit its config: {detail}{more}", where=where, fix=fix)


def read_checkpoint(path: str | Path, *, fix: str = "set overwrite to train again") -> Any:
    """Read a checkpoint of torch.save, its tensors on the CPU, without executing anything in it.

    Raises:
        WeightsError: it is damaged, holds more than tensors and plain values, or names code to build something.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        unsafe = "Weights only load failed" in str(error)
        cause = "unsafe checkpoint, holds more than tensors" if unsafe else "damaged, not as torch.save writes it"
        raise WeightsError(cause, where=path, fix=fix) from error
    named = content.get("hyper_parameters") if isinstance(content, dict) else None
    if isinstance(named, dict) and (builders := sorted(BUILDERS & set(named))):
        raise WeightsError(f"unsafe checkpoint, names code to build it ({', '.join(builders)})", where=path, fix=fix)
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON file that belongs to weights."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise WeightsError(f"not readable as JSON ({error})", where=path, fix="copy it again") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    try:
        return load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"not safetensors ({error})", where=path, fix="copy it again") from error


def require_finite(tensors: Mapping[str, torch.Tensor], *, where: Path, fix: str) -> None:
    """Reject tensors with NaN or infinity."""
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise WeightsError(f"non-finite weights in {', '.join(bad[:3])}", where=where, fix=fix)
