"""A frozen autoencoder and a denoiser that fill holes: encode, sample the hole's cells, decode, paste.

Outside the mask the input comes back bit for bit; voxels under the mask are never read. All samples of a case share
what does not depend on their noise, and only the cells around the hole are sampled and decoded.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lib.adm import ADM
from ldm_lib.autoencoder import Autoencoder
from ldm_lib.canvas import Canvas, Filled
from ldm_lib.cases import Case, CaseData
from ldm_lib.config import (
    AUTOENCODER_FOLDER,
    SHIPPED,
    AutoencoderConfig,
    ConditioningConfig,
    SamplingConfig,
    TrainingConfig,
)
from ldm_lib.devices import autocast, pick_device, pick_precision, total_memory
from ldm_lib.errors import ConfigError, WeightsError
from ldm_lib.latents import (
    CellSettings,
    Latents,
    context_box,
    denoiser_input,
    encode_case,
    generated,
    keep_known,
    on_device,
)
from ldm_lib.objectives import meaning
from ldm_lib.parameters import validated
from ldm_lib.reconstruction import decode_box
from ldm_lib.samplers import SAMPLERS, Callback
from ldm_lib.schedule import NoiseSchedule, noise_schedule
from ldm_lib.weights import load_model, require_pair

DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_BLEND_MM = (
    SamplingConfig.model_fields[name].default for name in ("sampler", "num_inference_steps", "blend_mm")
)
BYTES_AT_WORK = 400  # of a denoiser, a cell and channel of its first level: 70 to 190 measured, twice that when guided
MEMORY_SHARE = 0.25  # of all memory, for the denoiser at work on a batch
MOST_AT_ONCE = {"cpu": 4, "cuda": 32}
PARAMETERS = {"steps": "diffusion_steps", "shift": "schedule_shift"}  # what a model's schedule calls otherwise


class CaseNoise:
    """Gaussian noise that depends on (seed, name, step) alone, whatever the batch, order or device."""

    def __init__(self, names: Sequence[str], seed: int, shape: Sequence[int], device: torch.device) -> None:
        self.names, self.seed, self.shape, self.device = list(names), seed, tuple(shape), device

    def __call__(self, step: int) -> Tensor:
        """(b c x y z) standard normal; step -1 is where sampling starts."""
        return torch.stack([self._draw(f"{self.seed}/{name}/{step}") for name in self.names]).to(self.device)

    def _draw(self, text: str) -> Tensor:
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(number))


@dataclass(frozen=True)
class Inpainter:
    """A frozen autoencoder and a denoiser, with all that decides how they are used."""

    autoencoder: Autoencoder
    denoiser: ADM
    schedule: NoiseSchedule
    settings: CellSettings
    device: torch.device
    precision: str
    prediction: str = "noise"
    box_margin: int | None = None  # cells decoded around the hole's box; None decodes the whole volume
    crop: int = 0  # edge of the latents it was trained on, cells; 0: whole ones
    blend_mm: float = DEFAULT_BLEND_MM
    temperature: float = 1.0  # of the noise that sampling starts from, over that of training

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        blend_mm: float = DEFAULT_BLEND_MM,
        temperature: float = 0.0,
    ) -> "Inpainter":
        """Load a model folder; without one, the shipped weights. A temperature of 0 is the model's own."""
        folder = Path(folder) if folder else SHIPPED
        where = pick_device(device)
        denoiser = load_model(folder, "adm")
        autoencoder = load_model(folder / AUTOENCODER_FOLDER, "autoencoder")
        facts = denoiser.folder_config
        try:
            settings, training = _trained_with(facts)
            margin = box_margin(autoencoder)
            own = validated(SamplingConfig, {"temperature": facts.get("temperature", 0.0)}).temperature or 1.0
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as error:
            told = error.cause if isinstance(error, ConfigError) else error
            raise WeightsError(f"its config does not say how it was trained ({told})", where=folder,
                               fix="copy the model folder again") from error  # fmt: skip
        require_pair(denoiser, autoencoder, where=folder)
        how = where, pick_precision(precision, where), training.prediction, margin, training.latent_crop
        networks = autoencoder.to(where), denoiser.to(where)
        return cls(*networks, noise_schedule(**training.process), settings, *how, blend_mm, temperature or own)

    @classmethod
    def for_sampling(cls, folder: str | Path | None, config: SamplingConfig) -> "Inpainter":
        """Load a model folder, or the shipped weights, as the parameters of stage 05 ask for."""
        asked = ("device", "precision", "blend_mm", "temperature")
        return cls.load(folder, **{name: getattr(config, name) for name in asked})

    def makes_maps(self, asked: bool | None) -> bool:
        """Whether tissue maps that cases lack are to be made from their scans: as asked, or if the model needs them."""
        return self.settings.context == "draft" if asked is None else asked

    def encode(self, data: CaseData) -> Latents:
        """The latents, conditioning and cells of one case."""
        return self._encode(self.canvas(data))

    def canvas(self, data: CaseData) -> Canvas:
        """What all samples of a case share."""
        return Canvas(data, self.autoencoder.spacing_mm, self.autoencoder.factor, self.blend_mm)

    def sample(
        self,
        latents: Latents,
        names: Sequence[str],
        *,
        seed: int,
        sampler: str,
        steps: int,
        guidance: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Fill the hole of one encoded case, once for each name: (b c x y z) standardised latents on the CPU.

        Args:
            latents: of `encode`.
            names: with `seed` they determine the samples.
            guidance: scale s of classifier-free guidance, see `predict`.
            callback: as in `samplers`, told of whole latents.
        """
        whole, box = latents["voided"], (..., *self.context(latents))
        batch = on_device({name: cells[box].expand(len(names), -1, -1, -1, -1) for name, cells in latents.items()},
                          self.device)  # fmt: skip
        everywhere = CaseNoise(names, seed, whole.shape, self.device)

        def noise(step: int) -> Tensor:
            return everywhere(step)[box]

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return meaning(self.prediction, self.schedule, self.predict(x, t, batch, guidance), x, t)

        def placed(x: Tensor) -> Tensor:
            filled = whole.expand(len(names), -1, -1, -1, -1).clone()
            filled[box] = x.to(filled)
            return generated(filled, latents, self.settings)

        def tell(state: dict[str, Any]) -> None:
            callback(state | {name: placed(state[name]) for name in ("x", "x0")})

        with torch.inference_mode():
            return placed(SAMPLERS[sampler](
                denoise, self.temperature * noise(-1), self.schedule, steps=steps, noise=noise,
                keep=lambda z: keep_known(z, batch), callback=tell if callback else None,
            ))  # fmt: skip

    def context(self, latents: Latents) -> tuple[slice, ...]:
        """The cells that the denoiser is shown, as it was in training: around the hole, or all of them."""
        hole = latents["hole"][0].numpy() > 0
        if not self.crop:
            return tuple(slice(0, n) for n in hole.shape)
        return context_box(hole, edge=self.crop, multiple=self.denoiser.multiple)

    def predict(self, x: Tensor, t: Tensor, batch: Latents, guidance: float) -> Tensor:
        """The denoiser's output, guided: untold + s (told - untold), with 1 and 0 in one call instead of two.

        Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with s = 1 + w. At one x_t all answers are linear in the
        noise, so that any may be extrapolated.
        """
        shown = denoiser_input(x, batch, self.settings)
        with autocast(self.device, self.precision):
            if guidance in (0.0, 1.0):
                told = None if guidance else torch.zeros(len(t), device=self.device)
                return self.denoiser(shown, t, told).float()
            told = torch.arange(2, device=self.device).repeat_interleave(len(t)).to(shown.dtype)
            untold, with_all = self.denoiser(shown.repeat(2, 1, 1, 1, 1), t.repeat(2), told).float().chunk(2)
        return untold + guidance * (with_all - untold)

    def decode(self, latent: Tensor, data: CaseData) -> np.ndarray:
        """(c x y z) latent -> (x, y, z) in the file's order and units, pasted into the voided image."""
        return Filled(data.voided, data.mask, self._values(latent, self.canvas(data))[None]).sample(0)

    def fill(
        self,
        data: CaseData,
        *,
        samples: int = 1,
        seed: int = 0,
        sampler: str = DEFAULT_SAMPLER,
        steps: int = DEFAULT_STEPS,
        guidance: float = 1.0,
        latents: Latents | None = None,
        callback: Callback | None = None,
    ) -> Filled:
        """Inpaint one case K times; `latents` are those of `encode`, when they are at hand or changed."""
        canvas, values = self.canvas(data), []
        latents = latents or self._encode(canvas)
        names = [sample_name(data.case, k) for k in range(samples)]
        how = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance, "callback": callback}
        at_once = self.samples_at_once(latents) if samples > 1 else 1
        for start in range(0, samples, at_once):
            drawn = self.sample(latents, names[start : start + at_once], **how)
            values += [self._values(latent, canvas) for latent in drawn]
        return Filled(data.voided, data.mask, np.stack(values))

    def samples_at_once(self, latents: Latents) -> int:
        """How many samples are drawn in one batch: as many as a part of the memory holds, whatever else is in it now.

        It must not depend on what is free at the moment: a batch of another size may round differently.
        """
        cells = math.prod(s.stop - s.start for s in self.context(latents))
        each = BYTES_AT_WORK * cells * self.denoiser.config["base_width"]
        fitting = int(MEMORY_SHARE * total_memory(self.device) / each)
        return max(1, min(MOST_AT_ONCE[self.device.type], fitting))

    def _encode(self, canvas: Canvas) -> Latents:
        how = {"device": self.device, "precision": self.precision}
        return encode_case(canvas.to_see, self.autoencoder, self.settings, **how)

    def _values(self, latent: Tensor, canvas: Canvas) -> np.ndarray:
        """(n,) what a latent (c x y z) holds at the voxels of the hole."""
        with torch.inference_mode(), autocast(self.device, self.precision):
            volume = self._decode(latent[None].to(self.device), canvas.to_decode)
        return canvas.values(volume[0, 0].float().cpu().numpy())

    def _decode(self, latent: Tensor, mask: np.ndarray) -> Tensor:
        if self.box_margin is None:
            return self.autoencoder.decode(latent)
        return decode_box(self.autoencoder, latent, mask, self.box_margin)


