"""Define the denoiser: the ablated diffusion model (ADM) of Dhariwal & Nichol (arXiv 2105.05233) in 3D."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm_lib.diffusion.unet_blocks import Attention, BlockSequence, Norm, ResidualBlock, conv, timestep_embedding, zero
from ldm_lib.errors import ConfigError


class ADM(nn.Module):
    """Predict the noise (or another target) from a noisy latent, its conditioning and the timestep, with a 3D U-Net.

    Each level but the last halves all three axes. The output is zero until the network is trained.

    Args:
        in_channels: channels of x: latents, conditioning and mask together.
        multipliers: width of each level, in units of base_width.
        blocks_per_level: residual blocks on the way down; one more on the way up.
        attention_rates: downsampling rates (1, 2, 4, ...) at which attention follows each block; the middle of the
            network always has one.
        dropout: probability, in [0, 1), before the last convolution of each block.
        conditioning: start and stop of the conditioning among the channels of x, for a network that can also be used
            unconditionally: a learned value per channel then replaces the conditioning, and a learned embedding is
            added to that of the timestep (Ho & Salimans 2022, arXiv 2207.12598). Empty: always conditioned.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        base_width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks_per_level: int = 2,
        attention_rates: Sequence[int] = (4,),
        head_channels: int = 64,
        dropout: float = 0.0,
        conditioning: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels, "out_channels": out_channels, "base_width": base_width,
            "multipliers": list(multipliers), "blocks_per_level": blocks_per_level,
            "attention_rates": list(attention_rates), "head_channels": head_channels, "dropout": dropout,
            "conditioning": list(conditioning),
        }  # fmt: skip
        _check(self.config)
        self.multiple = 2 ** (len(multipliers) - 1)
        embedding = 4 * base_width
        layers = nn.Linear(base_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        self.embed = nn.Sequential(*layers)
        self.stem = conv(in_channels, base_width)
        self.down, self.middle, self.up = self._build(embedding)
        self.norm = Norm(base_width)
        self.head = zero(conv(base_width, out_channels))
        if conditioning:
            self.null_conditioning = _random_parameter(conditioning[1] - conditioning[0], 1.0)
            self.unconditional_embedding = _random_parameter(embedding, 0.02)

    @property
    def supports_unconditional(self) -> bool:
        """Return whether the network can be used without its conditioning."""
        return bool(self.config["conditioning"])

    def forward(self, x: Tensor, t: Tensor, conditioned: Tensor | None = None) -> Tensor:
        """Predict the noise in x.

        Args:
            x: (b c x y z) latents of any size; padded with zeros inside, and cropped back.
            t: (b,) timesteps.
            conditioned: (b,) 1 for conditional, 0 for unconditional samples; None: all are conditional.

        Returns:
            (b out_channels x y z), in the dtype of x.
        """
        embedding = self.embed(timestep_embedding(t, self.config["base_width"]))
        if conditioned is not None:
            x, embedding = self._without_conditioning(x, embedding, conditioned.to(x.dtype))
        missing = [-size % self.multiple for size in x.shape[2:]]
        padding = [(n // 2, n - n // 2) for n in missing]  # before and after
        h = self.stem(F.pad(x, [side for axis in reversed(padding) for side in axis]))
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        h = self.head(F.silu(self.norm(h)))
        box = [slice(start, start + n) for (start, _), n in zip(padding, x.shape[2:], strict=True)]
        return h[:, :, *box].to(x.dtype)

    def _without_conditioning(self, x: Tensor, embedding: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the conditioning of unconditional samples by the learned null conditioning."""
        if not self.supports_unconditional:
            raise ConfigError("it was trained with conditioning only and has no unconditional mode", where="ADM",
                              fix="train with conditioning_dropout above 0")  # fmt: skip
        start, stop = self.config["conditioning"]
        shown = conditioned[:, None, None, None, None]
        given = x[:, start:stop]
        null = self.null_conditioning.to(x.dtype)[:, None, None, None].expand_as(given)
        x = torch.cat([x[:, :start], shown * given + (1 - shown) * null, x[:, stop:]], dim=1)
        return x, embedding + (1 - conditioned[:, None]) * self.unconditional_embedding

    def _build(self, embedding: int) -> tuple[nn.ModuleList, BlockSequence, nn.ModuleList]:
        config, rates = self.config, self.config["attention_rates"]
        widths = [config["base_width"] * m for m in config["multipliers"]]
        last = len(widths) - 1
        block = partial(ResidualBlock, embedding=embedding, dropout=config["dropout"])

        def attend(level: int) -> list[nn.Module]:
            return [Attention(widths[level], config["head_channels"])] if 2**level in rates else []

        down, skips, channels = nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config["blocks_per_level"]):
                down.append(BlockSequence(block(channels, width), *attend(level)))
                channels = width
                skips.append(width)
            if level < last:
                down.append(BlockSequence(block(width, width, resample=nn.AvgPool3d(2))))
                skips.append(width)
        attention = Attention(channels, config["head_channels"])
        middle = BlockSequence(block(channels, channels), attention, block(channels, channels))
        up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config["blocks_per_level"] + 1):
                stage = BlockSequence(block(channels + skips.pop(), width), *attend(level))
                if level > 0 and i == config["blocks_per_level"]:
                    stage.append(block(width, width, resample=nn.Upsample(scale_factor=2)))
                up.append(stage)
                channels = width
        return down, middle, up


def count_parameters(module: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_flops(module: ADM, shape: Sequence[int]) -> int:
    """Count the FLOPs (two per multiply-add) of a forward pass of one latent (x y z), without computing it."""
    with torch.device("meta"):
        twin = ADM(**module.config)
        x = torch.empty(1, module.config["in_channels"], *shape)
        t = torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        twin(x, t)
    return counter.get_total_flops()


def _check(config: dict[str, Any]) -> None:
    """Reject options from which no network can be built."""
    levels, head, shown = len(config["multipliers"]), config["head_channels"], config["conditioning"]
    widths = [config["base_width"] * m for m in config["multipliers"]]
    rates = [2**level for level in range(levels)]
    attending = [w for w, r in zip(widths, rates, strict=True) if r in config["attention_rates"]] + widths[-1:]
    limits = {
        "base_width": (2 <= config["base_width"] <= 4096 and config["base_width"] % 2 == 0, "even numbers to 4096"),
        "multipliers": (1 <= levels <= 8, "one to eight"),
        "blocks_per_level": (1 <= config["blocks_per_level"] <= 64, "1 to 64"),
        "head_channels": (
            head >= 1 and not any(w % max(1, w // head) for w in attending),
            f"sizes that divide the attending widths {attending} into equal heads",
        ),
        "conditioning": (
            not shown or 0 <= shown[0] < shown[1] <= config["in_channels"],
            f"none, or start and stop within {config['in_channels']} channels",
        ),
    }
    for name, (fits, allowed) in limits.items():
        if not fits:
            raise ConfigError(
                f"{config[name]} given, {allowed} allowed", where=f"ADM, {name}", fix="see `ldm params 04`"
            )


def _random_parameter(length: int, std: float) -> nn.Parameter:
    """Draw a normal vector, but on the meta device, where a draw would import torch._dynamo for two seconds."""
    values = torch.empty(length)
    return nn.Parameter(values if values.is_meta else values.normal_().mul_(std))
