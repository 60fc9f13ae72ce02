"""Inpainters with another denoiser, temperature or crop."""

from dataclasses import replace


def changed(inpainter, **changes):
    """The inpainter with these fields of its model changed."""
    return replace(inpainter, model=replace(inpainter.model, **changes))
