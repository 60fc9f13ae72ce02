"""Packages that stand in for optional ones in fast tests, with the interface that the library uses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

DEEPBET = """
import nibabel as nib
import numpy as np


class BrainExtraction:
    def __init__(self, no_gpu=False):
        assert no_gpu

    def run(self, image):
        voxels = image.get_fdata(dtype=np.float32)
        brain = (voxels > 0) & (voxels == np.rint(voxels))
        assert brain.any(), "Not enough foreground to calculate bounding box"
        return image, nib.Nifti1Image(brain.astype(np.uint8), image.affine), 0.001 * brain.sum()
"""


@contextmanager
def deepbet_stand_in(folder: Path) -> Iterator[None]:
    """Install a deepbet into a folder for which every whole number above 0 is a voxel of the brain."""
    from ldm_lib.images.skull_strip import _network

    metadata = "Metadata-Version: 2.1\nName: deepbet\nVersion: 9.0\n"
    for name, text in (("deepbet-9.0.dist-info/METADATA", metadata), ("deepbet/__init__.py", DEEPBET)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    names = [name for name in sys.modules if name.partition(".")[0] == "deepbet"]
    real = {name: sys.modules.pop(name) for name in names}
    _network.cache_clear()
    try:
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            yield
    finally:
        _network.cache_clear()
        sys.modules.pop("deepbet", None)
        sys.modules.update(real)
