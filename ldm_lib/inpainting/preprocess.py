"""Bring a case to the model's grid, and bring decoded volumes back to the voxels of the mask.

file (x y z) => the model's voxel size, padded LPS => latents ... decoded volume => values at the voxels of the mask
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ldm_lib.anatomy.initial_estimate import air_at_surface
from ldm_lib.data.case import CaseData
from ldm_lib.data.model_grid import GridCase, Resampling, grid_case, resample_case, resampling_to, without_bias_field
from ldm_lib.geometry import Frame
from ldm_lib.images.volume import normalise
from ldm_lib.inpainting.edge_blending import EdgeCorrection, rim


@dataclass(frozen=True)
class CaseGrid:
    """Hold what all samples of one case share.

    Anisotropic voxels count as cubes of their volume in `blend_mm`.
    """

    data: CaseData
    spacing_mm: float  # the model's voxel size
    multiple: int  # voxels per latent voxel and axis
    blend_mm: float  # reach of the intensity correction at the mask's edge (`edge_blending`), 0 is off
    bias_field_correction: bool = False

    @cached_property
    def to_see(self) -> GridCase:
        """Return the case as the network sees it, without its target."""
        return replace(grid_case(self._resampled, self.multiple), target=None)

    @cached_property
    def to_decode(self) -> np.ndarray:
        """Return the voxels to decode, (x, y, z) bool on the model's grid: the mask and its face neighbours."""
        return self._frame.to_model(rim(self._resampled.mask))

    def values(self, volume: np.ndarray) -> np.ndarray:
        """Return the values at the n voxels of the mask, (n,), in the file's units and from 0 up.

        Args:
            volume: (x, y, z) normalised, on the model's grid, decoded at least where `to_decode` is True.
        """
        decoded = self._on_file_grid(self._frame.to_file(volume))
        values, (flat, field) = decoded[self.data.mask], self._without_bias_field
        if self._edge:
            values = values + self._edge(decoded, normalise(flat.voided, flat.scale))
        return np.maximum(values, 0) * (field[self.data.mask] * np.float32(flat.scale))

    def _on_file_grid(self, volume: np.ndarray) -> np.ndarray:
        """Resample a volume from the model's voxels to the file's, in the mask and its face neighbours at least."""
        if self._resampling is None:
            return volume
        known = normalise(self._resampled.voided, self._flat.scale)
        needed, result = rim(self.data.mask), np.zeros(self.data.mask.shape, np.float32)
        combined = np.where(rim(self._resampled.mask), volume, known)
        result[needed] = self._resampling.back(combined, np.argwhere(needed))
        return result

    @cached_property
    def _without_bias_field(self) -> tuple[CaseData, np.ndarray]:
        """Return the case as the network sees it, and what its results are multiplied by: (x, y, z), file's order."""
        if self.bias_field_correction:
            return without_bias_field(self.data)
        return self.data, np.ones(self.data.mask.shape, np.float32)

    @property
    def _flat(self) -> CaseData:
        return self._without_bias_field[0]

    @cached_property
    def _resampling(self) -> Resampling | None:
        return resampling_to(self.data, self.spacing_mm)

    @cached_property
    def _resampled(self) -> CaseData:
        return resample_case(self._flat, self._resampling)

    @cached_property
    def _frame(self) -> Frame:
        return self._resampled.frame(self.multiple)

    @cached_property
    def _edge(self) -> EdgeCorrection | None:
        if not self.blend_mm:
            return None
        data, air = self.data, None
        if data.tissue is not None:
            air = air_at_surface(data.voided, data.mask, data.tissue, spacing_mm=data.source.spacing_mm)
        return EdgeCorrection(data.mask, reach_vox=self.blend_mm / data.source.mean_spacing_mm, air=air)
