"""What a training sample is made of (order, variant, t, noise and latent augmentation), and the loss of a batch.

The sample is a function of (seed, epoch, position in the epoch) and of nothing else: not of the process, the worker or
what was drawn before.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ldm_lib.config import TrainingConfig
from ldm_lib.latents import Latents

DEBUG_PAIRS = 16  # fixed (t, noise) pairs of the overfitting test; t from a tenth of the schedule to its end
LEFT_RIGHT = 1  # axis of a latent (c x y z) in LPS


class TrainingSamples(Dataset):
    """Cached latents and, for each position of an epoch, the random part of a training sample.

    Args:
        variants: per case, its encodings; one is asked for when a sample is made of it.
    """

    def __init__(self, variants: Sequence[Sequence[Latents]], config: TrainingConfig, steps: int) -> None:
        self.variants, self.config, self.steps = list(variants), config, steps

    def __getitem__(self, where: tuple[int, int, int]) -> Latents:
        epoch, position, index = where
        rng = np.random.default_rng([self.config.seed, epoch, position])
        sample = dict(self.variants[index][int(rng.integers(len(self.variants[index])))])
        if not self.config.overfit_batches:
            sample = self._changed(sample, rng)
        draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
        t = torch.randint(0, self.steps, (), generator=draw)
        if self.config.overfit_batches:
            pair = position // len(self.variants) % DEBUG_PAIRS
            t = torch.linspace(self.steps // 10, self.steps - 1, DEBUG_PAIRS).round().long()[pair]
            draw = torch.Generator().manual_seed(pair * len(self.variants) + index)
        noise = torch.randn(sample["target"].shape, generator=draw)
        if self.config.latent_noise:
            jitter = torch.randn(sample["voided"].shape, generator=draw)
            sample["voided"] = sample["voided"] + self.config.latent_noise * jitter
        if self.config.conditioning_dropout:
            told = self.config.overfit_batches or rng.random() >= self.config.conditioning_dropout
            sample["told"] = torch.tensor(float(bool(told)))
        return sample | {"t": t, "noise": noise}

    def _changed(self, sample: Latents, rng: np.random.Generator) -> Latents:
        if rng.random() < self.config.latent_flip_probability:
            sample = {name: tensor.flip(LEFT_RIGHT) for name, tensor in sample.items()}
        if self.config.latent_crop:
            sample = crop_around_hole(sample, self.config.latent_crop, rng)
        return sample


def crop_around_hole(sample: Latents, edge: int, rng: np.random.Generator) -> Latents:
    """Cut every tensor (c x y z) to at most `edge` cells an axis, somewhere around a random cell of the hole."""
    hole = sample["hole"][0].nonzero().numpy()
    centre = hole[rng.integers(len(hole))] + rng.integers(-(edge // 4), edge // 4 + 1, 3)
    shape = np.array(sample["hole"].shape[1:])
    corner = np.clip(centre - edge // 2, 0, np.maximum(shape - edge, 0))
    box = (slice(None), *(slice(int(c), int(c) + edge) for c in corner))
    return {name: tensor[box] for name, tensor in sample.items()}


class EpochOrder(Sampler):
    """(epoch, position, index) of an epoch: a permutation by (seed, epoch), wrapped so that every batch is full."""

    def __init__(self, count: int, config: TrainingConfig) -> None:
        self.count, self.config, self.epoch = count, config, 0
        batch = config.batch_size * config.accumulate_grad_batches
        self.length = math.ceil(count / batch) * batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count * DEBUG_PAIRS if self.config.overfit_batches else self.length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = np.random.default_rng([self.config.seed, self.epoch]).permutation(self.count)
        if self.config.overfit_batches:
            order = np.arange(self.count)
        for position in range(len(self)):
            yield self.epoch, position, int(order[position % self.count])


def masked_loss(predicted: Tensor, noise: Tensor, cells: Tensor) -> Tensor:
    """Mean over samples of the mean squared error over a sample's cells.

    Args:
        predicted, noise: (b c x y z).
        cells: (b 1 x y z), 1 where the loss counts; a sample without such cells adds nothing.
    """
    error = ((predicted.float() - noise.float()).square() * cells).sum(dim=(1, 2, 3, 4))
    count = cells.sum(dim=(1, 2, 3, 4)) * predicted.shape[1]
    return (error / count.clamp(min=1)).mean()
