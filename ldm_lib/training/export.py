"""Export a model for others: float16, with the log of its training and a card, as a model folder or a MONAI bundle.

<folder>/model.safetensors, config.json     the denoiser in float16
<folder>/autoencoder/                       the autoencoder in float16
<folder>/training.csv                       the metrics of its training
<folder>/README.md                          the model card, with the front matter of Hugging Face

A bundle has the first three in models/, the card in docs/, and its configs in configs/.
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
from ldm_lib.errors import InputError, WeightsError
from ldm_lib.files import AUTOENCODER_FOLDER, expand_path
from ldm_lib.model_io import load_model, require_pair, save_model, without_derived
from ldm_lib.training.publication import CARD, LOG, model_card, write_bundle_configs

LARGEST = torch.finfo(torch.float16).max


def export_model(model: str | Path, folder: Path, *, to: str = "folder", temperature: float = 0.0) -> list[Path]:
    """Write a model folder again in float16, which keeps 11 binary digits; return the files.

    A card that is in the folder already is kept: its owner may have completed it.

    Args:
        model: model folder of a stage 04, with `metrics.csv` next to it, or one that was exported.
        folder: to write.
        to: "folder", or "monai-bundle".
        temperature: default scale of the initial noise; 0 keeps the model's own.

    Raises:
        WeightsError: no model folder, one of another autoencoder, no log of its training, or a weight beyond float16;
            nothing is written.
        InputError: a file, or a place that cannot be written, instead of a folder.
    """
    model, own = expand_path(model), {"temperature": temperature} if temperature else {}
    SamplerOptions.parse(own)
    autoencoder, denoiser = _load(model / AUTOENCODER_FOLDER, Autoencoder), _load(model, ADM)
    require_pair(denoiser, autoencoder, where=model)
    log = next((path for path in (model / LOG, model.with_name("metrics.csv")) if path.is_file()), None)
    if log is None:
        raise WeightsError(f"no log of its training, neither {LOG} in it nor metrics.csv next to it", where=model,
                           fix="name the model folder of a stage 04, or an exported one")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = f"is no folder, and none can be made there ({error.strerror})"
        raise InputError(cause, where=folder, fix="name another --output") from error
    weights, card = ("models", "docs") if to == "monai-bundle" else ("", "")
    with TemporaryDirectory(prefix=".export-", dir=folder.parent) as place:  # the old files stay until all are made
        made = Path(place)
        digest = _save_half(autoencoder, made / weights / AUTOENCODER_FOLDER)
        _save_half(denoiser, made / weights, autoencoder_sha256=digest, **own)
        shutil.copyfile(log, made / weights / LOG)
        (made / card).mkdir(exist_ok=True)
        if not (folder / card / CARD).exists():
            own_card = model / CARD
            (made / card / CARD).write_text(own_card.read_text() if own_card.is_file() else model_card(made / weights))
        if to == "monai-bundle":
            write_bundle_configs(made / "configs")
        files = sorted(path for path in made.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # for all who may read the library
            (folder / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
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
