"""Make of a trained model what comes with the library: half the bytes, and how it was trained beside it.

<folder>/model.safetensors, config.json     the denoiser in float16
<folder>/autoencoder/                       likewise
<folder>/training.csv                       the figures of its training, as it went
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.diffusion.options import SamplerOptions
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import WeightsError
from ldm_lib.files import AUTOENCODER_FOLDER, PRETRAINED, expand_path
from ldm_lib.model_io import load_model, require_pair, save_model

LOG = "training.csv"
DERIVED = ("kind", "build", "sha256")  # of a config: what `save_model` writes itself
LARGEST = torch.finfo(torch.float16).max


def ship(model: str | Path, folder: Path = PRETRAINED, *, temperature: float = 0.0) -> list[Path]:
    """Write a model folder again in float16, which keeps 11 binary digits; return the files.

    Args:
        model: as stage 04 writes it, `metrics.csv` beside it.
        temperature: that sampling starts from by default; 0 keeps the model's own.

    Raises:
        ConfigError: a temperature out of range.
        WeightsError: no model folder, one of another autoencoder, no log of its training, or a weight beyond float16;
            nothing is written then.
    """
    model, own = expand_path(model), {"temperature": temperature} if temperature else {}
    SamplerOptions.parse(own)
    autoencoder, denoiser = _fitting(model / AUTOENCODER_FOLDER, Autoencoder), _fitting(model, ADM)
    require_pair(denoiser, autoencoder, where=model)
    log = model.with_name("metrics.csv")
    if not log.is_file():
        raise WeightsError("no log of its training", where=log, fix="name the model folder of a stage 04")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".ship-", dir=folder.parent) as made:  # what was there stays whole until then
        digest = _halved(autoencoder, Path(made) / AUTOENCODER_FOLDER)
        _halved(denoiser, Path(made), autoencoder_sha256=digest, **own)
        shutil.copyfile(log, Path(made) / LOG)
        files = [path for path in Path(made).rglob("*") if path.is_file()]
        return sorted(_moved(path, folder / path.relative_to(made)) for path in files)


def _moved(path: Path, to: Path) -> Path:
    """Into its place, where all who may read the library may read it."""
    to.parent.mkdir(exist_ok=True)
    path.chmod(0o644)
    return path.replace(to)


def _fitting(source: Path, cls: type[nn.Module]) -> nn.Module:
    """The network of a folder, if float16 can hold it."""
    network = load_model(source, cls)
    largest = max(float(value.abs().max()) for value in network.state_dict().values() if value.is_floating_point())
    if largest > LARGEST:
        raise WeightsError(f"weights up to {largest:g}, float16 ends at {LARGEST:g}", where=source, fix="train again")
    return network


def _halved(network: nn.Module, folder: Path, **changed: Any) -> str:
    facts = {name: value for name, value in network.folder_config.items() if name not in DERIVED}
    return save_model(folder, network.half(), **(facts | changed))
