"""The denoiser: the ablated diffusion model of Dhariwal & Nichol (arXiv 2105.05233) in true 3D."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm_lib.errors import ConfigError


class ADM(nn.Module):
    """A U-Net from a noisy latent, what the caller concatenates to it, and t, to the noise.

    Each level but the last halves all three axes. Its output is zero until it is trained.

    Args:
        in_channels: channels of x: latents, conditioning and mask together.
        out_channels: channels of the predicted noise.
        base_width: channels of the first level.
        multipliers: width of each level, in units of base_width.
        blocks_per_level: residual blocks on the way down; one more on the way up.
        attention_rates: downsampling rates (1, 2, 4, ...) at which attention follows each block;
            the middle of the network always has one.
        head_channels: channels per attention head.
        dropout: probability, in [0, 1), before the last convolution of each block.

    Raises:
        ConfigError: an option is out of range, or x does not have in_channels.
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
    ) -> None:
        super().__init__()
        self._config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "base_width": base_width,
            "multipliers": list(multipliers),
            "blocks_per_level": blocks_per_level,
            "attention_rates": list(attention_rates),
            "head_channels": head_channels,
            "dropout": dropout,
        }
        _check(self._config)
        self.multiple = 2 ** (len(multipliers) - 1)
        embedding = 4 * base_width
        self.embed = nn.Sequential(
            nn.Linear(base_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.stem = _conv(in_channels, base_width)
        self.down, self.middle, self.up = self._build(embedding)
        self.norm = Norm(base_width)
        self.head = _zero(_conv(base_width, out_channels))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options as plain values: `ADM(**config)` is the same network."""
        return {k: list(v) if isinstance(v, list) else v for k, v in self._config.items()}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x.

        Args:
            x: (b c x y z) latents of any size; padded with zeros inside, and cropped back.
            t: (b,) timesteps.

        Returns:
            (b out_channels x y z), in the dtype of x.
        """
        if x.ndim != 5 or x.shape[1] != self._config["in_channels"]:
            raise ConfigError(
                f"an input of shape {tuple(x.shape)} given, (b, {self._config['in_channels']}, x, y, z) allowed",
                where="ADM",
                fix="concatenate latents, conditioning and mask as the network was built for",
            )
        embedding = self.embed(timestep_embedding(t, self._config["base_width"]))
        padding = [_split(-size % self.multiple) for size in x.shape[2:]]
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

    def _build(self, embedding: int) -> tuple[nn.ModuleList, "Stage", nn.ModuleList]:
        config, rates = self._config, self._config["attention_rates"]
        widths = [config["base_width"] * m for m in config["multipliers"]]
        last = len(widths) - 1

        def block(inside: int, outside: int, resample: nn.Module | None = None) -> ResidualBlock:
            dropout = config["dropout"]
            return ResidualBlock(inside, outside, embedding, dropout=dropout, resample=resample)

        def attend(level: int) -> list[nn.Module]:
            wanted = 2**level in rates
            return [Attention(widths[level], config["head_channels"])] if wanted else []

        down, skips, channels = nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config["blocks_per_level"]):
                down.append(Stage(block(channels, width), *attend(level)))
                channels = width
                skips.append(width)
            if level < last:
                down.append(Stage(block(width, width, nn.AvgPool3d(2))))
                skips.append(width)
        attention = Attention(channels, config["head_channels"])
        middle = Stage(block(channels, channels), attention, block(channels, channels))
        up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config["blocks_per_level"] + 1):
                stage = Stage(block(channels + skips.pop(), width), *attend(level))
                if level > 0 and i == config["blocks_per_level"]:
                    stage.append(block(width, width, nn.Upsample(scale_factor=2, mode="nearest")))
                up.append(stage)
                channels = width
        return down, middle, up


class Stage(nn.Sequential):
    """Residual blocks, which see the timestep, and attention, which does not, one after another."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (b c x y z), given the timestep's embedding (b e)."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class ResidualBlock(nn.Module):
    """BigGAN-style residual block: both branches resampled, the second norm scaled and shifted by t.

    Source: Dhariwal & Nichol 2021, section 3.1 (adaptive group normalisation, eq. 3).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1, self.conv1 = Norm(in_channels), _conv(in_channels, out_channels)
        self.scale_shift = nn.Linear(embedding, 2 * out_channels)
        self.norm2, self.conv2 = Norm(out_channels), _zero(_conv(out_channels, out_channels))
        self.dropout = nn.Dropout(dropout)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (b c x y z), given the timestep's embedding (b e)."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.scale_shift(embedding)[:, :, None, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Multi-head self-attention over all cells, added to its input."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = _zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b c x y z)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.projection(attended).transpose(1, 2).unflatten(2, x.shape[2:])


class Conv(nn.Conv3d):
    """Convolution, in float32 on a CPU where an axis has one or two cells.

    There the weight gradient of torch 2.13 in bfloat16 reads memory that nobody wrote, and is NaN now and then.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (b c x y z)."""
        if x.device.type != "cpu" or min(x.shape[2:]) > 2:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Norm(nn.GroupNorm):
    """Group normalisation, computed in float32 under any autocast.

    In 32 groups, or in fewer where the channels do not divide or a group would have under four:
    a group of one channel would forget the channel's mean.
    """

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        super().__init__(max(n for n in range(1, most + 1) if channels % n == 0), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b c x y z); the result has the dtype of x."""
        return super().forward(x.float()).to(x.dtype)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t (b,) at width // 2 frequencies from 1 down to 1e-4: (b width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def count_parameters(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_flops(module: ADM, shape: Sequence[int]) -> int:
    """FLOPs (two a multiply-add) of one forward of one sample, counted without computing it.

    Args:
        module: the network.
        shape: latent cells (x y z).
    """
    with torch.device("meta"):
        twin = ADM(**module.config)
        x = torch.empty(1, module.config["in_channels"], *shape)
        t = torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        twin(x, t)
    return counter.get_total_flops()


def _conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    return Conv(in_channels, out_channels, 3, padding=1)


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _split(padding: int) -> tuple[int, int]:
    """Padding before and after an axis."""
    return padding // 2, padding - padding // 2


def _check(config: dict[str, Any]) -> None:
    """Refuse options from which no network can be built."""
    levels = len(config["multipliers"])
    widths = [config["base_width"] * m for m in config["multipliers"]]
    rates = [2**level for level in range(levels)]
    attending = [w for w, r in zip(widths, rates, strict=True) if r in config["attention_rates"]]
    fits = {
        "in_channels": (config["in_channels"] >= 1, "1 or more"),
        "out_channels": (config["out_channels"] >= 1, "1 or more"),
        "base_width": (config["base_width"] >= 2 and config["base_width"] % 2 == 0, "even numbers"),
        "multipliers": (levels and min(config["multipliers"]) >= 1, "one or more, 1 or more each"),
        "blocks_per_level": (config["blocks_per_level"] >= 1, "1 or more"),
        "attention_rates": (set(config["attention_rates"]) <= set(rates), f"some of {rates}"),
        "head_channels": (
            config["head_channels"] >= 1
            and not any(w % max(1, w // config["head_channels"]) for w in [*attending, *widths[-1:]]),
            f"sizes that divide the attending widths {[*attending, *widths[-1:]]} into equal heads",
        ),
        "dropout": (0 <= config["dropout"] < 1, "0 up to, but not, 1"),
    }
    for name, (fit, allowed) in fits.items():
        if not fit:
            raise ConfigError(f"{config[name]} given, {allowed} allowed", where=name)
