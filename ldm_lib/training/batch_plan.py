"""Draw training samples: the order of cases, the encoding, t, noise and augmentation of latents.

A sample is a function of (seed, optimiser step, index in the step's global batch) and of nothing else: not of the
process, the rank, the worker or earlier draws. So a training resumes from any step, and N processes train what one
would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_lib.diffusion.fresh_samples import FreshSamples, draw
from ldm_lib.diffusion.latents import Latents, mirror_image
from ldm_lib.training.options import TrainerOptions, TrainingOptions

DEBUG_PAIRS = 16  # fixed (t, noise) pairs of the overfitting test; t from a tenth of the schedule to its end
EARLY = 3  # quarters of the training with crops of `early_crop`
NOISIEST = 20  # the part of the schedule that `noisiest_fraction` draws from is one in so many

SampleIndex = tuple[int, int, int]  # optimiser step, index in its global batch, case


@dataclass(frozen=True)
class BatchPlan:
    """Assign a number of training cases to optimiser steps, batches and processes."""

    count: int
    config: TrainerOptions
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        """Return the samples of one optimiser step, over all processes and accumulated batches."""
        return self.config.batch_size * self.config.accumulate_grad_batches * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimiser steps of an epoch; its last batch is completed with cases from its start."""
        repeats = DEBUG_PAIRS if self.config.overfit_batches else 1
        return ceil(self.count * repeats / self.global_batch)

    @property
    def steps(self) -> int:
        """Return the optimiser steps of the whole training."""
        return self.steps_per_epoch * self.config.max_epochs

    @property
    def early_steps(self) -> int:
        """Return the optimiser steps with crops of `early_crop`."""
        return self.steps * EARLY // 4

    def sample_indices(self, step: int) -> list[SampleIndex]:
        """Return the global batch of a step; an epoch's order is a permutation by (seed, epoch)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        overfit = self.config.overfit_batches
        order = range(self.count) if overfit else _permutation(self.config.seed, epoch, self.count)
        first = k * self.global_batch
        return [(step, i, int(order[(first + i) % self.count])) for i in range(self.global_batch)]

    def batches(self, step: int) -> list[list[SampleIndex]]:
        """Return this process's part of a step: one list for each batch that it accumulates."""
        indices, size = self.sample_indices(step), self.config.batch_size
        starts = range(self.rank * size, self.global_batch, self.world * size)
        return [indices[start : start + size] for start in starts]

    def batches_from(self, step: int) -> Iterator[list[SampleIndex]]:
        """Yield the batches of this process from a step to the end, in order."""
        for later in range(step, self.steps):
            yield from self.batches(later)


def first_noisiest(steps: int) -> int:
    """Return the first timestep of the noisiest twentieth of a schedule."""
    return steps - 1 - (steps - 1) // NOISIEST


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class TrainingSamples(Dataset):
    """Hold cached latents, and add the random parts of a training sample for each index of the plan.

    Args:
        variants: the encodings of each case; one is read when a sample is drawn from it.
        steps: of the noise schedule.
        early_steps: optimiser steps that take crops of `early_crop`: smaller ones are faster, larger ones end it.
        mirror: signs (c,) with which flipped latents are those of the mirror image (`LinearCodec.mirror`).
    """

    def __init__(
        self,
        variants: Sequence[Sequence[Latents]],
        config: TrainingOptions,
        steps: int,
        *,
        global_batch: int,
        early_steps: int = 0,
        mirror: Tensor | None = None,
    ) -> None:
        self.variants, self.config, self.steps, self.global_batch = list(variants), config, steps, global_batch
        self.early_steps = early_steps if config.early_crop else 0
        self.signs = torch.ones(1) if mirror is None else mirror.cpu()

    @property
    def workers(self) -> int:
        """Return the number of loader processes; none where samples are drawn on a GPU."""
        first = self.variants[0]
        on_gpu = isinstance(first, FreshSamples) and first.scan.image.is_cuda
        return 0 if on_gpu else self.config.num_workers

    def __getitem__(self, sample_index: SampleIndex) -> Latents:
        return self.__getitems__([sample_index])[0]

    def __getitems__(self, batch: Sequence[SampleIndex]) -> list[Latents]:
        """Return the samples of a batch; fresh ones are drawn together."""
        rngs = [np.random.default_rng([self.config.seed, step, index]) for step, index, _ in batch]
        sources = [self.variants[case] for *_, case in batch]
        numbers = [int(rng.integers(len(source))) for rng, source in zip(rngs, sources, strict=True)]
        if isinstance(sources[0], FreshSamples):
            latents = draw(sources, numbers)
        else:
            latents = [dict(source[number]) for source, number in zip(sources, numbers, strict=True)]
        return [self._complete(*parts) for parts in zip(latents, batch, rngs, strict=True)]

    def _complete(self, sample: Latents, sample_index: SampleIndex, rng: np.random.Generator) -> Latents:
        step, index, case = sample_index
        if not self.config.overfit_batches:
            sample = self._augment(
                sample, rng, self.config.early_crop if step < self.early_steps else self.config.latent_crop
            )
        draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
        t = torch.randint(0, self.steps, (), generator=draw)
        if self.config.noisiest_fraction and rng.random() < self.config.noisiest_fraction:
            t = self.steps - 1 - t // NOISIEST
        if self.config.overfit_batches:
            pair = (step * self.global_batch + index) // len(self.variants) % DEBUG_PAIRS
            t = torch.linspace(self.steps // 10, self.steps - 1, DEBUG_PAIRS).round().long()[pair]
            draw = torch.Generator().manual_seed(pair * len(self.variants) + case)
        noise = torch.randn(sample["target"].shape, generator=draw)
        if self.config.outside_weight:
            sample["outside"] = 1 - sample["mask"]
        if self.config.conditioning_dropout:
            conditioned = self.config.overfit_batches or rng.random() >= self.config.conditioning_dropout
            sample["conditioned"] = torch.tensor(float(bool(conditioned)))
        return sample | {"t": t, "noise": noise}

    def _augment(self, sample: Latents, rng: np.random.Generator, edge: int) -> Latents:
        if rng.random() < self.config.latent_flip_probability:
            sample = mirror_image(sample, self.signs)
        if edge:
            sample = crop_around_mask(sample, edge, rng)
        return sample


def crop_around_mask(sample: Latents, edge: int, rng: np.random.Generator) -> Latents:
    """Crop every tensor (c x y z) to at most `edge` latent voxels per axis, around a random one of the mask."""
    masked = sample["mask"][0].nonzero().numpy()
    centre = masked[rng.integers(len(masked))] + rng.integers(-(edge // 4), edge // 4 + 1, 3)
    shape = np.array(sample["mask"].shape[1:])
    corner = np.clip(centre - edge // 2, 0, np.maximum(shape - edge, 0))
    box = (slice(None), *(slice(int(c), int(c) + edge) for c in corner))
    return {name: tensor[box] for name, tensor in sample.items()}
