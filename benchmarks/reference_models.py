"""Build the reference of the benchmarks: MONAI's networks with their defaults, at the size of ours.

volume (b 1 x y z) => latent (b 6 x/8 y/8 z/8); the denoiser has the blocks and attention of ours
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_lib.autoencoder._monai import AutoencoderKL, DiffusionModelUNet
from ldm_lib.diffusion.schedule import NoiseSchedule
from ldm_lib.diffusion.unet import ADM

AUTOENCODER = {"spatial_dims": 3, "num_res_blocks": (2,) * 4, "channels": (32, 64, 128, 128), "latent_channels": 6,
               "attention_levels": (False,) * 4, "norm_num_groups": 32, "with_encoder_nonlocal_attn": False,
               "with_decoder_nonlocal_attn": False}  # fmt: skip


def standard_autoencoder() -> nn.Module:
    """Build an AutoencoderKL of usual widths, with three halvings, without attention over all latent voxels."""
    return AutoencoderKL(**AUTOENCODER)


def standard_denoiser(ours: ADM) -> nn.Module:
    """Build a DiffusionModelUNet with the levels of an ADM, resampled in residual blocks as an ADM's are.

    At the full size it has 1.9 % fewer parameters and as many FLOPs, to four digits. It takes wmask multiples of
    latent voxels only, and widths that are multiples of 32.
    """
    config = ours.config
    attends = [2**level in config["attention_rates"] for level in range(len(config["multipliers"]))]
    return DiffusionModelUNet(
        spatial_dims=3, in_channels=config["in_channels"], out_channels=config["out_channels"],
        channels=[config["base_width"] * multiplier for multiplier in config["multipliers"]],
        num_res_blocks=config["blocks_per_level"], attention_levels=attends, resblock_updown=True,
        num_head_channels=[config["head_channels"] if attending else 0 for attending in attends],
    )  # fmt: skip


def fill_zero_layers(network: nn.Module) -> None:
    """Draw the parameters that are zero before a training, so that every layer computes as after one."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01, generator=draw)


def ddim_steps(
    denoiser: nn.Module,
    voided: Tensor,
    shown: Tensor,
    mask: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    run: Sequence[int] | None = None,
) -> Tensor:
    """Inpaint a latent (b c x y z) from noise, by DDIM with evenly spaced timesteps as it is usually written.

    Args:
        denoiser: f(x, t) -> noise, of latents, conditioning and mask, concatenated.
        voided: (b c x y z) latents; known latent voxels are restored after every step.
        shown: (b k x y z) conditioning.
        mask: (b 1 x y z), 1 in latent voxels that are generated.
        steps: number of steps.
        run: the steps that are run; None runs all.
    """
    times = torch.linspace(schedule.steps - 1, 0, steps).round().long()
    alpha_bar = torch.cat([(schedule.alpha**2)[times], torch.ones(1, dtype=torch.float64)]).float()
    x = torch.randn(voided.shape, generator=torch.Generator().manual_seed(0)).to(voided)
    for i in range(steps) if run is None else run:
        x = voided * (1 - mask) + x * mask
        noise = denoiser(torch.cat([x, shown, mask], dim=1), times[i : i + 1].to(x.device))
        clean = (x - (1 - alpha_bar[i]).sqrt() * noise) / alpha_bar[i].sqrt()
        x = alpha_bar[i + 1].sqrt() * clean + (1 - alpha_bar[i + 1]).sqrt() * noise
    return voided * (1 - mask) + x * mask
