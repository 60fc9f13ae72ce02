"""Compute the loss of the denoiser, and its error by noise level.

x_t = α_t z_target + σ_t ε;  loss = mean over samples of mean over the latent voxels of a sample's mask of
(ADM(composite of x_t, conditioning, mask, t) - prediction target)^2      (Ho et al. 2020, eq. 14)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm_lib.diffusion.latents import Latents, collate, denoiser_input, keep_known, on_device
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.parameterisation import prediction_target, to_x0_and_noise
from ldm_lib.training.batch_plan import first_noisiest


def training_loss(
    network: nn.Module,
    batch: Latents,
    model: LatentDiffusion,
    outside_weight: float = 0.0,
    noisiest_weights: Tensor | None = None,
) -> Tensor:
    """Return the masked error of what the network predicts, and a weighted one of the known latent voxels.

    Known latent voxels are clean in x_t, so that they were made of (z_voided, no noise): that pair gives their
    prediction target.

    Args:
        noisiest_weights: (c,) weights of the channels in samples of the noisiest twentieth, see `channel_weights`.
    """
    kind, schedule, t = model.prediction, model.schedule, batch["t"]
    _, prediction = _predict(network, batch, model)
    target = prediction_target(kind, schedule, batch["target"], batch["noise"], t)
    weights = None
    if noisiest_weights is not None:
        noisiest = (t >= first_noisiest(schedule.steps))[:, None]
        weights = torch.where(noisiest, noisiest_weights, 1.0)[..., None, None, None]
    loss = masked_loss(prediction, target, batch["loss"], weights)
    if outside_weight:
        known = prediction_target(kind, schedule, batch["voided"], torch.zeros_like(batch["noise"]), t)
        loss = loss + outside_weight * masked_loss(prediction, known, batch["outside"])
    return loss


def channel_weights(model: LatentDiffusion) -> Tensor:
    """Return the weight of each latent channel in the image's squared error, (c,) of mean 1.

    The estimate is one evaluation at the noisiest step, and is judged as an image; the latent channels, which are
    generated at unit standard deviation, contribute to it by the square of theirs.
    """
    std = torch.tensor(model.spec.residual_std or 1.0, device=model.device)
    weights = model.autoencoder.image_weights() * std.square()
    return weights / weights.mean()


def noise_loss(network: nn.Module, batch: Latents, model: LatentDiffusion) -> Tensor:
    """Return the masked error of the noise, whatever the network predicts."""
    noisy, prediction = _predict(network, batch, model)
    _, noise = to_x0_and_noise(model.prediction, model.schedule, prediction, noisy, batch["t"])
    return masked_loss(noise, batch["noise"], batch["loss"])


def _predict(network: nn.Module, batch: Latents, model: LatentDiffusion) -> tuple[Tensor, Tensor]:
    noisy = model.schedule.add_noise(batch["target"], batch["noise"], batch["t"])
    shown = denoiser_input(noisy, batch, model.spec)
    return noisy, network(shown, batch["t"], batch.get("conditioned")).float()


def loss_by_noise_level(
    networks: Mapping[str, nn.Module], latents: Sequence[Latents], model: LatentDiffusion, *,
    seed: int, levels: int = 10, ends: bool = True,
) -> list[dict[str, float]]:  # fmt: skip
    """Return the noise loss of each network at evenly spaced t, with the same noise: rows of {"t", name: loss, ...}.

    The last t is left out where it holds no signal: there x_t is the noise itself.

    Args:
        ends: whether the first and the last t are among the levels, or just outside.
    """
    last = model.schedule.steps - 1 - bool(model.schedule.alpha[-1] == 0)
    times = torch.linspace(0, last, levels) if ends else torch.linspace(0, last, levels + 2)[1:-1]
    noise = [_seeded_noise(x["target"], seed) for x in latents]
    rows = []
    for t in times.round().long():
        batch = collate([x | {"t": t, "noise": n} for x, n in zip(latents, noise, strict=True)])
        batch = on_device(batch, model.device)
        with torch.inference_mode():
            losses = {name: float(noise_loss(net, batch, model)) for name, net in networks.items()}
        rows.append({"t": int(t), **losses})
    return rows


def noisy_composite(batch: Latents, model: LatentDiffusion, *, t: int, seed: int) -> Tensor:
    """Return the first input channels of the denoiser (b c x y z): known latent voxels clean, others at level t."""
    noise = _seeded_noise(batch["target"], seed)
    times = torch.full((len(noise),), t)
    return keep_known(model.schedule.add_noise(batch["target"], noise, times), batch)


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over samples of the mean squared error over a sample's mask (b 1 x y z).

    A sample with an empty mask adds nothing. Squares are multiplied by the weights, (b c 1 1 1), if there are any.
    """
    squares = (prediction.float() - target.float()).square()
    squares = squares if weights is None else squares * weights
    error = (squares * mask).sum(dim=(1, 2, 3, 4))
    count = mask.sum(dim=(1, 2, 3, 4)) * prediction.shape[1]
    return (error / count.clamp(min=1)).mean()


def _seeded_noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
