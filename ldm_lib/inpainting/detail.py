"""Draw the detail of a sample that is finer than what the latents of a linear autoencoder hold.

Read as a probabilistic principal component analysis, a linear autoencoder leaves out Gaussian noise, and a decoded
volume is the mean over that noise. Here the noise is drawn. Its autocorrelation and its standard deviation,
which is larger where the decoded volume varies, as at the edges of tissues, are those of the autoencoder's own error
in visible voxels of the same scan; and it is conditioned on the voxels around the mask, so that the edge of the mask is
not visible.

Sources: Tipping & Bishop 1999, Probabilistic principal component analysis (J. R. Stat. Soc. B 61:611), eq. 2;
Hoffman & Ribak 1991, Constrained realizations of Gaussian random fields (Astrophys. J. 380:L5), eq. 3.
"""

from typing import Self

import numpy as np
import torch
from scipy import fft, ndimage, sparse
from scipy.sparse.linalg import cg
from scipy.spatial import cKDTree

from ldm_lib.anatomy.initial_estimate import gaussian_blur
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.model_grid import GridCase
from ldm_lib.geometry import bounding_box, face_neighbours, in_voxels, latent_mask

REACH_MM = 40.0  # distance from the mask within which the autoencoder's error is measured
SURFACE_MM = 3.0  # errors within this distance from air are left out: the step to air dominates them
SMOOTH_MM = 2.5  # sd of a Gaussian; the error around the mask, blurred by it, is corrected by `edge_blending` instead
MIN_VISIBLE_VOXELS = 1000  # below which nothing is measured
LEVELS = 16  # of the variation of the decoded volume, at each of which the error is measured
VARIATION_VOX = 1.0  # sd of the Gaussian over which the squared gradient is averaged
LAGS = 8  # voxels along an axis, beyond which errors count as uncorrelated: a block of the pretrained model
LEAST_STD = 1e-6  # against division by 0 where nothing is lost
NEIGHBOURS = 0.02, 0.94  # correlations of neighbours are clipped to this; above, no covariance would be positive
LEAST_COVARIANCE = 0.005  # a covariance with a voxel around the mask that is smaller counts as 0
NUGGET = 0.05  # relative variance of the error around the mask that is noise, so that covariances can be inverted


