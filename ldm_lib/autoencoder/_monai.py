"""MONAI's networks, at half the price: its import would bring along MLflow and JSON schemas, which no network uses.

Both are optional to MONAI, and it does without what it cannot import; whoever wants them afterwards still gets them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "jsonschema")  # seconds at every start


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Packages that cannot be imported for a while, unless they are there already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _hidden(*UNUSED):
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator, ResNet

__all__ = ["AutoencoderKL", "AutoencoderKlMaisi", "DiffusionModelUNet", "PatchDiscriminator", "ResNet"]
