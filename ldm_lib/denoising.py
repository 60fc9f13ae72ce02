"""The denoiser that a training's parameters describe, and the error of its answers at some noise level.

x_t = α_t z_target + σ_t ε;  loss = mean over samples of mean over a sample's generated cells of
weight(t) (ADM(composite of x_t, conditioning, mask, t) - what was asked for)^2      (Ho et al. 2020, eq. 14)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_lib.adm import ADM
from ldm_lib.batches import masked_loss
from ldm_lib.config import TrainingConfig
from ldm_lib.devices import pick_device, pick_precision
from ldm_lib.errors import ConfigError
from ldm_lib.inpainter import Inpainter, box_margin
from ldm_lib.latents import (
    CellSettings,
    Latents,
    collate,
    conditioning_channels,
    denoiser_input,
    input_channels,
    keep_known,
    on_device,
)
from ldm_lib.objectives import meaning, min_snr_weight, wanted
from ldm_lib.schedule import noise_schedule
from ldm_lib.values import integers
from ldm_lib.weights import load_model


def build_denoiser(config: TrainingConfig, *, in_channels: int, out_channels: int) -> ADM:
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


def new_inpainter(autoencoder_folder: Path, config: TrainingConfig, settings: CellSettings) -> Inpainter:
    """The frozen autoencoder of a folder beside a denoiser that is untrained, or is that of the model to start from.

    A model brings its own scale of what drafts lack.

    Raises:
        ConfigError: a model to start from that is not as the parameters say, with all that differs.
    """
    device = pick_device(config.device)
    autoencoder = load_model(autoencoder_folder, "autoencoder")
    channels = autoencoder.latent_channels
    denoiser = build_denoiser(config, in_channels=input_channels(channels, settings), out_channels=channels)
    crop = 0 if config.overfit_batches else config.latent_crop
    how = device, pick_precision(config.precision, device), config.prediction, box_margin(autoencoder), crop
    fresh = Inpainter(autoencoder.to(device), denoiser.to(device), noise_schedule(**config.process), settings, *how)
    return _taken_over(fresh, Inpainter.load(config.start, device=config.device), config) if config.start else fresh


def _taken_over(fresh: Inpainter, model: Inpainter, config: TrainingConfig) -> Inpainter:
    """The weights of a model in the place of untrained ones, if all else is the same."""
    wanted = replace(fresh.settings, residual_std=model.settings.residual_std)
    pairs = {
        "autoencoder": _digests(model.autoencoder, fresh.autoencoder),
        "prediction": (model.prediction, fresh.prediction),
        **_both(model.denoiser.config, fresh.denoiser.config),
        **_both(asdict(model.settings), asdict(wanted)),
        **_both(model.denoiser.folder_config["schedule"], config.process),
    }
    if told := [f"{name} is {was!r}, not {now!r}" for name, (was, now) in pairs.items() if was != now]:
        raise ConfigError("; ".join(told), where="the model to start from", fix="set them alike, or start from noise")
    fresh.denoiser.load_state_dict(model.denoiser.state_dict())
    return replace(fresh, settings=wanted, temperature=model.temperature)


def _digests(theirs: nn.Module, ours: nn.Module) -> tuple[str, str]:
    """Of two autoencoders; alike for equal numbers, which differ as files where one was written in half precision."""
    pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=False)
    same = theirs.config == ours.config and all(torch.equal(a, b) for a, b in pairs)
    digests = [each.folder_config["sha256"][:12] for each in (theirs, theirs if same else ours)]
    return digests[0], digests[1]


def _both(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (theirs.get(name), value) for name, value in ours.items() if name != "dropout"}


def training_loss(network: nn.Module, batch: Latents, inpainter: Inpainter, config: TrainingConfig) -> Tensor:
    """The error of what the network answers, weighted by noise level and, if asked, told of the known cells too.

    Known cells are clean in x_t, so that the pair they were made of is (z_voided, no noise); that is what is asked for
    there, whatever is predicted.
    """
    schedule, how, t = inpainter.schedule, inpainter.prediction, batch["t"]
    _, answer = _answer(network, batch, inpainter)
    weight = min_snr_weight(how, schedule, t, config.min_snr_gamma) if config.min_snr_gamma else None
    loss = masked_loss(answer, wanted(how, schedule, batch["target"], batch["noise"], t), batch["loss"], weight)
    if config.outside_weight:
        known = wanted(how, schedule, batch["voided"], torch.zeros_like(batch["noise"]), t)
        loss = loss + config.outside_weight * masked_loss(answer, known, batch["outside"], weight)
    return loss


def noise_loss(network: nn.Module, batch: Latents, inpainter: Inpainter) -> Tensor:
    """The error of the noise in the generated cells, whatever the network predicts."""
    noisy, answer = _answer(network, batch, inpainter)
    _, noise = meaning(inpainter.prediction, inpainter.schedule, answer, noisy, batch["t"])
    return masked_loss(noise, batch["noise"], batch["loss"])


def _answer(network: nn.Module, batch: Latents, inpainter: Inpainter) -> tuple[Tensor, Tensor]:
    noisy = inpainter.schedule.add_noise(batch["target"], batch["noise"], batch["t"])
    shown = denoiser_input(noisy, batch, inpainter.settings)
    return noisy, network(shown, batch["t"], batch.get("told")).float()


def loss_by_noise_level(
    networks: Mapping[str, nn.Module],
    latents: Sequence[Latents],
    inpainter: Inpainter,
    *,
    seed: int,
    levels: int = 10,
    ends: bool = True,
) -> list[dict[str, float]]:
    """The noise loss of each network at evenly spaced t, of the same noise: rows of {"t", name: loss, ...}.

    The last t is left out where it holds no signal: the noise is x_t itself there, and the error says nothing.

    Args:
        ends: whether the first and the last t are among the levels, or beside them.
    """
    last = inpainter.schedule.steps - 1 - bool(inpainter.schedule.alpha[-1] == 0)
    times = torch.linspace(0, last, levels) if ends else torch.linspace(0, last, levels + 2)[1:-1]
    noise = [torch.randn(x["target"].shape, generator=torch.Generator().manual_seed(seed)) for x in latents]
    rows = []
    for t in times.round().long():
        batch = collate([x | {"t": t, "noise": n} for x, n in zip(latents, noise, strict=True)])
        batch = on_device(batch, inpainter.device)
        with torch.inference_mode():
            losses = {name: float(noise_loss(net, batch, inpainter)) for name, net in networks.items()}
        rows.append({"t": int(t), **losses})
    return rows


def noisy_composite(batch: Latents, inpainter: Inpainter, *, t: int, seed: int) -> Tensor:
    """Known cells clean, the others at noise level t: the first channels of what the denoiser sees (b c x y z)."""
    noise = torch.randn(batch["target"].shape, generator=torch.Generator().manual_seed(seed))
    times = torch.full((len(noise),), t)
    return keep_known(inpainter.schedule.add_noise(batch["target"], noise, times), batch)
