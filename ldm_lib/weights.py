"""Model folders: model.safetensors, and config.json with the kind, how to build it and the sha256 of the weights.

Loading reads tensors and JSON, and never executes what it reads.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ldm_lib.adm import ADM
from ldm_lib.autoencoder import Autoencoder
from ldm_lib.errors import WeightsError
from ldm_lib.files import sha256

WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS: dict[str, type[nn.Module]] = {"autoencoder": Autoencoder, "adm": ADM}


def save_model(folder: Path, model: nn.Module, **facts: Any) -> str:
    """Write a model folder, weights before config, each atomically; return the weights' sha256.

    Args:
        facts: plain JSON values to keep with the weights (training, provenance, the autoencoder's sha256).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    _replace(folder / WEIGHTS, save(tensors))
    digest = sha256(folder / WEIGHTS)
    kind = next(name for name, cls in KINDS.items() if isinstance(model, cls))
    config = {"kind": kind, "build": model.config, "sha256": digest, **facts}
    _replace(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return digest


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(
            "no such model folder", where=path, fix="name a folder with config.json and weights"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"not readable as JSON ({error})", where=path) from error
    if not {"kind", "build", "sha256"} <= set(config) or config["kind"] not in KINDS:
        raise WeightsError("not a model's config: kind, build or sha256 is missing or unknown", where=path)
    return config


def load_model(folder: str | Path, kind: str) -> nn.Module:
    """Build and load a model of this kind, in evaluation mode and frozen.

    Raises:
        WeightsError: another kind, a file that is missing or not what its sha256 says, wrong or non-finite tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config["kind"] != kind:
        raise WeightsError(f"holds a model of kind {config['kind']!r}, need {kind!r}", where=folder)
    tensors = _read_tensors(folder / WEIGHTS, config["sha256"])
    try:
        model = KINDS[kind](**config["build"])
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:
        raise WeightsError(f"its weights do not fit its config: {str(error).splitlines()[0]}", where=folder) from error
    model.folder_config = config
    return model.eval().requires_grad_(False)


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise WeightsError("no such file", where=path, fix="copy the whole model folder")
    if sha256(path) != digest:
        raise WeightsError("sha256 differs from its config's", where=path, fix="copy the model folder again")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise WeightsError(f"not safetensors ({error})", where=path) from error
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise WeightsError(f"non-finite weights in {', '.join(bad[:3])}", where=path, fix="train again")
    return tensors


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
