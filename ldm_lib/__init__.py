"""Fill holes in 3D brain MRI with conditioned latent diffusion.

The public entry points are `ldm_lib.inpaint` and `ldm_lib.metrics.brats_scores`. Sub-modules are imported on
first use: torch, MONAI and Lightning cost seconds, and most commands need none of them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.8.0"
__all__ = ["inpaint"]


def __getattr__(name: str) -> Any:
    if name == "inpaint":
        return import_module("ldm_lib.inpainting.single_file").inpaint
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return import_module(f"ldm_lib.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"ldm_lib.{name}":
            raise
        raise AttributeError(f"module 'ldm_lib' has no attribute {name!r}") from None
