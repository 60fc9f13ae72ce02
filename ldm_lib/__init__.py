"""Inpaint 3D brain MRI with conditioned latent diffusion: `import ldm_lib as ldm`.

The names of `__all__` are the public interface. They are imported when they are first used: torch, MONAI and Lightning
take seconds to load, and most commands need none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm_lib.version import __version__ as __version__

if TYPE_CHECKING:
    from ldm_lib.anatomy.tumour_growth import grow_tumour as grow_tumour
    from ldm_lib.autoencoder.model import Autoencoder as Autoencoder
    from ldm_lib.autoencoder.options import AutoencoderTrainingOptions as AutoencoderTrainingOptions
    from ldm_lib.autoencoder.training import train_autoencoder as train_autoencoder
    from ldm_lib.data.case import load_case as load_case
    from ldm_lib.data.cohort import audit as audit
    from ldm_lib.data.cohort import find_cases as find_cases
    from ldm_lib.data.conditioning_maps import add_conditioning_maps as add_conditioning_maps
    from ldm_lib.data.scan_cohort import make_scan_cohort as make_scan_cohort
    from ldm_lib.data.synthetic_cohort import make_synthetic_cohort as make_synthetic_cohort
    from ldm_lib.diffusion.model import LatentDiffusion as LatentDiffusion
    from ldm_lib.evaluation.case_scores import brats_metrics as brats_metrics
    from ldm_lib.evaluation.evaluate import evaluate as evaluate
    from ldm_lib.evaluation.summary import summarise as summarise
    from ldm_lib.experiment.runner import run as run
    from ldm_lib.experiment.stage import open_stage as open_stage
    from ldm_lib.images.options import ReadOptions as ReadOptions
    from ldm_lib.inpainting.inpainter import Inpainter as Inpainter
    from ldm_lib.inpainting.result import Inpainting as Inpainting
    from ldm_lib.inpainting.single_file import inpaint as inpaint
    from ldm_lib.plots.case_plots import plot as plot
    from ldm_lib.plots.case_plots import view as view
    from ldm_lib.training.options import TrainingOptions as TrainingOptions
    from ldm_lib.training.train import train_denoiser as train_denoiser


_MODULES = {  # name -> where it is defined
    "find_cases": "data.cohort",
    "load_case": "data.case",
    "audit": "data.cohort",
    "make_synthetic_cohort": "data.synthetic_cohort",
    "make_scan_cohort": "data.scan_cohort",
    "add_conditioning_maps": "data.conditioning_maps",
    "grow_tumour": "anatomy.tumour_growth",
    "Autoencoder": "autoencoder.model",
    "train_autoencoder": "autoencoder.training",
    "LatentDiffusion": "diffusion.model",
    "train_denoiser": "training.train",
    "Inpainter": "inpainting.inpainter",
    "Inpainting": "inpainting.result",
    "inpaint": "inpainting.single_file",
    "evaluate": "evaluation.evaluate",
    "summarise": "evaluation.summary",
    "brats_metrics": "evaluation.case_scores",
    "plot": "plots.case_plots",
    "view": "plots.case_plots",
    "open_stage": "experiment.stage",
    "run": "experiment.runner",
    "ReadOptions": "images.options",
    "AutoencoderTrainingOptions": "autoencoder.options",
    "TrainingOptions": "training.options",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*_MODULES, "__version__"])
