"""The latent diffusion model: a frozen autoencoder, a denoiser and its noise schedule, as one model folder."""

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.devices import autocast, pick_device, pick_precision, total_memory
from ldm_lib.diffusion.latents import (
    Latents,
    LatentSpec,
    add_initial_estimate,
    context_box,
    denoiser_input,
    keep_known,
    mirror_image,
    on_device,
)
from ldm_lib.diffusion.options import SamplerOptions, ScheduleOptions
from ldm_lib.diffusion.parameterisation import to_x0_and_noise
from ldm_lib.diffusion.samplers import SAMPLERS, Callback
from ldm_lib.diffusion.schedule import NoiseSchedule, noise_schedule
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError, WeightsError
from ldm_lib.files import AUTOENCODER_FOLDER, PRETRAINED
from ldm_lib.model_io import load_model, require_pair, save_model, without_derived
from ldm_lib.options import Count

# Activations of a denoiser per latent voxel and channel of its first level; 70 to 190 measured, twice that if guided.
BYTES_PER_CHANNEL = 400
MEMORY_FRACTION = 0.25  # of all memory, for the activations of one batch
LARGEST_BATCH = {"cpu": 4, "cuda": 32}
REMOVED = {"shift": 1.0, "zero_terminal_snr": False}  # of the schedule of models before 0.8 -> the value that was none
CONTEXTS = {"draft": "initial_estimate"}  # as model folders before version 0.8 call it -> now


class CaseNoise:
    """Draw Gaussian noise that depends on (seed, name, step) alone, whatever the batch, order or device."""

    def __init__(self, names: Sequence[str], seed: int, shape: Sequence[int], device: torch.device) -> None:
        self.names, self.seed, self.shape, self.device = list(names), seed, tuple(shape), device

    def __call__(self, step: int) -> Tensor:
        """Draw (b c x y z) standard normal noise; step -1 is where sampling starts."""
        digests = (hashlib.sha256(f"{self.seed}/{name}/{step}".encode()).digest() for name in self.names)
        generators = (torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests)
        return torch.stack([torch.randn(self.shape, generator=each) for each in generators]).to(self.device)


class ModelSettings(ScheduleOptions):
    """Describe how a model was trained and how it is sampled, as its config.json states; see `LatentDiffusion`."""

    latent_crop: Count = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    box_margin: Count | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], autoencoder: Autoencoder, *, where: Path) -> "ModelSettings":
        """Read the settings from the config.json of a denoiser and of its autoencoder, in the folder `where`."""
        values = dict(config["schedule"])
        for name, default in REMOVED.items():
            if (value := values.pop(name, default)) != default:
                raise WeightsError(f"was trained with {name} = {value!r}, which was removed in version 0.8",
                                   where=where, fix="use version 0.7, or train again")  # fmt: skip
        values["diffusion_steps"] = values.pop("steps")
        values |= {name: config[name] for name in ("latent_crop", "temperature") if name in config}
        margin = autoencoder.folder_config.get("box_margin")
        return cls.parse(values | {"prediction": config["prediction"], "box_margin": margin})


