"""Build the denoiser, with random weights or with those of a trained model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.devices import pick_device, pick_precision, require_trainable
from ldm_lib.diffusion.latents import LatentSpec, conditioning_channels, input_channels
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.options import DenoiserOptions
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError
from ldm_lib.model_io import load_model
from ldm_lib.options import integers
from ldm_lib.training.options import TrainingOptions


def build_denoiser(config: TrainingOptions, *, in_channels: int, out_channels: int) -> ADM:
    """Build the ADM of a training's options; its weights are a function of the seed."""
    shown = conditioning_channels(out_channels) if config.conditioning_dropout else ()
    lists = {name: integers(getattr(config, name)) for name in ("multipliers", "attention_rates")}
    network = {name: getattr(config, name) for name in DenoiserOptions.model_fields} | lists
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ADM(in_channels=in_channels, out_channels=out_channels, conditioning=shown, **network)


def new_model(
    autoencoder: Autoencoder | str | Path,
    config: TrainingOptions,
    spec: LatentSpec,
    *,
    start: LatentDiffusion | None = None,
) -> LatentDiffusion:
    """Combine a frozen autoencoder with a denoiser that is untrained, or that of the model to start from.

    Args:
        autoencoder: as `load_model` returns it, or its folder.
        spec: how cases become latents; a model to start from keeps its own scale of residuals.
        start: the model to start from; without it that of the options, if they name one.

    Raises:
        ConfigError: the model to start from differs from the options, with all that differs, or a precision that this
            processor cannot train in.
    """
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    require_trainable(precision, device)
    if not isinstance(autoencoder, Autoencoder):
        autoencoder = load_model(autoencoder, Autoencoder)
    channels = autoencoder.latent_channels
    denoiser = build_denoiser(config, in_channels=input_channels(channels, spec), out_channels=channels)
    fresh = LatentDiffusion(
        autoencoder.to(device), denoiser.to(device), noise_schedule(**config.process), spec, device,
        precision, config.prediction, autoencoder.folder_config.get("box_margin"),
        crop=0 if config.overfit_batches else config.latent_crop, process=config.process,
    )  # fmt: skip
    if config.start and start is None:
        start = LatentDiffusion.load(config.start, device=config.device)
    return _with_weights(fresh, start, config) if start else fresh


def _with_weights(fresh: LatentDiffusion, start: LatentDiffusion, config: TrainingOptions) -> LatentDiffusion:
    """Replace untrained weights by those of a model, if all else is equal."""
    spec = fresh.spec.model_copy(update={"residual_std": start.spec.residual_std})
    pairs = {
        "autoencoder": _digests(start.autoencoder, fresh.autoencoder),
        "prediction": (start.prediction, fresh.prediction),
        **_pairs(start.denoiser.config, fresh.denoiser.config),
        **_pairs(start.spec.model_dump(), spec.model_dump()),
        **_pairs(start.process, config.process),
    }
    if found := [f"{name} is {was!r}, not {now!r}" for name, (was, now) in pairs.items() if was != now]:
        raise ConfigError("; ".join(found), where="the model to start from",
                          fix="set the options to these values, or start from random weights")  # fmt: skip
    fresh.denoiser.load_state_dict(start.denoiser.state_dict())
    return replace(fresh, spec=spec, temperature=start.temperature)


def _digests(theirs: nn.Module, ours: nn.Module) -> tuple[str, str]:
    """Return the digests of two autoencoders, equal for equal weights (files differ if one is in half precision)."""
    pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=False)
    same = theirs.config == ours.config and all(torch.equal(a, b) for a, b in pairs)
    digests = [each.folder_config["sha256"][:12] for each in (theirs, theirs if same else ours)]
    return digests[0], digests[1]


def _pairs(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (theirs.get(name), value) for name, value in ours.items() if name != "dropout"}
