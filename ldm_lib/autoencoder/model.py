"""The autoencoder: volumes to latents and back, MONAI's AutoencoderKL behind a contract of four words.

volume (b 1 x y z) => posterior mean => standardised latent (b c x/f y/f z/f) => volume
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lib.autoencoder._monai import AutoencoderKL, AutoencoderKlMaisi
from ldm_lib.autoencoder.input_transforms import TRANSFORMS
from ldm_lib.autoencoder.linear_codec import QUIET_LOG_VARIANCE, LinearCodec, per_channel
from ldm_lib.errors import ConfigError, InputError

NETWORKS = {"AutoencoderKL": AutoencoderKL, "AutoencoderKlMaisi": AutoencoderKlMaisi}
NORMS = ("local", "group")
LEARNED = ("both", "decoder", "none")
LEAST_MM, MOST_MM = 0.1, 100.0  # edge of a voxel


class Autoencoder(nn.Module):
    """A KL autoencoder (Rombach et al., arXiv 2112.10752), and the statistics of its latents.

    Args:
        network: the class, under "class" (AutoencoderKL or AutoencoderKlMaisi), and its arguments as MONAI names them;
            `of` writes ours.
        spacing_mm: voxel size it was trained at.
        input_transform: what stands before and after the network, see `front_ends`.
        norm: "group" as MONAI has it, or "local", see `LocalNorm`.
        linear_start: add a linear block code beside the network, see `LinearCode`; it stays as it was fitted.
        learned: which way has a network: "both"; "decoder", so that a cell's latent depends on its own voxels alone
            and a hole changes none beside it; or "none", the linear code alone.
    """

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        spacing_mm: float,
        input_transform: str = "plain",
        norm: str = "group",
        linear_start: bool = False,
        learned: str = "both",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "network": dict(network),
            "spacing_mm": float(spacing_mm),
            "input_transform": input_transform,
            "norm": norm,
            "linear_start": linear_start,
            "learned": learned,
        }
        _require_known(self.config)
        self.transform = TRANSFORMS[input_transform]()
        self.network = None if learned == "none" else self._build_network()
        self.linear = LinearCodec(self.latent_channels, self.factor).requires_grad_(False) if linear_start else None
        self.register_buffer("latent_mean", torch.zeros(self.latent_channels))
        self.register_buffer("scale_factor", torch.ones(self.latent_channels))

    @classmethod
    def of(
        cls,
        *,
        channels: Sequence[int],
        latent_channels: int,
        blocks: int,
        spacing_mm: float,
        input_transform: str = "plain",
        norm: str = "local",
        linear_start: bool = True,
        learned: str = "both",
    ) -> "Autoencoder":
        """AutoencoderKL without attention.

        Args:
            channels: width of each level; each level but the last halves every axis.
            latent_channels: numbers per latent cell.
            blocks: residual blocks per level.
        """
        network = {
            "class": "AutoencoderKL",
            "spatial_dims": 3,
            "in_channels": TRANSFORMS[input_transform].channels,
            "out_channels": TRANSFORMS[input_transform].channels,
            "channels": list(channels),
            "attention_levels": [False] * len(channels),
            "num_res_blocks": [blocks] * len(channels),
            "latent_channels": latent_channels,
            "norm_num_groups": math.gcd(8, *channels),
            "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
        }
        how = {"input_transform": input_transform, "norm": norm, "linear_start": linear_start, "learned": learned}
        return cls(network=network, spacing_mm=spacing_mm, **how)

    def _build_network(self) -> nn.Module:
        arguments = {name: value for name, value in self.config["network"].items() if name != "class"}
        network = NETWORKS[self.config["network"]["class"]](**arguments)
        if self.config["norm"] == "local":
            _localise(network)
        if self.config["linear_start"]:
            _silence(network)
        if self.config["learned"] == "decoder":
            network.encoder = network.quant_conv_mu = network.quant_conv_log_sigma = None
        return network.to(memory_format=torch.channels_last_3d)  # convolutions on a CPU are twice as fast in it

    @property
    def levels(self) -> int:
        """Resolutions the network works at; each but the last halves every axis."""
        network = self.config["network"]
        return len(network.get("channels", network.get("num_channels", ())))

    @property
    def factor(self) -> int:
        """Voxels per latent cell and axis."""
        return self.transform.factor * 2 ** (self.levels - 1)

    @property
    def latent_channels(self) -> int:
        return self.config["network"]["latent_channels"]

    @property
    def spacing_mm(self) -> float:
        return self.config["spacing_mm"]

    @property
    def mirror(self) -> Tensor | None:
        """Signs (c,) that turn a flipped latent into that of the mirror image; None where a network encodes."""
        return self.linear.mirror if self.config["learned"] != "both" else None

    def moments(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, before standardisation."""
        self._require_divisible(volume)
        if self.config["learned"] != "both":
            mean = self.linear.encode(volume)
            return mean, torch.full_like(mean, math.exp(QUIET_LOG_VARIANCE / 2))
        mean, std = self.network.encode(self.transform.analyse(volume))
        return (mean, std) if self.linear is None else (mean.float() + self.linear.encode(volume), std)

    def decode_raw(self, code: Tensor) -> Tensor:
        """Volume (b 1 fx fy fz) from latents before standardisation."""
        if self.network is None:
            return self.linear.decode(code)
        volume = self.transform.synthesise(self.network.decode(code))
        return volume if self.linear is None else volume.float() + self.linear.decode(code)

    def encode(self, volume: Tensor) -> Tensor:
        """Normalised volume (b 1 x y z) -> standardised posterior mean (b c x/f y/f z/f), float32."""
        mean, _ = self.moments(volume)
        return (mean.float() - per_channel(self.latent_mean)) * per_channel(self.scale_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Standardised latent (b c x y z) -> normalised volume (b 1 fx fy fz), float32."""
        raw = latent / per_channel(self.scale_factor) + per_channel(self.latent_mean)
        return self.decode_raw(raw).float()

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set shift and scale (c,) from latents' statistics before standardisation; scale factor = 1 / std.

        What a mirror image turns the sign of has mean 0, whatever was found.
        """
        self.latent_mean.copy_(mean if self.mirror is None else torch.where(self.mirror < 0, 0, mean.to(self.mirror)))
        self.scale_factor.copy_(1 / std.clamp(min=1e-6))

    def freeze(self) -> "Autoencoder":
        """Evaluation mode, no gradients."""
        return self.eval().requires_grad_(False)

    def _require_divisible(self, volume: Tensor) -> None:
        if any(n % self.factor for n in volume.shape[-3:]):
            raise InputError(
                f"shape {tuple(volume.shape[-3:])} is not divisible by {self.factor}: the network would shorten it",
                fix="pad it with geometry.Frame",
            )


class LocalNorm(nn.Module):
    """Layer norm over the channels of each voxel (Ba et al., arXiv 1607.06450).

    GroupNorm takes its statistics over the whole grid, so that a crop is coded differently within its volume. Here
    every voxel has its own, and coding is the same wherever it is cut.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b c x y z), each voxel by itself."""
        normed = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype).movedim(-1, 1)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), the mean over latent elements (Kingma & Welling, arXiv 1312.6114, app. B)."""
    return 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).mean()


def _require_known(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be built, as a config.json may ask for it."""
    known = {"input_transform": TRANSFORMS, "norm": NORMS, "learned": LEARNED}
    wrong = [f"{name} {config[name]!r}" for name, choices in known.items() if config[name] not in choices]
    if (name := config["network"].get("class")) not in NETWORKS:
        wrong.append(f"class {name!r}")
    if not LEAST_MM <= config["spacing_mm"] <= MOST_MM:
        wrong.append(f"voxels of {config['spacing_mm']:g} mm")
    if config["learned"] != "both" and not config["linear_start"]:
        wrong.append(f"learned {config['learned']!r} without linear_start")
    if wrong:
        raise ConfigError(f"no autoencoder with {', '.join(wrong)}", where="autoencoder", fix="copy its folder again")


def _localise(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, LocalNorm(child.num_channels, child.eps))


def _silence(network: nn.Module) -> None:
    """Zero posterior mean, nearly no posterior noise and zero output, until training says otherwise."""
    mean, log_variance = network.quant_conv_mu.conv, network.quant_conv_log_sigma.conv
    for layer in (mean, log_variance, network.decoder.blocks[-1].conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(log_variance.bias, QUIET_LOG_VARIANCE)