@dataclass(frozen=True)
class LatentDiffusion:
    """Hold a frozen autoencoder and a denoiser, and sample latents with them.

    Attributes:
        spec: how cases become latents and conditioning.
        prediction: what the denoiser predicts.
        box_margin: margin of the decoded box around the mask, latent voxels; None decodes the whole volume.
        crop: edge of the latents that the denoiser was trained on, latent voxels; 0 for whole latents.
        temperature: scale of the initial noise.
        process: arguments of `noise_schedule` from which `schedule` was made; `save` needs them.
        name: "pretrained", or the name of the folder that the model was loaded from.

    Examples:
        >>> model = LatentDiffusion.load(device="cpu")
        >>> model.autoencoder.factor, model.autoencoder.latent_channels
        (8, 16)
        >>> model.schedule.steps, model.prediction
        (1000, 'velocity')
    """

    autoencoder: Autoencoder
    denoiser: ADM
    schedule: NoiseSchedule
    spec: LatentSpec
    device: torch.device
    precision: str
    prediction: str = "noise"
    box_margin: int | None = None
    crop: int = 0
    temperature: float = 1.0
    process: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.denoiser.parameters())
        facts = f"{weights:,} weights, {self.autoencoder.latent_channels} channels of {self.autoencoder.factor} voxels"
        return f"LatentDiffusion({facts}, {self.prediction}, {self.schedule!r}, {self.device}, {self.precision})"

    @classmethod
    def load(
        cls, folder: str | Path | None = None, *, device: str = "auto", precision: str = "auto", temperature: float = 0
    ) -> "LatentDiffusion":
        """Load a model folder; without one, the pretrained weights of the package.

        Args:
            device: "auto", "cpu" or "cuda"; auto takes a GPU if there is one.
            precision: "auto", "32", "bf16" or "16".
            temperature: scale of the initial noise, at most 2; 0 takes the model's own.

        Raises:
            ConfigError: a device, precision or temperature that is not allowed.
            WeightsError: no model folder, a damaged one, or a denoiser of another autoencoder.
        """
        folder, name = (Path(folder), Path(folder).resolve().name) if folder else (PRETRAINED, "pretrained")
        place = pick_device(device)
        precision, temperature = pick_precision(precision, place), SamplerOptions(temperature=temperature).temperature
        denoiser = load_model(folder, ADM)
        autoencoder = load_model(folder / AUTOENCODER_FOLDER, Autoencoder)
        try:
            spec = _read_spec(denoiser.folder_config)
            settings = ModelSettings.of(denoiser.folder_config, autoencoder, where=folder)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as error:
            cause = error.cause if isinstance(error, ConfigError) else error
            raise WeightsError(f"its config does not say how it was trained ({cause})", where=folder,
                               fix="copy the model folder again") from error  # fmt: skip
        require_pair(denoiser, autoencoder, where=folder)
        return cls(
            autoencoder.to(place), denoiser.to(place), noise_schedule(**settings.process), spec, place,
            precision, settings.prediction, settings.box_margin, settings.latent_crop,
            temperature or settings.temperature or 1.0, settings.process, name,
        )  # fmt: skip

    def save(self, folder: str | Path, *, autoencoder_folder: str | Path | None = None, **facts: Any) -> str:
        """Write denoiser, autoencoder and settings as one model folder; return the sha256 of the denoiser's weights.

        Args:
            autoencoder_folder: of this very autoencoder, copied byte for byte; without it the autoencoder is saved.
            facts: plain values to keep in config.json.
        """
        folder = Path(folder)
        if autoencoder_folder:
            shutil.copytree(autoencoder_folder, folder / AUTOENCODER_FOLDER, dirs_exist_ok=True)
            digest = self.autoencoder.folder_config["sha256"]
        else:
            kept = getattr(self.autoencoder, "folder_config", {"box_margin": self.box_margin})
            digest = self.autoencoder.save(folder / AUTOENCODER_FOLDER, **without_derived(kept))
        own = {"schedule": dict(self.process), "settings": self.spec.model_dump(), "prediction": self.prediction,
               "latent_crop": self.crop, "temperature": self.temperature, "autoencoder_sha256": digest}  # fmt: skip
        return save_model(folder, self.denoiser, **(own | facts))

    def sample(
        self,
        latents: Latents,
        names: Sequence[str],
        *,
        seed: int,
        sampler: str,
        num_inference_steps: int,
        guidance: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Sample the masked region of one encoded case, once for each name.

        Args:
            names: with `seed` they determine the samples.
            num_inference_steps: denoiser evaluations. A single one starts from the mean of the noise, 0, and gives the
                mean of all samples, whatever the seed; see `predict_mean`.
            guidance: scale s of classifier-free guidance, see `predict`.
            callback: as in `samplers`, called with whole latents.

        Returns:
            (b c x y z) standardised latents on the CPU.
        """
        whole, box = latents["voided"], (..., *self.context(latents))
        batch = on_device({name: part[box].expand(len(names), -1, -1, -1, -1) for name, part in latents.items()},
                          self.device)  # fmt: skip
        noise = CaseNoise(names, seed, whole.shape, self.device)
        temperature, predict = (self.temperature, self.predict) if num_inference_steps > 1 else (0.0, self.predict_mean)

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return to_x0_and_noise(self.prediction, self.schedule, predict(x, t, batch, guidance), x, t)

        def in_whole(x: Tensor) -> Tensor:
            latent = whole.expand(len(names), -1, -1, -1, -1).clone()
            latent[box] = x.to(latent)
            return add_initial_estimate(latent, latents, self.spec)

        def report(state: dict[str, Any]) -> None:
            callback(state | {name: in_whole(state[name]) for name in ("x", "x0")})

        with torch.inference_mode():
            return in_whole(SAMPLERS[sampler](
                denoise, temperature * noise(-1)[box], self.schedule, steps=num_inference_steps,
                noise=lambda step: noise(step)[box], keep=lambda z: keep_known(z, batch),
                callback=report if callback else None,
            ))  # fmt: skip

    def context(self, latents: Latents) -> tuple[slice, ...]:
        """Return the box of latent voxels that the denoiser sees, around the mask or the whole grid, as in training."""
        mask = latents["mask"][0].numpy() > 0
        if not self.crop:
            return tuple(slice(0, n) for n in mask.shape)
        return context_box(mask, edge=self.crop, multiple=self.denoiser.multiple)

    def predict(self, x: Tensor, t: Tensor, batch: Latents, guidance: float) -> Tensor:
        """Apply classifier-free guidance: `uncond + s * (cond - uncond)`; one network call when s is 0 or 1.

        Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with s = 1 + w. At one x_t all predictions are linear in
        the noise, so that any of them may be extrapolated.
        """
        shown = denoiser_input(x, batch, self.spec)
        with autocast(self.device, self.precision):
            if guidance in (0.0, 1.0):
                conditioned = None if guidance else torch.zeros(len(t), device=self.device)
                return self.denoiser(shown, t, conditioned).float()
            conditioned = torch.arange(2, device=self.device).repeat_interleave(len(t)).to(shown.dtype)
            uncond, cond = self.denoiser(shown.repeat(2, 1, 1, 1, 1), t.repeat(2), conditioned).float().chunk(2)
        return uncond + guidance * (cond - uncond)

    def predict_mean(self, x: Tensor, t: Tensor, batch: Latents, guidance: float) -> Tensor:
        """Average the predictions for a case and for its mirror image, where latents can be mirrored exactly.

        Left and right are equally likely in training, so that both are predictions of one mean.
        """
        own, signs = self.predict(x, t, batch, guidance), self.autoencoder.mirror
        if signs is None:
            return own
        mirrored = mirror_image(batch | {"target": x}, signs)
        other = self.predict(mirrored.pop("target"), t, mirrored, guidance)
        return (own + mirror_image({"target": other}, signs)["target"]) / 2

    def samples_at_once(self, latents: Latents) -> int:
        """Return how many samples fit in one batch: a function of the installed memory, not of what is free now.

        A batch of another size may round differently.
        """
        voxels = math.prod(s.stop - s.start for s in self.context(latents))
        each = BYTES_PER_CHANNEL * voxels * self.denoiser.config["base_width"]
        fitting = int(MEMORY_FRACTION * total_memory(self.device) / each)
        return max(1, min(LARGEST_BATCH[self.device.type], fitting))


def _read_spec(config: Mapping[str, Any]) -> LatentSpec:
    """Read the latent specification in a denoiser's config.json and check every value."""
    settings = {**config["settings"]}
    settings["context"] = CONTEXTS.get(settings["context"], settings["context"])
    spec = LatentSpec.parse(settings)
    if len(spec.residual_std) not in (0, config["build"]["out_channels"]):
        raise ConfigError(f"residual_std = {spec.residual_std}: one number above 0 for each latent channel, or none")
    return spec
