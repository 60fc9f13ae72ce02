"""The denoiser that a training's parameters describe, and the error of its answers at some noise level.

x_t = α_t z_target + σ_t ε;  loss = mean over samples of mean over a sample's generated cells of
weight(t) (ADM(composite of x_t, conditioning, mask, t) - what was asked for)^2      (Ho et al. 2020, eq. 14)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm_lib.diffusion.latents import Latents, collate, denoiser_input, keep_known, on_device
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.parameterisation import min_snr_weight, prediction_target, to_x0_and_noise
from ldm_lib.training.options import TrainingOptions


def training_loss(network: nn.Module, batch: Latents, model: LatentDiffusion, config: TrainingOptions) -> Tensor:
    """The error of what the network answers, weighted by noise level and, if asked, told of the known cells too.

    Known cells are clean in x_t, so that the pair they were made of is (z_voided, no noise); that is what is asked for
    there, whatever is predicted.
    """
    schedule, how, t = model.schedule, model.prediction, batch["t"]
    _, answer = _answer(network, batch, model)
    weight = min_snr_weight(how, schedule, t, config.min_snr_gamma) if config.min_snr_gamma else None
    loss = masked_loss(
        answer, prediction_target(how, schedule, batch["target"], batch["noise"], t), batch["loss"], weight
    )
    if config.outside_weight:
        known = prediction_target(how, schedule, batch["voided"], torch.zeros_like(batch["noise"]), t)
        loss = loss + config.outside_weight * masked_loss(answer, known, batch["outside"], weight)
    return loss


def noise_loss(network: nn.Module, batch: Latents, model: LatentDiffusion) -> Tensor:
    """The error of the noise in the generated cells, whatever the network predicts."""
    noisy, answer = _answer(network, batch, model)
    _, noise = to_x0_and_noise(model.prediction, model.schedule, answer, noisy, batch["t"])
    return masked_loss(noise, batch["noise"], batch["loss"])


def _answer(network: nn.Module, batch: Latents, model: LatentDiffusion) -> tuple[Tensor, Tensor]:
    noisy = model.schedule.add_noise(batch["target"], batch["noise"], batch["t"])
    shown = denoiser_input(noisy, batch, model.spec)
    return noisy, network(shown, batch["t"], batch.get("conditioned")).float()


def loss_by_noise_level(
    networks: Mapping[str, nn.Module],
    latents: Sequence[Latents],
    model: LatentDiffusion,
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
    last = model.schedule.steps - 1 - bool(model.schedule.alpha[-1] == 0)
    times = torch.linspace(0, last, levels) if ends else torch.linspace(0, last, levels + 2)[1:-1]
    noise = [torch.randn(x["target"].shape, generator=torch.Generator().manual_seed(seed)) for x in latents]
    rows = []
    for t in times.round().long():
        batch = collate([x | {"t": t, "noise": n} for x, n in zip(latents, noise, strict=True)])
        batch = on_device(batch, model.device)
        with torch.inference_mode():
            losses = {name: float(noise_loss(net, batch, model)) for name, net in networks.items()}
        rows.append({"t": int(t), **losses})
    return rows


def noisy_composite(batch: Latents, model: LatentDiffusion, *, t: int, seed: int) -> Tensor:
    """Known cells clean, the others at noise level t: the first channels of what the denoiser sees (b c x y z)."""
    noise = torch.randn(batch["target"].shape, generator=torch.Generator().manual_seed(seed))
    times = torch.full((len(noise),), t)
    return keep_known(model.schedule.add_noise(batch["target"], noise, times), batch)


def masked_loss(answer: Tensor, wanted: Tensor, cells: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over samples of the mean squared error over a sample's cells.

    Args:
        answer, wanted: (b c x y z).
        cells: (b 1 x y z), 1 where the loss counts; a sample without such cells adds nothing.
        weight: (b,) of the samples' errors; none counts all alike.
    """
    error = ((answer.float() - wanted.float()).square() * cells).sum(dim=(1, 2, 3, 4))
    count = cells.sum(dim=(1, 2, 3, 4)) * answer.shape[1]
    each = error / count.clamp(min=1)
    return (each if weight is None else each * weight.to(each)).mean()
