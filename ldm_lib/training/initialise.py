"""Build the denoiser, at random or from a trained model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.devices import pick_device, pick_precision
from ldm_lib.diffusion.latents import LatentSpec, conditioning_channels, input_channels
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError
from ldm_lib.model_io import load_model
from ldm_lib.options import integers
from ldm_lib.training.options import TrainingOptions


def build_denoiser(config: TrainingOptions, *, in_channels: int, out_channels: int) -> ADM:
    """The ADM that a training's parameters describe, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ADM(
            in_channels=in_channels,
            out_channels=out_channels,
            base_width=config.base_width,
            multipliers=integers(config.multipliers),
            blocks_per_level=config.blocks_per_level,
            attention_rates=integers(config.attention_rates),
            dropout=config.dropout,
            conditioning=conditioning_channels(out_channels) if config.conditioning_dropout else (),
        )


def new_model(autoencoder_folder: Path, config: TrainingOptions, spec: LatentSpec) -> LatentDiffusion:
    """The frozen autoencoder of a folder beside a denoiser that is untrained, or is that of the model to start from.

    A model brings its own scale of what drafts lack.

    Raises:
        ConfigError: a model to start from that is not as the parameters say, with all that differs.
    """
    device = pick_device(config.device)
    autoencoder = load_model(autoencoder_folder, Autoencoder)
    channels = autoencoder.latent_channels
    denoiser = build_denoiser(config, in_channels=input_channels(channels, spec), out_channels=channels)
    crop = 0 if config.overfit_batches else config.latent_crop
    how = (
        device,
        pick_precision(config.precision, device),
        config.prediction,
        autoencoder.folder_config.get("box_margin"),
        crop,
    )
    fresh = LatentDiffusion(autoencoder.to(device), denoiser.to(device), noise_schedule(**config.process), spec, *how,
                            process=config.process)  # fmt: skip
    return (
        _taken_over(fresh, LatentDiffusion.load(config.start, device=config.device), config) if config.start else fresh
    )


def _taken_over(fresh: LatentDiffusion, model: LatentDiffusion, config: TrainingOptions) -> LatentDiffusion:
    """The weights of a model in the place of untrained ones, if all else is the same."""
    wanted = fresh.spec.model_copy(update={"residual_std": model.spec.residual_std})
    pairs = {
        "autoencoder": _digests(model.autoencoder, fresh.autoencoder),
        "prediction": (model.prediction, fresh.prediction),
        **_both(model.denoiser.config, fresh.denoiser.config),
        **_both(model.spec.model_dump(), wanted.model_dump()),
        **_both(model.denoiser.folder_config["schedule"], config.process),
    }
    if told := [f"{name} is {was!r}, not {now!r}" for name, (was, now) in pairs.items() if was != now]:
        raise ConfigError("; ".join(told), where="the model to start from", fix="set them alike, or start from noise")
    fresh.denoiser.load_state_dict(model.denoiser.state_dict())
    return replace(fresh, spec=wanted, temperature=model.temperature)


def _digests(theirs: nn.Module, ours: nn.Module) -> tuple[str, str]:
    """Of two autoencoders; alike for equal numbers, which differ as files where one was written in half precision."""
    pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=False)
    same = theirs.config == ours.config and all(torch.equal(a, b) for a, b in pairs)
    digests = [each.folder_config["sha256"][:12] for each in (theirs, theirs if same else ours)]
    return digests[0], digests[1]


def _both(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (theirs.get(name), value) for name, value in ours.items() if name != "dropout"}
