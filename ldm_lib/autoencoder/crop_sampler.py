"""Sample random crops of training cases for the autoencoder's training."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldm_lib.autoencoder.options import AutoencoderTrainingOptions
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.model_grid import grid_case

CASES_IN_MEMORY = 64  # at 1 mm 37 MB each
FINAL_CROPS_FROM = 0.9  # fraction of the steps from which on crops have their final size
VOIDED_FRACTION = 0.5  # of crops from the voided image: at inference both are encoded
AIR_FRACTION = 0.1  # of crops at random places, mostly air


class CropLoader:
    """Sample random crops of training cases; the crops of a step depend on (seed, step) alone."""

    def __init__(self, cases: Sequence[Case], config: AutoencoderTrainingOptions, factor: int) -> None:
        self.cases, self.config, self.factor = list(cases), config, factor
        self._load = lru_cache(CASES_IN_MEMORY)(self._images)

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """Return normalised crops (b 1 x y z) float32 and their cases' keys; large crops come in smaller batches."""
        edge, count = self.config.crop, self.config.autoencoder_batch_size
        if step >= FINAL_CROPS_FROM * self.config.autoencoder_steps:
            edge = self.config.final_crop
            count = max(1, round(count * (self.config.crop / edge) ** 3))
        crops, names = zip(*(self._crop(step, i, edge - edge % self.factor) for i in range(count)), strict=True)
        return torch.stack(crops), list(names)

    def _crop(self, step: int, i: int, edge: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng([self.config.seed, step, i])
        index = int(rng.integers(len(self.cases)))
        images = self._load(index)
        image = images[0 if len(images) == 1 or rng.random() < VOIDED_FRACTION else 1]
        size = [min(edge, n) for n in image.shape]  # a volume smaller than the crop gets air behind it
        centre, in_air = rng.integers(0, image.shape), rng.random() < AIR_FRACTION
        for _ in range(0 if in_air else 100):  # tries to find a voxel of the brain
            if image[tuple(centre)] > 0:
                break
            centre = rng.integers(0, image.shape)
        corner = [int(np.clip(c - s // 2, 0, n - s)) for c, s, n in zip(centre, size, image.shape, strict=True)]
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        gain, gamma = 1 + rng.uniform(-1, 1, 2) * self.config.intensity_shift
        crop = np.pad(gain * image[box].astype(np.float32) ** gamma, [(0, edge - s) for s in size])
        return torch.from_numpy(crop.astype(np.float32))[None], self.cases[index].key

    def _images(self, index: int) -> list[np.ndarray]:
        """Load the voided and, if there is one, the full image (x, y, z), in half precision to save memory."""
        case = grid_case(load_case(self.cases[index]), self.factor)
        return [image.astype(np.float16) for image in (case.voided, case.target) if image is not None]