class Detail:
    """Draw the detail of one case.

    Attributes:
        shape: (x, y, z) of the noise, in voxels.
        levels: (2, LEVELS): root mean square of the decoded volume's gradient, ascending, in normalised intensity per
            voxel, and below it the standard deviation of the detail there, in normalised intensity.
        correlation: (2 LAGS + 1,) * 3, of two voxels by the distance between them, 1 in the centre.
    """

    def __init__(self, case: GridCase, levels: np.ndarray, correlation: np.ndarray, *, spacing_mm: float) -> None:
        around = face_neighbours(case.mask) & (case.voided > 0)
        self._box = bounding_box(case.mask, 1)
        self._mask, self._around, self._known = case.mask[self._box], around[self._box], case.voided[self._box]
        self._smooth_vox, self.levels, self.correlation = SMOOTH_MM / spacing_mm, levels, correlation
        # of voxels that may not be decoded, the nearest one that is
        self._nearest = tuple(
            ndimage.distance_transform_edt(~(self._mask | self._around), return_distances=False, return_indices=True)
        )
        self._brain = case.tissue[self._box] > 0 if case.tissue.any() else np.ones_like(self._mask)
        # large enough that opposite sides of the box, which the Fourier transform joins, are uncorrelated
        self.shape = tuple(fft.next_fast_len(max(n, LAGS + 1) + LAGS, real=True) for n in self._mask.shape)
        self._filter = _filter(correlation, self.shape)
        neighbours = [correlation[LAGS + x, LAGS + y, LAGS + z] for x, y, z in np.eye(3, dtype=int)]
        units = np.sqrt(-np.log(np.clip(neighbours, *NEIGHBOURS)))  # so that exp(-distance^2) is their correlation
        fixed, masked = (cKDTree(np.argwhere(part) * units) for part in (self._around, self._mask))
        self._among_fixed = _covariance(fixed, fixed) + NUGGET * sparse.identity(fixed.n)
        self._to_masked = _covariance(masked, fixed)

    @classmethod
    def of(cls, case: GridCase, autoencoder: Autoencoder) -> Self | None:
        """Measure the autoencoder's error in the visible voxels of a case on the model's grid.

        None where fewer than `MIN_VISIBLE_VOXELS` are visible, or where the autoencoder makes no error.
        """
        factor, spacing_mm = autoencoder.factor, autoencoder.spacing_mm
        reach = max(2, round(REACH_MM / spacing_mm / factor))
        box = in_voxels(bounding_box(latent_mask(case.mask, factor), reach), factor)
        voided = case.voided[box]
        decoded = autoencoder.reconstruct(voided)
        error, variation = voided - decoded, _variation(decoded)
        hidden = latent_mask(case.mask[box], factor, dilation=1)  # a block is decoded from those around it, too
        visible = ndimage.binary_erosion(voided > 0, iterations=max(1, round(SURFACE_MM / spacing_mm)))
        visible &= ~hidden.repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
        for axis in range(3):  # the outermost blocks lack neighbours
            np.moveaxis(visible, axis, 0)[[*range(factor), *range(-factor, 0)]] = False
        if np.count_nonzero(visible) < MIN_VISIBLE_VOXELS or not error[visible].any():
            return None
        seen, squared = variation[visible], np.square(error[visible], dtype=np.float64)
        order = np.array_split(np.argsort(seen), LEVELS)
        levels = np.array([(seen[part].mean(), np.sqrt(squared[part].mean())) for part in order]).T
        std = np.maximum(np.interp(variation, *levels), LEAST_STD)
        return cls(case, levels, _autocorrelation(error / std, visible), spacing_mm=spacing_mm)

    def __call__(self, volume: np.ndarray, noise: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        """Add detail to a decoded volume, in the mask and around it.

        Args:
            volume: (x, y, z) normalised, decoded in the mask and its face neighbours at least.
            noise: (`self.shape`) standard normal; zeros give the mean of all detail, simple kriging.
            scale: factor of the standard deviation.

        Returns:
            (x, y, z). At the visible face neighbours of the mask, the volume's error is reduced to its smooth part.
        """
        std, around, result = scale * self.std(volume), self._around, volume.copy()
        fixed = self._less_local_mean((self._known - volume[self._box])[around])
        detail = std * self._unconditioned(noise)
        missing = (fixed - detail[around]) / np.maximum(std[around], LEAST_STD)
        weights, _ = cg(self._among_fixed, missing, rtol=1e-4)
        detail[self._mask] += std[self._mask] * (self._to_masked @ weights)
        detail[around] = fixed
        result[self._box] += np.where(self._mask | around, detail, 0)
        return result

    def std(self, volume: np.ndarray) -> np.ndarray:
        """Return the standard deviation (x, y, z) of the detail of a decoded volume, in the box around the mask."""
        variation = _variation(volume[self._box][self._nearest])
        return np.where(self._brain | ~self._mask, np.interp(variation, *self.levels), 0).astype(np.float32)

    def _unconditioned(self, noise: np.ndarray) -> np.ndarray:
        """Filter white noise (`self.shape`), so that it has the correlation, and return it in the box."""
        return fft.irfftn(self._filter * fft.rfftn(noise), noise.shape)[tuple(slice(n) for n in self._mask.shape)]

    def _less_local_mean(self, error: np.ndarray) -> np.ndarray:
        """Subtract from an error (n,), known around the mask alone, its own local mean."""
        volumes = np.zeros((2, 1, *self._mask.shape), np.float32)
        volumes[0, 0, self._around], volumes[1, 0, self._around] = error, 1
        total, count = gaussian_blur(torch.from_numpy(volumes), self._smooth_vox)[:, 0].numpy()[:, self._around]
        return error - total / count


def _variation(image: np.ndarray) -> np.ndarray:
    """Return the root mean square of the gradient around each voxel of an image (x, y, z)."""
    squared = sum(np.square(part) for part in np.gradient(image))
    return np.sqrt(gaussian_blur(torch.from_numpy(squared)[None, None], VARIATION_VOX)[0, 0].numpy())


def _autocorrelation(error: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return the correlation of two visible voxels for every distance up to `LAGS`, by the Wiener-Khinchin theorem."""
    size = [fft.next_fast_len(max(n, LAGS + 1) + LAGS, real=True) for n in error.shape]
    products, pairs = (
        np.roll(fft.irfftn(np.abs(fft.rfftn(part.astype(np.float32), size)) ** 2, size), [LAGS] * 3, (0, 1, 2))
        for part in (np.where(visible, error, 0), visible)
    )
    near = (slice(2 * LAGS + 1),) * 3
    covariance = products[near] / np.maximum(pairs[near], 1)
    return covariance / covariance[LAGS, LAGS, LAGS]


def _filter(correlation: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return what the Fourier transform of white noise is multiplied by, so that it has a correlation."""
    padded = np.zeros(shape, np.float32)
    padded[tuple(slice(n) for n in correlation.shape)] = correlation
    spectrum = fft.fftn(np.roll(padded, [-LAGS] * 3, (0, 1, 2))).real
    spectrum = np.maximum(spectrum, 0)  # a measured correlation has negative ones, too
    return np.sqrt(spectrum / spectrum.mean())[..., : shape[2] // 2 + 1]


def _covariance(first: cKDTree, second: cKDTree) -> sparse.csr_matrix:
    """Return exp(-distance^2) between two sets of points in scaled units, sparse (n, m).

    It is an approximation of the measured correlation, which would not be positive definite once cut off.
    """
    reach = np.sqrt(-np.log(LEAST_COVARIANCE))
    covariance = first.sparse_distance_matrix(second, reach, output_type="coo_matrix").tocsr()
    covariance.data = np.exp(-(covariance.data**2))
    return covariance
