"""One case between its file's voxels and a model's: what the model sees of it, and what of an answer fills the hole.

file (x y z) => the model's voxel size, padded LPS => latents ... decoded volume => values of the hole's voxels
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ldm_lib.data.case import CaseData
from ldm_lib.data.model_grid import GridCase, grid_case
from ldm_lib.data.resampling import Resampling, resampled, resampling
from ldm_lib.data.volume import normalise
from ldm_lib.geometry import Frame
from ldm_lib.inpainting.edge_blending import EdgeCorrection, rim


@dataclass(frozen=True)
class CaseGrid:
    """What all samples of one case share.

    Attributes:
        data: the case.
        spacing_mm: the model's voxel size.
        multiple: voxels per latent cell and axis.
        blend_mm: how far the hole's edge is made to fit (`blending`), 0: not at all. Voxels of unequal edges count as
            cubes of their volume.
    """

    data: CaseData
    spacing_mm: float
    multiple: int
    blend_mm: float

    @cached_property
    def to_see(self) -> GridCase:
        """The case as the network sees it, without its truth."""
        return replace(grid_case(self._there, self.multiple), target=None)

    @cached_property
    def to_decode(self) -> np.ndarray:
        """(x, y, z) bool on the model's grid: the voxels that are needed, those of the hole and of its rim."""
        return self._frame.to_model(rim(self._there.mask))

    def values(self, volume: np.ndarray) -> np.ndarray:
        """(n,) what fills the n voxels of the hole, in the file's units and from 0 up.

        Args:
            volume: (x, y, z) normalised, on the model's grid, decoded at least where `to_decode` says.
        """
        hole, decoded = self.data.mask, self._at_home(self._frame.to_file(volume))
        values = decoded[hole]
        if self._edge:
            values = values + self._edge(decoded, normalise(self.data.voided, self.data.scale))
        return np.maximum(values, 0) * np.float32(self.data.scale)

    def _at_home(self, volume: np.ndarray) -> np.ndarray:
        """A volume in the model's voxels -> in the file's, in the hole and its rim at least."""
        if self._way is None:
            return volume
        known = normalise(self._there.voided, self.data.scale)
        wanted, home = rim(self.data.mask), np.zeros(self.data.mask.shape, np.float32)
        home[wanted] = self._way.back(np.where(rim(self._there.mask), volume, known), np.argwhere(wanted))
        return home

    @cached_property
    def _way(self) -> Resampling | None:
        return resampling(self.data, self.spacing_mm)

    @cached_property
    def _there(self) -> CaseData:
        return resampled(self.data, self._way)

    @cached_property
    def _frame(self) -> Frame:
        return self._there.frame(self.multiple)

    @cached_property
    def _edge(self) -> EdgeCorrection | None:
        if not self.blend_mm:
            return None
        return EdgeCorrection(self.data.mask, reach_vox=self.blend_mm / self.data.cube_mm)


@dataclass(frozen=True)
class Inpainting:
    """K inpainted volumes of one case, kept as what differs between them; volumes are in the file's order and units.

    Attributes:
        voided: (x, y, z) float32.
        mask: (x, y, z) bool.
        values: (K, n) float32, what each sample holds at the n voxels of the mask.
    """

    voided: np.ndarray
    mask: np.ndarray
    values: np.ndarray

    def sample(self, k: int) -> np.ndarray:
        """The k-th sample (x, y, z), equal to the voided image outside the mask."""
        return self._pasted(self.values[k])

    @property
    def mean(self) -> np.ndarray:
        """Of the samples, (x, y, z)."""
        return self._pasted(self.values.mean(axis=0, dtype=np.float64))

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each voxel over the samples (ddof 0), (x, y, z), 0 outside the mask."""
        spread = np.zeros_like(self.voided)
        spread[self.mask] = self.values.std(axis=0, dtype=np.float64)
        return spread

    @property
    def nearest(self) -> np.ndarray:
        """The sample with the smallest mean squared distance to the mean: the most typical that is no average."""
        apart = self.values - self.values.mean(axis=0, dtype=np.float64)
        return self._pasted(self.values[np.argmin(np.square(apart).sum(axis=1))])

    def _pasted(self, values: np.ndarray) -> np.ndarray:
        volume = self.voided.copy()
        volume[self.mask] = values
        return volume
