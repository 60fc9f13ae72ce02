"""Import the parts of MONAI that this library uses, without MLflow and JSON schemas, which no network needs.

Both are optional to MONAI; hiding them while it is imported saves about two of seven seconds at every start. They can
be imported as usual afterwards.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "jsonschema")


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Make packages unavailable for a while, unless they are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _hidden(*UNUSED):
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

__all__ = ["AutoencoderKL", "AutoencoderKlMaisi", "DiffusionModelUNet"]
