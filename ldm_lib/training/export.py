"""Export a trained model to the form in which it comes with the library: float16, with the log of its training.

<folder>/model.safetensors, config.json     the denoiser in float16
<folder>/autoencoder/                       the autoencoder in float16
<folder>/training.csv                       the metrics of its training
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
from ldm_lib.model_io import load_model, require_pair, save_model, without_derived

LOG = "training.csv"
LARGEST = torch.finfo(torch.float16).max


def export_model(model: str | Path, folder: Path = PRETRAINED, *, temperature: float = 0.0) -> list[Path]:
    """Write a model folder again in float16, which keeps 11 binary digits; return the files.

    Args:
        model: model folder of a stage 04, with `metrics.csv` next to it.
        temperature: default scale of the initial noise; 0 keeps the model's own.

    Raises:
        WeightsError: no model folder, one of another autoencoder, no log of its training, or a weight beyond float16;
            nothing is written.
    """
    model, own = expand_path(model), {"temperature": temperature} if temperature else {}
    SamplerOptions.parse(own)
    autoencoder, denoiser = _load(model / AUTOENCODER_FOLDER, Autoencoder), _load(model, ADM)
    require_pair(denoiser, autoencoder, where=model)
    log = model.with_name("metrics.csv")
    if not log.is_file():
        raise WeightsError("no log of its training", where=log, fix="name the model folder of a stage 04")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=folder.parent) as made:  # the old files stay until all are made
        digest = _save_half(autoencoder, Path(made) / AUTOENCODER_FOLDER)
        _save_half(denoiser, Path(made), autoencoder_sha256=digest, **own)
        shutil.copyfile(log, Path(made) / LOG)
        (folder / AUTOENCODER_FOLDER).mkdir(exist_ok=True)
        files = sorted(path for path in Path(made).rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # for all who may read the library
        return [path.replace(folder / path.relative_to(made)) for path in files]


def _load(source: Path, cls: type[nn.Module]) -> nn.Module:
    """Load the network of a folder, and require that float16 can hold it."""
    network = load_model(source, cls)
    largest = max(float(value.abs().max()) for value in network.state_dict().values() if value.is_floating_point())
    if largest > LARGEST:
        raise WeightsError(f"weights up to {largest:g}, float16 ends at {LARGEST:g}", where=source, fix="train again")
    return network


def _save_half(network: nn.Module, folder: Path, **changed: Any) -> str:
    return save_model(folder, network.half(), **(without_derived(network.folder_config) | changed))
