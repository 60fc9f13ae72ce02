"""Train the autoencoder on crops, learn its latents' statistics, and measure what it can return.

    crop (1 x y z) => posterior sample => reconstruction,   loss = L1 + kl_weight * KL

Half of the inputs are voided images, because at inference it encodes both; the target is then the voided image.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ldm_lib.autoencoder import Autoencoder, kl_divergence
from ldm_lib.cases import Case, CaseData, load_case
from ldm_lib.conditioning import ModelCase, model_case
from ldm_lib.config import AutoencoderConfig
from ldm_lib.devices import autocast
from ldm_lib.errors import TrainingError
from ldm_lib.geometry import cell_share
from ldm_lib.metrics import brats_scores

log = logging.getLogger("ldm_lib")

CASES_IN_MEMORY = 64
CASES_FOR_STATISTICS = 24
AIR_CROPS = 0.1  # share of crops placed anywhere; the others are centred on a brain voxel


class CropLoader:
    """Random crops of training cases; crop i of step s depends on (seed, s, i) alone."""

    def __init__(self, cases: Sequence[Case], config: AutoencoderConfig, factor: int) -> None:
        self.cases, self.config, self.factor = list(cases), config, factor
        self._load = lru_cache(CASES_IN_MEMORY)(lambda index: model_case(load_case(self.cases[index]), factor))

    def batch(self, step: int) -> Tensor:
        """(b 1 x y z) float32, normalised."""
        return torch.stack([self._crop(step, i) for i in range(self.config.autoencoder_batch_size)])

    def _crop(self, step: int, i: int) -> Tensor:
        rng = np.random.default_rng([self.config.seed, step, i])
        case = self._load(int(rng.integers(len(self.cases))))
        image = case.voided if case.target is None or rng.random() < self.config.voided_fraction else case.target
        size = [min(self.config.crop - self.config.crop % self.factor, n) for n in image.shape]
        centre = self._centre(image, rng)
        corner = [int(np.clip(c - s // 2, 0, n - s)) for c, s, n in zip(centre, size, image.shape, strict=True)]
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        return torch.from_numpy(image[box].copy())[None]

    @staticmethod
    def _centre(image: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
        anywhere = rng.integers(0, image.shape)
        if rng.random() < AIR_CROPS:
            return tuple(anywhere)
        for _ in range(100):
            if image[tuple(anywhere)] > 0:
                break
            anywhere = rng.integers(0, image.shape)
        return tuple(anywhere)


def train_autoencoder(
    autoencoder: Autoencoder,
    cases: Sequence[Case],
    config: AutoencoderConfig,
    *,
    device: torch.device,
    precision: str,
    on_step: Callable[[dict[str, float]], None],
) -> None:
    """Train in place with AdamW and one learning-rate cycle, then set the latents' shift and scale.

    Args:
        on_step: receives {"step", "l1", "kl", "learning_rate"}.

    Raises:
        TrainingError: a loss that is not finite.
    """
    loader = CropLoader(cases, config, autoencoder.factor)
    if autoencoder.linear is not None:
        autoencoder.linear.fit(*block_statistics(_one_hole_each(cases), autoencoder.factor))
    noise = torch.Generator(device.type).manual_seed(config.seed)
    autoencoder.to(device, memory_format=torch.channels_last_3d).train()
    peak, steps = config.autoencoder_learning_rate, config.autoencoder_steps
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=min(0.1, 100 / steps))
    for step in range(steps):
        volume = loader.batch(step).to(device, memory_format=torch.channels_last_3d)
        with autocast(device, precision):
            mean, std = autoencoder.moments(volume)
            sampled = mean + std * torch.randn(mean.shape, generator=noise, device=device)
            rebuilt = autoencoder.rebuild(sampled)
        l1, kl = F.l1_loss(rebuilt.float(), volume), kl_divergence(mean.float(), std.float())
        loss = l1 + config.kl_weight * kl
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"loss is {loss.item()} at step {step}", where="autoencoder", fix="lower its learning rate"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        on_step({"step": step, "l1": l1.item(), "kl": kl.item(), "learning_rate": schedule.get_last_lr()[0]})
    autoencoder.freeze()
    mean, std = latent_statistics(autoencoder, _one_hole_each(cases), device=device, precision=precision)
    autoencoder.standardise(mean, std)


def block_statistics(cases: Sequence[Case], factor: int) -> tuple[Tensor, Tensor]:
    """Mean (f^3,) and covariance (f^3, f^3) of the blocks of a few training images that hold any brain, float64."""
    rows = []
    for case in cases[:CASES_FOR_STATISTICS]:
        data = model_case(load_case(case), factor)
        image = data.voided if data.target is None else data.target
        blocks = rearrange(image, "(x a) (y b) (z c) -> (x y z) (a b c)", a=factor, b=factor, c=factor)
        rows.append(blocks[(blocks > 0).any(axis=1)])
    blocks = torch.from_numpy(np.concatenate(rows)).double()
    return blocks.mean(0), torch.cov(blocks.T)


def latent_statistics(
    autoencoder: Autoencoder, cases: Iterable[Case], *, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c,) of the unstandardised latents over brain cells, not air.

    Raises:
        TrainingError: no case has such a cell.
    """
    total, count = 0, 0
    for case in cases:
        data = model_case(load_case(case), autoencoder.factor)
        image = data.voided if data.target is None else data.target
        with torch.inference_mode(), autocast(device, precision):
            mean, _ = autoencoder.moments(torch.from_numpy(image)[None, None].to(device))
        brain = torch.from_numpy(cell_share(image > 0, autoencoder.factor) > 0.5).to(device)
        inside = mean[0].double()[:, brain]
        total = total + torch.stack([inside.sum(1), inside.square().sum(1)])
        count += inside.shape[1]
    if not count:
        raise TrainingError("no cell lies mostly in the brain", where="autoencoder", fix="use fewer halvings")
    mean, square = total / count
    return mean.float().cpu(), (square - mean.square()).clamp(min=0).sqrt().float().cpu()


def reconstruct(autoencoder: Autoencoder, image: np.ndarray, *, device: torch.device, precision: str) -> np.ndarray:
    """decode(encode(image)): (x, y, z) normalised, on the model's grid, both ways through the posterior mean."""
    volume = torch.from_numpy(image)[None, None].to(device)
    with torch.inference_mode(), autocast(device, precision):
        return autoencoder.decode(autoencoder.encode(volume))[0, 0].cpu().numpy()


def _one_hole_each(cases: Sequence[Case]) -> list[Case]:
    return list({case.patient: case for case in cases}.values())


def ceiling(
    data: CaseData, case: ModelCase, autoencoder: Autoencoder, *, device: torch.device, precision: str
) -> tuple[np.ndarray, dict[str, float]]:
    """The truth through the autoencoder, pasted into the hole, and its scores: no model can do better on average.

    Returns:
        the filled volume (x, y, z) in the file's order and units, and the challenge's scores on the healthy mask.
    """
    rebuilt = reconstruct(autoencoder, case.target, device=device, precision=precision)
    filled = data.paste(rebuilt, autoencoder.factor)
    return filled, brats_scores(filled, data.target, data.voided, data.scored, where=data.case.key)
