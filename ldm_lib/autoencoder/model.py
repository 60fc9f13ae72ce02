"""Encode volumes into latents and decode them: MONAI's AutoencoderKL, a linear codec, or their sum.

volume (b 1 x y z) => posterior mean => standardised latent (b c x/f y/f z/f) => volume
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lib.autoencoder.input_transforms import TRANSFORMS
from ldm_lib.autoencoder.linear_codec import QUIET_LOG_VARIANCE, LinearCodec, per_channel
from ldm_lib.devices import pick_device
from ldm_lib.errors import ConfigError, InputError, WeightsError
from ldm_lib.files import AUTOENCODER_FOLDER, PRETRAINED
from ldm_lib.geometry import Padding
from ldm_lib.model_io import load_model, save_model

NETWORKS = ("AutoencoderKL", "AutoencoderKlMaisi")
CHOICES = {"input_transform": tuple(TRANSFORMS), "norm": ("local", "group"), "learned": ("both", "decoder", "none")}
LEAST_MM, MOST_MM = 0.1, 100.0  # edge of a voxel


class Autoencoder(nn.Module):
    """Encode and decode volumes with a KL autoencoder (Rombach et al., arXiv 2112.10752).

    Args:
        network: the class, under "class" (AutoencoderKL or AutoencoderKlMaisi), and its arguments as MONAI names them;
            `of` composes them.
        spacing_mm: voxel size it was trained at.
        input_transform: fixed transform before and after the network, see `input_transforms`.
        norm: "group" as in MONAI, for imported weights, or "local", see `LocalNorm`.
        linear_start: add the output of a linear codec, see `LinearCodec`; it stays as it was fitted.
        learned: which parts are networks: "both"; "decoder", so that a latent voxel depends on its own voxels alone
            and a mask does not change its neighbours; or "none", the linear codec alone.

    Attributes:
        latent_mean, scale_factor: (c,) shift and scale that standardise the latents.
        history: one row per training step (step, learning_rate, l1, ...); empty unless it was trained just now.

    Examples:
        >>> autoencoder = Autoencoder.load()
        >>> image = np.zeros((20, 24, 18), np.float32)
        >>> autoencoder.factor, autoencoder.latent_channels, autoencoder.reconstruct(image).shape
        (8, 16, (20, 24, 18))
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
            "network": dict(network), "spacing_mm": float(spacing_mm), "input_transform": input_transform, "norm": norm,
            "linear_start": linear_start, "learned": learned,
        }  # fmt: skip
        _require_known(self.config)
        self.history: list[dict[str, float]] = []
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
        input_transform: str = "plain",
        **options: Any,
    ) -> "Autoencoder":
        """Build an AutoencoderKL without attention, with local norms and a linear codec unless requested otherwise.

        Args:
            channels: width of each level; each level but the last halves every axis.
            blocks: residual blocks per level.
            options: other arguments of the class.
        """
        options = {"input_transform": input_transform, "norm": "local", "linear_start": True} | options
        bands = TRANSFORMS[input_transform].channels
        network = {
            "class": "AutoencoderKL", "spatial_dims": 3, "in_channels": bands, "out_channels": bands,
            "channels": list(channels), "attention_levels": [False] * len(channels),
            "num_res_blocks": [blocks] * len(channels), "latent_channels": latent_channels,
            "norm_num_groups": math.gcd(8, *channels), "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
        }  # fmt: skip
        return cls(network=network, **options)

    @classmethod
    def load(cls, folder: str | Path | None = None, *, device: str = "auto") -> "Autoencoder":
        """Load a trained autoencoder; without a folder, the pretrained one of the package.

        Args:
            folder: of an autoencoder, or of a latent diffusion model, which has one inside.
            device: "auto" (a GPU if there is one), "cpu" or "cuda".

        Raises:
            WeightsError: there is no model folder, or it is damaged.
        """
        folder = PRETRAINED if folder is None else Path(folder)
        inside = folder / AUTOENCODER_FOLDER
        return load_model(inside if inside.is_dir() else folder, cls).to(pick_device(device))

    def save(self, folder: str | Path, **facts: Any) -> str:
        """Write the autoencoder and plain values to keep in config.json; return the sha256 of its weights."""
        return save_model(Path(folder), self, **facts)

    def _build_network(self) -> nn.Module:
        arguments = dict(self.config["network"])
        network = network_class(arguments.pop("class"))(**arguments)
        if self.config["norm"] == "local":
            for parent in list(network.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, nn.GroupNorm):
                        setattr(parent, name, LocalNorm(child.num_channels, child.eps))
        if self.config["linear_start"]:
            _zero_outputs(network)
        if self.config["learned"] == "decoder":
            network.encoder = network.quant_conv_mu = network.quant_conv_log_sigma = None
        return network.to(memory_format=torch.channels_last_3d)  # convolutions on a CPU are twice as fast in it

    @property
    def factor(self) -> int:
        """Count the voxels of a latent voxel per axis; each level of the network but the last halves every axis."""
        network = self.config["network"]
        return self.transform.factor * 2 ** (len(network.get("channels", network.get("num_channels", ()))) - 1)

    @property
    def latent_channels(self) -> int:
        """Count the channels of the latent."""
        return self.config["network"]["latent_channels"]

    @property
    def spacing_mm(self) -> float:
        """Return the voxel size that it was trained at."""
        return self.config["spacing_mm"]

    @property
    def mirror(self) -> Tensor | None:
        """Return signs (c,) that turn a flipped latent into that of the mirror image; None where a network encodes."""
        return self.linear.mirror if self.config["learned"] != "both" else None

    def moments(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Return posterior mean and standard deviation (b c x/f y/f z/f), before standardisation."""
        if any(n % self.factor for n in volume.shape[-3:]):
            cause = f"shape {tuple(volume.shape[-3:])} is not divisible by {self.factor}: the network would shorten it"
            raise InputError(cause, fix="pad it with geometry.Frame")
        if self.config["learned"] != "both":
            mean = self.linear.encode(volume)
            return mean, torch.full_like(mean, math.exp(QUIET_LOG_VARIANCE / 2))
        mean, std = self.network.encode(self.transform.analyse(volume))
        return (mean, std) if self.linear is None else (mean.float() + self.linear.encode(volume), std)

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Decode latents (b c x y z) as they are before standardisation into volumes (b 1 fx fy fz)."""
        if self.network is None:
            return self.linear.decode(latent)
        volume = self.transform.synthesise(self.network.decode(latent))
        return volume if self.linear is None else volume.float() + self.linear.decode(latent)

    def encode(self, volume: Tensor) -> Tensor:
        """Encode normalised volumes (b 1 x y z) into standardised posterior means (b c x/f y/f z/f), float32.

        Raises:
            InputError: an axis is not divisible by the factor.
        """
        mean, _ = self.moments(volume)
        return (mean.float() - per_channel(self.latent_mean)) * per_channel(self.scale_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode standardised latents (b c x y z) into normalised volumes (b 1 fx fy fz), float32."""
        raw = latent / per_channel(self.scale_factor) + per_channel(self.latent_mean)
        return self.decode_raw(raw).float()

    def reconstruct(self, image: np.ndarray) -> np.ndarray:
        """Encode and decode one image (x, y, z) of any shape, in float32.

        Args:
            image: normalised intensities, 0 in air; see `normalise` in `data.volume`.
        """
        padding = Padding.to_multiple(image.shape, self.factor)
        volume = torch.from_numpy(padding.pad(np.asarray(image, np.float32)))[None, None]
        with torch.inference_mode():
            decoded = self.decode(self.encode(volume.to(self.latent_mean.device)))
        return padding.crop(decoded[0, 0].cpu().numpy())

    @torch.no_grad()
    def image_weights(self) -> Tensor:
        """Return the sum of squares by which a unit change of each latent channel changes the image, (c,).

        Exact for a linear codec; for a network, the change is that of one latent voxel among latents of 0.
        """
        edge, channels = 5, torch.arange(self.latent_channels)
        latents = torch.zeros(len(channels), len(channels), *[edge] * 3, device=self.latent_mean.device)
        unchanged = self.decode(latents[:1])
        latents[channels, channels, edge // 2, edge // 2, edge // 2] = 1
        return (self.decode(latents) - unchanged).square().sum(dim=(1, 2, 3, 4))

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set shift and scale from mean and standard deviation (c,) of latents; scale factor = 1 / std.

        Channels that change their sign under mirroring get mean 0, whatever was measured.
        """
        self.latent_mean.copy_(mean if self.mirror is None else torch.where(self.mirror < 0, 0, mean.to(self.mirror)))
        self.scale_factor.copy_(1 / std.clamp(min=1e-6))

    def freeze(self) -> "Autoencoder":
        """Switch to evaluation mode, without gradients."""
        return self.eval().requires_grad_(False)


class LocalNorm(nn.Module):
    """Normalise over the channels of each voxel (layer norm, Ba et al., arXiv 1607.06450).

    GroupNorm takes its statistics over the whole grid, so that a crop is encoded differently within its volume. Here
    every voxel has its own statistics, and a crop is encoded as its part of the volume is.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b c x y z), each voxel separately."""
        normed = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype).movedim(-1, 1)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Return KL(N(mean, std^2) || N(0, 1)), the mean over latent elements (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).mean()


def network_class(name: str) -> type[nn.Module]:
    """Import a network of MONAI by its name; only when it is needed, since MONAI takes seconds to import."""
    from ldm_lib.autoencoder import _monai

    return getattr(_monai, name)


def _require_known(config: Mapping[str, Any]) -> None:
    """Reject what cannot be built; a config.json may contain anything."""
    if config["input_transform"] == "half":
        raise WeightsError("input_transform 'half' was removed in version 0.8", where="autoencoder",
                           fix="use version 0.7, or train again with plain or haar")  # fmt: skip
    wrong = [f"{name} {config[name]!r}" for name, choices in CHOICES.items() if config[name] not in choices]
    wrong += [] if (name := config["network"].get("class")) in NETWORKS else [f"class {name!r}"]
    wrong += [] if LEAST_MM <= config["spacing_mm"] <= MOST_MM else [f"voxels of {config['spacing_mm']:g} mm"]
    if config["learned"] != "both" and not config["linear_start"]:
        wrong.append(f"learned {config['learned']!r} without linear_start")
    if wrong:
        raise ConfigError(f"no autoencoder with {', '.join(wrong)}", where="autoencoder", fix="copy its folder again")


def _zero_outputs(network: nn.Module) -> None:
    """Start with zero posterior mean, nearly no posterior noise and zero output."""
    mean, log_variance = network.quant_conv_mu.conv, network.quant_conv_log_sigma.conv
    for layer in (mean, log_variance, network.decoder.blocks[-1].conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(log_variance.bias, QUIET_LOG_VARIANCE)