def box_margin(autoencoder: Autoencoder) -> int | None:
    """The margin with which notebook 02 found box decoding good enough for these weights; None where it did not."""
    margin = autoencoder.folder_config.get("box_margin")
    return None if margin is None else validated(AutoencoderConfig, {"box_margin": margin}).box_margin


def _trained_with(facts: Mapping[str, Any]) -> tuple[CellSettings, TrainingConfig]:
    """How a model's config says that it was trained, every value within its parameter's range."""
    given = {**facts["settings"]}
    scale = tuple(0.0 + std for std in given.pop("residual_std", ()))  # not float(std): text is no number here
    if not all(0 < std < math.inf for std in scale) or len(scale) not in (0, facts["build"]["out_channels"]):
        raise ConfigError(f"residual_std = {scale}: one number above 0 for each latent channel, or none")
    cells = validated(ConditioningConfig, given)
    process = {PARAMETERS.get(name, name): value for name, value in facts["schedule"].items()}
    told = {"prediction": facts["prediction"], "latent_crop": facts.get("latent_crop", 0), "num_inference_steps": 1}
    plain = {field.name: getattr(cells, field.name) for field in fields(CellSettings) if field.name != "residual_std"}
    settings = CellSettings(**plain, residual_std=scale)
    return settings, validated(TrainingConfig, process | told)


def sample_name(case: Case, k: int) -> str:
    """Names the k-th sample of a case; with the seed it determines the noise."""
    return f"{case.key}/{k}"
