"""Validate a training: inpaint fixed cases with fixed noise, and score them in image space."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ldm_lib.data.case import CaseData
from ldm_lib.diffusion.latents import Latents
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.unet import ADM
from ldm_lib.evaluation.metrics import brats_scores
from ldm_lib.images.volume import normalise, write_like, write_map
from ldm_lib.inpainting.inpainter import DEFAULT_SAMPLER, Inpainter, sample_name
from ldm_lib.plots.figures import planes
from ldm_lib.training.objective import loss_by_noise_level
from ldm_lib.training.options import TrainingOptions

LEVELS = 5  # noise levels of `val_noise_loss`
PANEL_DPI = 60
BY_LEVEL = "val_noise_loss_t"  # prefix of the metrics of single levels


class Validation:
    """Score fixed cases that have a target, by their encodings in the same order; write samples/ and panels/."""

    def __init__(
        self, cases: Sequence[CaseData], latents: Sequence[Latents], config: TrainingOptions, folder: Path
    ) -> None:
        self.cases, self.latents, self.config, self.folder = list(cases), list(latents), config, folder

    def scores(
        self, model: LatentDiffusion, raw: ADM, *, epoch: int, mine: slice, alive: Callable[[], None]
    ) -> dict[int, dict[str, float]]:
        """Return the metrics of each case of this process, `mine`, by its number; call `alive` before each.

        Args:
            model: with the averaged weights.
            raw: the denoiser that is optimised, for comparison.
        """
        found = {}
        for k in range(len(self.cases))[mine]:
            alive()
            found[k] = self._score(k, model, epoch) | self._noise_losses(k, model, raw)
        return found

    def _score(self, k: int, model: LatentDiffusion, epoch: int) -> dict[str, float]:
        data = self.cases[k]
        sampling = {"sampler": DEFAULT_SAMPLER, "num_inference_steps": self.config.num_inference_steps}
        sampled = model.sample(self.latents[k], [sample_name(data, 0)], seed=self.config.seed, **sampling)
        inpainted = Inpainter(model).decode(sampled[0], data)
        error = normalise(inpainted, data.scale) - normalise(data.target, data.scale)
        scores = brats_scores(inpainted, data.target, data.voided, data.scored, where=data.case.key)
        self._write_sample(data, inpainted, epoch)
        if k == 0:
            self._draw(data, inpainted, epoch)
        return {"val_loss": float(np.mean(error**2)), "val_psnr": scores["psnr_01"], "val_ssim": scores["ssim"]}

    def _noise_losses(self, k: int, model: LatentDiffusion, raw: ADM) -> dict[str, float]:
        """Return the noise loss at fixed t and noise, with the averaged weights and the raw ones."""
        networks = {"ema": model.denoiser, "raw": raw}
        levels = loss_by_noise_level(networks, [self.latents[k]], model, seed=0, levels=LEVELS, ends=False)
        means = {name: float(np.mean([row[name] for row in levels])) for name in networks}
        by_level = {f"{BY_LEVEL}{row['t']}": row["ema"] for row in levels}
        return {"val_noise_loss": means["ema"], "val_noise_loss_raw": means["raw"], **by_level}

    def _write_sample(self, data: CaseData, inpainted: np.ndarray, epoch: int) -> None:
        every = self.config.save_samples_every
        if not every or epoch % every >= self.config.val_every:
            return
        folder = self.folder / "samples" / f"epoch_{epoch:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{data.case.id}_{data.case.index or 'mask'}"
        write_like(folder / f"{stem}_inpainted.nii.gz", data.source, inpainted, data.mask)
        write_map(folder / f"{stem}_target.nii.gz", data.target, data.source.affine)

    def _draw(self, data: CaseData, inpainted: np.ndarray, epoch: int) -> None:
        """Draw a picture of the first case, which nothing in it names."""
        views = {"voided": data.voided, f"epoch {epoch}": inpainted, "target": data.target}
        views = {name: data.lps(view) for name, view in views.items()}
        figure = planes(views, spacing_mm=data.lps_spacing_mm, mask=data.lps(data.mask), title=f"epoch {epoch}")
        path = panel_path(self.folder, epoch)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=PANEL_DPI, facecolor=figure.get_facecolor())


def panel_path(folder: Path, epoch: int) -> Path:
    """Return the path of the picture of the first case after an epoch."""
    return folder / "panels" / f"epoch_{epoch:03d}.png"


def mean_of_cases(rows: dict[int, dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over cases, summed in their order whichever process scored them."""
    names = rows[min(rows)]
    return {name: float(np.mean([rows[k][name] for k in sorted(rows)])) for name in names}
