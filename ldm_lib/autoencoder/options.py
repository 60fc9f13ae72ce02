"""Options of the autoencoder: its architecture and its training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ldm_lib.options import IntegerList, NotNegative, Options, Positive, SeedOptions, integers

TRANSFORM_FACTORS = {"plain": 1, "haar": 4}  # voxels per axis that the input transform merges into one
LEAST_LATENT_VOXELS = 4  # of an axis of a crop; fewer have no interior


class AutoencoderOptions(Options):
    """Describe the architecture of the autoencoder."""

    heading = "Architecture"
    latent_channels: Positive = Field(6, description="numbers that each latent voxel holds")
    channels: IntegerList = Field("16,32", description="width of each level; one halving fewer than levels")
    blocks: Positive = Field(1, description="residual blocks per level")
    input_transform: Literal["plain", "haar"] = Field(
        "plain", description="fixed transform around the network: none or two-level Haar packets"
    )
    learned: Literal["both", "decoder", "none"] = Field(
        "decoder", description="parts that are neural networks; none is a linear codec"
    )
    linear_start: bool = Field(True, description="add the networks to the best linear codec")


class AutoencoderTrainingOptions(AutoencoderOptions, SeedOptions):
    """Describe the training of the autoencoder."""

    hint = "see `help(ldm.AutoencoderTrainingOptions)`"

    heading = "Training"
    autoencoder_steps: Positive = Field(100, description="optimiser steps")
    autoencoder_batch_size: Positive = Field(4, description="crops per step")
    autoencoder_learning_rate: float = Field(2e-4, gt=0, le=1, description="peak learning rate of AdamW")
    autoencoder_ema_decay: float = Field(
        0.98, ge=0, lt=1, description="decay of the exponential moving average of the weights"
    )
    crop: Positive = Field(32, description="edge of a training crop, voxels")
    final_crop: Positive = Field(48, description="edge of a crop in the last tenth of the steps, voxels")
    kl_weight: NotNegative = Field(1e-3, description="weight of the KL divergence (a mean over latent elements)")
    intensity_shift: float = Field(0.1, ge=0, le=0.5, description="largest relative change of gain and gamma")

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        factor = TRANSFORM_FACTORS[self.input_transform] * 2 ** (len(integers(self.channels)) - 1)
        if self.learned != "none" and self.crop < LEAST_LATENT_VOXELS * factor:
            cause = f"crop = {self.crop}: a latent voxel is {factor} voxels wide, an axis of a crop needs at least"
            raise ValueError(f"{cause} {LEAST_LATENT_VOXELS}")
        if self.learned != "both" and not self.linear_start:
            raise ValueError(f"learned = {self.learned!r}: needs linear_start")
        if self.final_crop < self.crop:
            raise ValueError(f"final_crop = {self.final_crop}: must be at least crop = {self.crop}")
        return self
