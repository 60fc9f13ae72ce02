"""Inpaint a case with a latent diffusion model: encode, sample the latents of the mask, decode, paste.

Voxels outside the mask come back bit for bit; voxels under the mask are never read. All samples of a case share what
does not depend on their noise, and only the region around the mask is sampled and decoded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_lib.autoencoder.region_decoding import decode_box
from ldm_lib.data.case import Case, CaseData
from ldm_lib.devices import autocast
from ldm_lib.diffusion.latents import Latents, encode_case
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.samplers import Callback
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.preprocess import CaseGrid, Inpainting

DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_BLEND_MM = (
    InpaintOptions.model_fields[name].default for name in ("sampler", "num_inference_steps", "blend_mm")
)


@dataclass(frozen=True)
class Inpainter:
    """Inpaint cases with a latent diffusion model.

    Attributes:
        model: autoencoder, denoiser and schedule.
        blend_mm: reach of the intensity correction at the mask's edge, mm; 0 is off.
    """

    model: LatentDiffusion
    blend_mm: float = DEFAULT_BLEND_MM

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
        """Load a model folder; without one, the pretrained weights. A temperature of 0 is the model's own."""
        model = LatentDiffusion.load(folder, device=device, precision=precision, temperature=temperature)
        return cls(model, blend_mm)

    @classmethod
    def for_sampling(cls, folder: str | Path | None, options: InpaintOptions) -> "Inpainter":
        """Load a model folder, or the pretrained weights, with the device, precision and so on of these options."""
        names = ("device", "precision", "blend_mm", "temperature")
        return cls.load(folder, **{name: getattr(options, name) for name in names})

    def makes_maps(self, requested: bool | None) -> bool:
        """Return whether missing tissue maps are to be made: as requested, or, by default, if the model needs them."""
        return self.model.spec.context == "initial_estimate" if requested is None else requested

    def encode(self, data: CaseData) -> Latents:
        """Return the latents, conditioning and latent masks of one case."""
        return self._encode(self.case_grid(data))

    def case_grid(self, data: CaseData) -> CaseGrid:
        """Return what all samples of a case share."""
        return CaseGrid(data, self.model.autoencoder.spacing_mm, self.model.autoencoder.factor, self.blend_mm)

    def decode(self, latent: Tensor, data: CaseData) -> np.ndarray:
        """Decode a latent (c x y z) and paste it into the voided image: (x, y, z) in the file's order and units."""
        return Inpainting(data.voided, data.mask, self._values(latent, self.case_grid(data))[None]).sample(0)

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
    ) -> Inpainting:
        """Inpaint one case K times; `latents` are those of `encode`, when they are at hand or changed."""
        case_grid, values = self.case_grid(data), []
        latents = latents or self._encode(case_grid)
        names = [sample_name(data.case, k) for k in range(samples)]
        how = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance, "callback": callback}
        at_once = self.model.samples_at_once(latents) if samples > 1 else 1
        for start in range(0, samples, at_once):
            drawn = self.model.sample(latents, names[start : start + at_once], **how)
            values += [self._values(latent, case_grid) for latent in drawn]
        return Inpainting(data.voided, data.mask, np.stack(values))

    def _encode(self, case_grid: CaseGrid) -> Latents:
        where = {"device": self.model.device, "precision": self.model.precision}
        return encode_case(case_grid.to_see, self.model.autoencoder, self.model.spec, **where)

    def _values(self, latent: Tensor, case_grid: CaseGrid) -> np.ndarray:
        """What a latent (c x y z) holds at the n voxels of the mask: (n,)."""
        with torch.inference_mode(), autocast(self.model.device, self.model.precision):
            volume = self._decode(latent[None].to(self.model.device), case_grid.to_decode)
        return case_grid.values(volume[0, 0].float().cpu().numpy())

    def _decode(self, latent: Tensor, mask: np.ndarray) -> Tensor:
        if self.model.box_margin is None:
            return self.model.autoencoder.decode(latent)
        return decode_box(self.model.autoencoder, latent, mask, self.model.box_margin)


def sample_name(case: Case, k: int) -> str:
    """Return the name of the k-th sample of a case; with the seed it determines the noise."""
    return f"{case.key}/{k}"
