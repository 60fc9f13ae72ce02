"""A frozen autoencoder and a denoiser that fill holes: encode, sample the hole's cells, decode, paste.

Outside the mask the input comes back bit for bit; voxels under the mask are never read.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lib.adm import ADM
from ldm_lib.autoencoder import Autoencoder
from ldm_lib.cases import Case, CaseData
from ldm_lib.conditioning import model_case
from ldm_lib.devices import autocast, pick_device, pick_precision
from ldm_lib.errors import WeightsError
from ldm_lib.latents import CellSettings, Latents, collate, denoiser_input, encode_case, keep_known, on_device
from ldm_lib.objectives import PREDICTIONS, meaning
from ldm_lib.reconstruction import decode_box
from ldm_lib.runs import outputs_folder, read_record
from ldm_lib.samplers import SAMPLERS
from ldm_lib.schedule import NoiseSchedule, noise_schedule
from ldm_lib.weights import load_model

SAMPLES_AT_ONCE = 4
DEFAULT_SAMPLER = "dpm++2m"  # at 20 steps its spread is right within 2 %; DDIM loses 14 %
AUTOENCODER_FOLDER = "autoencoder"  # inside a model folder


@dataclass(frozen=True)
class Filled:
    """K inpainted volumes of one case, (x, y, z) float32 in the file's order and units.

    Attributes:
        samples: K volumes, equal to the voided image outside the mask.
        mean: of the samples.
        std: per-voxel standard deviation over the samples (ddof 0), 0 outside the mask.
    """

    samples: list[np.ndarray]

    @property
    def mean(self) -> np.ndarray:
        return np.mean(self.samples, axis=0, dtype=np.float64).astype(np.float32)

    @property
    def std(self) -> np.ndarray:
        return np.std(self.samples, axis=0, dtype=np.float64).astype(np.float32)


class CaseNoise:
    """Gaussian noise that depends on (seed, case, sample, step) alone, whatever the batch, order or device."""

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

    @classmethod
    def load(cls, folder: str | Path | None = None, *, device: str = "auto", precision: str = "auto") -> "Inpainter":
        """Load a model folder; without one, the newest finished training under outputs/."""
        folder = Path(folder) if folder else newest_model()
        where = pick_device(device)
        denoiser = load_model(folder, "adm")
        autoencoder = load_model(folder / AUTOENCODER_FOLDER, "autoencoder")
        facts = denoiser.folder_config
        try:
            trained_on, settings = facts["autoencoder_sha256"], CellSettings(**facts["settings"])
            schedule, prediction = noise_schedule(**facts["schedule"]), facts["prediction"]
        except (KeyError, TypeError) as error:
            raise WeightsError(f"its config does not say how it was trained ({error})", where=folder) from error
        if prediction not in PREDICTIONS:
            raise WeightsError(f"predicts {prediction!r}, not one of {', '.join(PREDICTIONS)}", where=folder)
        if trained_on != autoencoder.folder_config["sha256"]:
            raise WeightsError("was trained on latents of another autoencoder", where=folder,
                               fix="copy the whole model folder, its autoencoder included")  # fmt: skip
        how = where, pick_precision(precision, where)
        margin = box_margin(autoencoder)
        return cls(autoencoder.to(where), denoiser.to(where), schedule, settings, *how, prediction, margin)

    def encode(self, data: CaseData) -> Latents:
        """The latents, conditioning and cells of one case."""
        case = replace(model_case(data, self.autoencoder.factor), target=None)
        return encode_case(case, self.autoencoder, self.settings, device=self.device, precision=self.precision)

    def sample(
        self,
        latents: Sequence[Latents],
        names: Sequence[str],
        *,
        seed: int,
        sampler: str,
        steps: int,
        guidance: float = 1.0,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Fill the holes of a batch of encoded cases: (b c x y z) standardised latents on the CPU.

        Args:
            latents: of equal grids.
            names: one per element; with `seed` they determine the sample.
            guidance: scale s of classifier-free guidance, see `predict`.
        """
        batch = on_device(collate(latents), self.device)
        noise = CaseNoise(names, seed, batch["voided"].shape[1:], self.device)

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return meaning(self.prediction, self.schedule, self.predict(x, t, batch, guidance), x, t)

        with torch.inference_mode():
            filled = SAMPLERS[sampler](
                denoise, noise(-1), self.schedule, steps=steps, noise=noise,
                keep=lambda z: keep_known(z, batch), callback=callback,
            )  # fmt: skip
        return filled.cpu()

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
        with torch.inference_mode(), autocast(self.device, self.precision):
            volume = self._decode(latent[None].to(self.device), data)[0, 0].float().cpu().numpy()
        return data.paste(volume, self.autoencoder.factor)

    def _decode(self, latent: Tensor, data: CaseData) -> Tensor:
        if self.box_margin is None:
            return self.autoencoder.decode(latent)
        mask = data.frame(self.autoencoder.factor).to_model(data.mask)
        return decode_box(self.autoencoder, latent, mask, self.box_margin)

    def fill(
        self,
        data: CaseData,
        *,
        samples: int = 1,
        seed: int = 0,
        sampler: str = DEFAULT_SAMPLER,
        steps: int = 10,
        guidance: float = 1.0,
        latents: Latents | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Filled:
        """Inpaint one case K times; `latents` are those of `encode`, when they are at hand or changed."""
        latents, volumes = latents or self.encode(data), []
        names = [sample_name(data.case, k) for k in range(samples)]
        for start in range(0, samples, SAMPLES_AT_ONCE):
            chosen = names[start : start + SAMPLES_AT_ONCE]
            drawn = self.sample(
                [latents] * len(chosen),
                chosen,
                seed=seed,
                sampler=sampler,
                steps=steps,
                guidance=guidance,
                callback=callback,
            )
            volumes += [self.decode(latent, data) for latent in drawn]
        return Filled(volumes)


def box_margin(autoencoder: Autoencoder) -> int | None:
    """The margin with which notebook 02 found box decoding good enough for these weights; None where it did not."""
    return autoencoder.folder_config.get("box_margin")


def sample_name(case: Case, k: int) -> str:
    """Names the k-th sample of a case; with the seed it determines the noise."""
    return f"{case.key}/{k}"


def newest_model() -> Path:
    """The model folder of the training that finished last under outputs/."""
    done = {path: read_record(path)["finished"] for path in outputs_folder().glob("*/04_training/done.json")}
    if not done:
        raise WeightsError("no weights: no finished training", where=outputs_folder().name,
                           fix="name a model folder with --model, or `make run` first")  # fmt: skip
    return max(done, key=done.get).parent / "model"
