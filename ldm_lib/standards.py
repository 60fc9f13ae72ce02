"""What is commonly done, to be compared with: MONAI's networks as they come, at the size of ours.

volume (b 1 x y z) => latent (b 6 x/8 y/8 z/8); the denoiser answers what ours does, with the same blocks and attention
"""

from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import nn

from ldm_lib.adm import ADM

AUTOENCODER = {"spatial_dims": 3, "num_res_blocks": (2,) * 4, "channels": (32, 64, 128, 128), "latent_channels": 6,
               "attention_levels": (False,) * 4, "norm_num_groups": 32, "with_encoder_nonlocal_attn": False,
               "with_decoder_nonlocal_attn": False}  # fmt: skip


def standard_autoencoder() -> nn.Module:
    """AutoencoderKL at the widths people give it, with three halvings, without attention over all cells of a volume."""
    return AutoencoderKL(**AUTOENCODER)


def standard_denoiser(ours: ADM) -> nn.Module:
    """DiffusionModelUNet with the levels of an ADM, resampled in residual blocks as an ADM's are.

    At the full size it has 1.9 % fewer parameters and as many FLOPs, to four digits. It takes whole multiples of cells
    only, and widths that are multiples of 32.
    """
    config = ours.config
    attends = [2**level in config["attention_rates"] for level in range(len(config["multipliers"]))]
    return DiffusionModelUNet(
        spatial_dims=3, in_channels=config["in_channels"], out_channels=config["out_channels"],
        channels=[config["base_width"] * multiplier for multiplier in config["multipliers"]],
        num_res_blocks=config["blocks_per_level"], attention_levels=attends, resblock_updown=True,
        num_head_channels=[config["head_channels"] if attending else 0 for attending in attends],
    )  # fmt: skip
