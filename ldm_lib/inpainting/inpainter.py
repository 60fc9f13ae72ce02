"""Inpaint a case with a latent diffusion model: encode, sample the latents of the mask, decode, paste.

Voxels outside the mask keep their bits; voxels under the mask are never read. All samples of a case share what does
not depend on their noise, and only the region around the mask is sampled and decoded.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lib.autoencoder.region_decoding import decode_box
from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.model_grid import is_oblique, resampling_to
from ldm_lib.devices import autocast
from ldm_lib.diffusion.latents import Latents, encode_case
from ldm_lib.diffusion.model import CaseNoise, LatentDiffusion
from ldm_lib.diffusion.samplers import Callback, check_sampler
from ldm_lib.errors import InputError
from ldm_lib.geometry import oblique_degrees
from ldm_lib.inpainting.detail import Detail
from ldm_lib.inpainting.options import MEAN, InpaintOptions
from ldm_lib.inpainting.preprocess import CaseGrid
from ldm_lib.inpainting.result import Inpainting
from ldm_lib.inpainting.tissue_maps import add_tissue_map
from ldm_lib.progress import Progress

log = logging.getLogger("ldm_lib")

DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_BLEND_MM, DEFAULT_DETAIL = (
    InpaintOptions.model_fields[name].default for name in ("sampler", "num_inference_steps", "blend_mm", "detail")
)
DETAIL_STEP = -2  # of the noise: sampling starts from that of step -1


@dataclass(frozen=True)
class Inpainter:
    """Inpaint cases with a latent diffusion model.

    Attributes:
        model: autoencoder, denoiser and schedule.
        blend_mm: reach of the intensity correction at the mask's edge, mm; 0 is off.
        detail: scale of the random detail that is finer than the latents of a linear autoencoder hold
            (`inpainting.detail`), times the model's temperature; 0 leaves out its mean, too.

    Examples:
        >>> import ldm_lib as ldm
        >>> inpainter = ldm.Inpainter.load(model)  # a folder; without one, the pretrained weights
        >>> case = ldm.load_case(ldm.find_cases(cohort)[0])
        >>> result = inpainter(case, n_samples=2, seed=0, num_inference_steps=2)
        >>> result.mean.shape == case.voided.shape
        True
    """

    model: LatentDiffusion
    blend_mm: float = DEFAULT_BLEND_MM
    detail: float = DEFAULT_DETAIL

    def __repr__(self) -> str:
        return f"Inpainter({self.model!r}, blend_mm={self.blend_mm:g}, detail={self.detail:g})"

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        blend_mm: float = DEFAULT_BLEND_MM,
        detail: float = DEFAULT_DETAIL,
        temperature: float = 0.0,
    ) -> "Inpainter":
        """Load a model folder; without one, the pretrained weights. A temperature of 0 is the model's own.

        Raises:
            ConfigError: a device, precision, temperature, `blend_mm` or `detail` that is not allowed.
            WeightsError: no model folder, or a damaged one.
        """
        InpaintOptions.of_arguments(n_samples=1, blend_mm=blend_mm, detail=detail, temperature=temperature)
        model = LatentDiffusion.load(folder, device=device, precision=precision, temperature=temperature)
        return cls(model, blend_mm, detail)

    @classmethod
    def for_sampling(cls, folder: str | Path | None, options: InpaintOptions) -> "Inpainter":
        """Load a model folder, or the pretrained weights, with the device, precision and so on of these options."""
        names = ("device", "precision", "blend_mm", "detail", "temperature")
        return cls.load(folder, **{name: getattr(options, name) for name in names})

    def __call__(
        self,
        case: Case | CaseData,
        *,
        n_samples: int = 1,
        seed: int = 0,
        sampler: str = DEFAULT_SAMPLER,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance: float = 1.0,
        make_missing: bool | None = None,
        latents: Latents | None = None,
        callback: Callback | None = None,
    ) -> Inpainting:
        """Inpaint one case `n_samples` times; case, mask, seed and number determine a sample.

        Args:
            case: a case, or one that `load_case` has read; the latter takes the tissue map that is made for it.
            num_inference_steps: denoiser evaluations of a sample.
            guidance: classifier-free guidance scale: 0 unconditional, 1 conditional, above 1 amplified.
            make_missing: make the tissue map of a case that has none; None makes it if the model needs one. Maps are
                kept in the user's cache (`inpainting.tissue_maps`).
            latents: of `encode`, where they are at hand or changed; no map is made then.
            callback: is called after every step, as in `diffusion.samplers`.

        Raises:
            LdmError: a case, parameter or sampler that cannot be used.
        """
        if not isinstance(case, Case | CaseData):
            given = f"needs a case, not {type(case).__name__}"
            raise InputError(given, where="Inpainter", fix="take one of find_cases(folder)")
        sampling = {"sampler": sampler, "num_inference_steps": num_inference_steps, "seed": seed, "guidance": guidance}
        InpaintOptions.of_arguments(n_samples=n_samples, **sampling)
        check_sampler(sampler, num_inference_steps, self.model.schedule)
        if isinstance(case, Case):
            data = self.prepare(load_case(case), make_missing=make_missing)
        else:
            data = case if latents else self._with_map(case, make_missing)
        case_grid, values = self.case_grid(data), []
        latents = latents or self.encode(case_grid)
        names = [sample_name(data, k) for k in range(n_samples)]
        detail = self._detail(case_grid)
        at_once = self.model.samples_at_once(latents) if n_samples > 1 else 1
        with Progress(-(-n_samples // at_once) * num_inference_steps, name="sampling step") as progress:
            sampling["callback"] = _followed(progress, callback)
            for start in range(0, n_samples, at_once):
                batch = names[start : start + at_once]
                for name, latent in zip(batch, self.model.sample(latents, batch, **sampling), strict=True):
                    volume = self._decode(latent, case_grid)
                    if detail:
                        noise = _detail_noise(name, seed, detail.shape, random=num_inference_steps > 1)
                        volume = detail(volume, noise, scale=self.detail * self.model.temperature)
                    values.append(case_grid.values(volume))
        return Inpainting(data, np.stack(values))

    def estimate(self, case: Case | CaseData, *, make_missing: bool | None = None) -> Inpainting:
        """Inpaint one case by the mean of all samples, in one denoiser evaluation at the noisiest step.

        It has the least squared error and is smooth: the volume for measurements and further processing, while a sample
        is one plausible anatomy. Of detail (`inpainting.detail`) it has the mean, which continues that around the mask.
        It starts from the mean of the noise and depends on no seed. It is averaged over the case and its mirror image
        where latents can be mirrored exactly. Arguments are as in `__call__`.

        Source: Vincent 2011 (Neural Computation 23:1661): a denoiser trained by squared error gives E[x_0 | x_t].

        Examples:
            >>> import ldm_lib as ldm
            >>> case = ldm.load_case(ldm.find_cases(cohort)[0])
            >>> result = ldm.Inpainter.load(model).estimate(case)
            >>> len(result.samples), bool((result.mean == case.voided)[~case.mask].all())
            (1, True)
        """
        return self(case, make_missing=make_missing, **MEAN)

    def prepare(self, data: CaseData, *, make_missing: bool | None = None) -> CaseData:
        """Log what is unusual about a case, and add the tissue map that it lacks if the model needs one."""
        trained_mm = self.model.autoencoder.spacing_mm
        warnings = list(data.warnings)
        if data.tissue is None and not self.makes_maps(make_missing) and self.makes_maps(None):
            warnings.append("no tissue map, which this model needs: inpainted without")
        if is_oblique(data):
            degrees = oblique_degrees(data.affine)
            warnings.append(f"oblique by {degrees:.0f} degrees; inpainted on a grid along the axes of the world")
        elif resampling_to(data, trained_mm):
            warnings.append(f"voxels of {data.source.spacing_mm} mm; inpainted at the model's {trained_mm:g} mm")
        for warning in warnings:
            log.warning("%s: %s", data.case.t1n_voided or data.case.t1n, warning)
        return self._with_map(data, make_missing)

    def makes_maps(self, requested: bool | None) -> bool:
        """Return whether missing tissue maps are to be made: as requested, or, by default, if the model needs them."""
        return self.model.spec.context == "initial_estimate" if requested is None else requested

    def encode(self, data: CaseData | CaseGrid) -> Latents:
        """Return the latents, conditioning and latent masks of one case."""
        case_grid, model = data if isinstance(data, CaseGrid) else self.case_grid(data), self.model
        return encode_case(
            case_grid.to_see, model.autoencoder, model.spec, device=model.device, precision=model.precision
        )

    def case_grid(self, data: CaseData) -> CaseGrid:
        """Return what all samples of a case share."""
        autoencoder, corrected = self.model.autoencoder, self.model.spec.bias_field_correction
        return CaseGrid(data, autoencoder.spacing_mm, autoencoder.factor, self.blend_mm, corrected)

    def decode(self, latent: Tensor, data: CaseData) -> np.ndarray:
        """Decode a latent (c x y z) and paste it into the voided image: (x, y, z) in the file's order and units."""
        case_grid = self.case_grid(data)
        return Inpainting(data, case_grid.values(self._decode(latent, case_grid))[None]).mean

    def _with_map(self, data: CaseData, make_missing: bool | None) -> CaseData:
        if data.tissue is not None or not self.makes_maps(make_missing):
            return data
        with Progress(1, name="tissue map") as progress:
            progress.update(0, "registering the atlas")
            with_map = add_tissue_map(data, refine=self.model.spec.refinement, device=self.model.device)
        # The caller's case keeps its map too: it is part of what the result was made from, and of the next call.
        object.__setattr__(data, "tissue", with_map.tissue)
        return with_map

    def _detail(self, case_grid: CaseGrid) -> Detail | None:
        """Measure the detail of a case; None where it is off, or where a network decodes."""
        if not self.detail or self.model.autoencoder.network is not None:
            return None
        detail = Detail.of(case_grid.to_see, self.model.autoencoder)
        if detail is None:
            cause = "no error of the autoencoder was found in the visible voxels around the mask"
            log.warning("%s: no detail is added: %s", case_grid.data.key, cause)
        return detail

    def _decode(self, latent: Tensor, case_grid: CaseGrid) -> np.ndarray:
        """Decode a latent (c x y z) around the mask: (x, y, z) on the model's grid, normalised."""
        autoencoder, margin = self.model.autoencoder, self.model.box_margin
        with torch.inference_mode(), autocast(self.model.device, self.model.precision):
            latent = latent[None].to(self.model.device)
            whole = margin is None
            volume = (
                autoencoder.decode(latent) if whole else decode_box(autoencoder, latent, case_grid.to_decode, margin)
            )
        return volume[0, 0].float().cpu().numpy()


def _detail_noise(name: str, seed: int, shape: Sequence[int], *, random: bool) -> np.ndarray:
    """Draw the noise of a sample's detail; zeros for the mean of all samples."""
    if not random:
        return np.zeros(shape, np.float32)
    return CaseNoise([name], seed, shape, torch.device("cpu"))(DETAIL_STEP)[0].numpy()


def _followed(progress: Progress, callback: Callback | None) -> Callback:
    """Return a callback that shows the progress, and calls the one given."""
    steps = itertools.count(1)

    def follow(state: dict[str, Any]) -> None:
        progress.update(next(steps))
        if callback:
            callback(state)

    return follow


def sample_name(data: CaseData, k: int) -> str:
    """Return the name of the k-th sample of a case; with the seed it determines the noise."""
    return f"{data.mask_digest}/{k}"
