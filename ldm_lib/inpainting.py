"""Volume in, volume out: encode, sample the hole's cells, decode, paste.

Outside the mask the input comes back bit for bit; voxels under the mask are never read.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lib.adm import ADM
from ldm_lib.autoencoder import Autoencoder
from ldm_lib.cases import Case, CaseData, load_case
from ldm_lib.conditioning import model_case
from ldm_lib.devices import autocast, pick_device, pick_precision
from ldm_lib.errors import ConfigError, InputError, WeightsError
from ldm_lib.latents import CellSettings, Latents, collate, denoiser_input, encode_case, keep_known
from ldm_lib.nifti import require_writable, stem
from ldm_lib.reconstruction import decode_box
from ldm_lib.runs import outputs_folder, read_record
from ldm_lib.samplers import SAMPLERS
from ldm_lib.schedule import NoiseSchedule, linear_schedule
from ldm_lib.volumes import write_like, write_map
from ldm_lib.weights import load_model

log = logging.getLogger("ldm_lib")

SAMPLES_AT_ONCE = 4
DEFAULT_SAMPLER = "dpm++2m"  # at 20 steps its spread is right within 2 %; DDIM loses 14 %
PREDICTIONS = ("noise", "velocity")
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
            schedule, prediction = linear_schedule(**facts["schedule"]), facts["prediction"]
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
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """Fill the holes of a batch of encoded cases: (b c x y z) standardised latents on the CPU.

        Args:
            latents: of equal grids.
            names: one per element; with `seed` they determine the sample.
        """
        batch = {name: value.to(self.device) for name, value in collate(latents).items()}
        noise = CaseNoise(names, seed, batch["voided"].shape[1:], self.device)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with autocast(self.device, self.precision):
                output = self.denoiser(denoiser_input(x, batch, self.settings), t).float()
            return self.as_noise(output, x, t)

        with torch.inference_mode():
            filled = SAMPLERS[sampler](
                denoise, noise(-1), self.schedule, steps=steps, noise=noise,
                keep=lambda z: keep_known(z, batch), callback=callback,
            )  # fmt: skip
        return filled.cpu()

    def as_noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that the denoiser's output means: itself, or by way of the velocity."""
        return output if self.prediction == "noise" else self.schedule.noise_from_velocity(x, output, t)

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
        steps: int = 20,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Filled:
        """Inpaint one case K times."""
        latents, volumes = self.encode(data), []
        names = [sample_name(data.case, k) for k in range(samples)]
        for start in range(0, samples, SAMPLES_AT_ONCE):
            chosen = names[start : start + SAMPLES_AT_ONCE]
            drawn = self.sample(
                [latents] * len(chosen), chosen, seed=seed, sampler=sampler, steps=steps, callback=callback
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


def result_paths(output: Path, samples: int, *, each: bool) -> dict[str, Path]:
    """What a result consists of -> its file: the volume, the spread of several samples and, if asked, each sample."""
    names = (["std"] if samples > 1 else []) + [f"sample-{k:04d}" for k in range(samples if each else 0)]
    first = stem(output)
    ending = output.name[len(first) :]
    return {"": output} | {name: output.with_name(f"{first}-{name}{ending}") for name in names}


def write_filled(filled: Filled, data: CaseData, output: Path, *, samples: bool = False) -> list[Path]:
    """Write the result: one sample as it is; of several the mean, their standard deviation and, if asked, each.

    The standard deviation is float32 in source units at `<output>-std`, the samples at `<output>-sample-000k`.
    """
    paths = result_paths(output, len(filled.samples), each=samples)
    volumes = {"": filled.samples[0] if len(filled.samples) == 1 else filled.mean}
    volumes |= {f"sample-{k:04d}": volume for k, volume in enumerate(filled.samples)}
    return [
        write_map(path, filled.std, data.source.affine)
        if name == "std"
        else write_like(path, data.source, volumes[name], data.mask)
        for name, path in paths.items()
    ]


def inpaint(
    t1n_voided: str | Path,
    mask: str | Path,
    output: str | Path,
    *,
    growth: str | Path | None = None,
    tissue: str | Path | None = None,
    model: str | Path | None = None,
    sampler: str = DEFAULT_SAMPLER,
    steps: int = 20,
    samples: int = 1,
    write_samples: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> list[Path]:
    """Fill the hole of one file and write the result in the file's own grid, header and dtype.

    Args:
        t1n_voided: 3D T1n; voided here, with a warning, if it is not void under the mask.
        mask: binary, on the same grid, 1 = fill this.
        output: .nii or .nii.gz; the mean when samples > 1, then `<output>-std` is written beside it.
        growth: tumour-cell concentration in [0, 1]; none means zero, healthy tissue.
        tissue: labels 1 CSF, 2 GM, 3 WM; none means unknown.
        model: folder with weights; none takes the newest finished training.

    Returns:
        the files written.

    Raises:
        LdmError: an input, parameter, model or output path that cannot be used; nothing is written then.
    """
    case = case_of_files(t1n_voided, mask, growth=growth, tissue=tissue)
    if sampler not in SAMPLERS or steps < 1 or samples < 1 or seed < 0:
        raise ConfigError(
            f"sampler {sampler!r}, steps {steps}, samples {samples}, seed {seed}",
            fix=f"take a sampler of {', '.join(SAMPLERS)}, steps and samples from 1, a seed from 0",
        )
    for path in result_paths(Path(output), samples, each=write_samples).values():
        require_writable(path)
        if path.resolve() in {given.resolve() for given in case.files().values()}:
            raise InputError("is one of the inputs", where=path, fix="name another output")
    data = load_case(case)
    for warning in data.warnings:
        log.warning("%s: %s", data.case.t1n_voided, warning)
    inpainter = Inpainter.load(model, device=device)
    if max(abs(s - inpainter.autoencoder.spacing_mm) for s in data.source.spacing_mm) > 0.05:
        log.warning("%s: voxels of %s mm, the model was trained at %g mm", data.case.t1n_voided,
                    data.source.spacing_mm, inpainter.autoencoder.spacing_mm)  # fmt: skip
    filled = inpainter.fill(data, samples=samples, seed=seed, sampler=sampler, steps=steps)
    return write_filled(filled, data, Path(output), samples=write_samples)


def case_of_files(
    t1n_voided: str | Path, mask: str | Path, *, growth: str | Path | None = None, tissue: str | Path | None = None
) -> Case:
    """A case made of named files, its id taken from the image's name as the layouts write it."""
    identity, _, index = stem(Path(t1n_voided)).partition("-t1n-voided")
    return Case(
        id=identity, patient=identity, index=index.lstrip("-"), t1n=None, t1n_voided=Path(t1n_voided), mask=Path(mask),
        mask_healthy=None, mask_unhealthy=None, growth=growth and Path(growth), tissue=tissue and Path(tissue),
    )  # fmt: skip
