"""The initial estimate: exact where it has a closed form, and never a function of voxels under the mask."""

import doctest

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.sparse.linalg import spsolve

from ldm_lib.anatomy import initial_estimate as module
from ldm_lib.anatomy.initial_estimate import (
    air_at_surface,
    continue_harmonically,
    fill,
    gaussian_blur,
    initial_estimate,
)
from ldm_lib.data.synthetic_cohort import make_patient
from ldm_lib.inpainting.baselines import harmonic_fill
from ldm_lib.poisson import masked_laplacian

SHAPE = (40, 44, 36)
RNG = np.random.default_rng(0)
LABELS = (1 + np.digitize(ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 3), (-0.01, 0.01))).astype(np.uint8)
MASK = np.zeros(SHAPE, bool)
MASK[12:26, 14:30, 10:24] = True
UNKNOWN = np.zeros(SHAPE, np.uint8)


def smoothed(label, width_mm, spacing_mm=1.0):
    return ndimage.gaussian_filter((label == LABELS).astype(np.float32), width_mm / spacing_mm)


def test_intensities_that_the_labels_explain_are_recovered_under_the_mask(monkeypatch):
    monkeypatch.setattr(module, "REGRESSION_WEIGHT", 1.0)
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    narrow, wide = module.WIDTHS_MM
    image = 0.2 + 0.5 * smoothed(2, narrow) + 0.7 * smoothed(3, wide) - 0.1 * smoothed(1, wide)
    np.testing.assert_allclose(initial_estimate(image, MASK, LABELS, spacing_mm=1.0), image, atol=2e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_without_labels_it_is_the_harmonic_continuation(monkeypatch, weight):
    monkeypatch.setattr(module, "REGRESSION_WEIGHT", weight)
    image = np.abs(ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 2)).astype(np.float32) * 10
    found = initial_estimate(image, MASK, UNKNOWN, spacing_mm=1.0)
    np.testing.assert_allclose(found, harmonic_fill(image, MASK), atol=1e-3)


def test_a_linear_image_is_continued_exactly():
    x, y, z = np.indices(SHAPE)
    image = (1 + 0.02 * x - 0.01 * y + 0.005 * z).astype(np.float32)
    np.testing.assert_allclose(initial_estimate(image, MASK, UNKNOWN, spacing_mm=1.0), image, atol=1e-3)


def test_voxels_under_the_mask_are_not_read_and_those_outside_not_changed():
    image = (0.5 + 0.3 * smoothed(2, 1.0)).astype(np.float32)
    other = np.where(MASK, RNG.random(SHAPE), image).astype(np.float32)
    found = initial_estimate(image, MASK, LABELS, spacing_mm=1.0)
    np.testing.assert_array_equal(found, initial_estimate(other, MASK, LABELS, spacing_mm=1.0))
    np.testing.assert_array_equal(found[~MASK], image[~MASK])
    assert found.dtype == np.float32 and found.min() >= 0


def test_the_unit_of_length_is_the_millimetre():
    """The same head in voxels half as wide."""
    image = (0.5 + 0.3 * smoothed(2, 2.0)).astype(np.float32)
    fine = [np.kron(volume, np.ones((2, 2, 2), volume.dtype)) for volume in (image, MASK, LABELS)]
    found = initial_estimate(*fine, spacing_mm=0.5)
    coarse = found.reshape(*(n for size in SHAPE for n in (size, 2))).mean((1, 3, 5))
    assert np.abs(coarse - initial_estimate(image, MASK, LABELS, spacing_mm=1.0))[MASK].mean() < 0.01


@pytest.mark.parametrize("mask", [np.zeros(SHAPE, bool), np.ones(SHAPE, bool)])
def test_an_empty_mask_and_a_mask_of_the_whole_volume(mask):
    image = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(initial_estimate(image, mask, LABELS, spacing_mm=1.0), np.where(mask, 0, image))


def test_the_tissue_map_improves_on_harmonic_inpainting():
    patient = make_patient(0, 3, spacing_mm=4.0, masks=1)
    image = patient.t1n / np.percentile(patient.t1n[patient.t1n > 0], 99.5)
    ((healthy, _),) = patient.masks
    both = initial_estimate(image, healthy, patient.tissue, spacing_mm=4.0), harmonic_fill(image, healthy)
    errors = [float(np.square(filled - image)[healthy].mean()) for filled in both]
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize("sigma", [0.5, 2.0, (0.0, 1.0, 3.0)])
def test_the_blur_is_that_of_scipy(sigma):
    image = RNG.random((2, 2, *SHAPE)).astype(np.float32)
    found = gaussian_blur(torch.from_numpy(image), sigma).numpy()
    for index in np.ndindex(2, 2):
        np.testing.assert_allclose(found[index], ndimage.gaussian_filter(image[index], sigma), atol=1e-5)


def test_the_harmonic_continuation_is_that_of_the_sparse_solver():
    """Two masks in one volume, air at one of them, and a batch whose other volume has no mask."""
    image = ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 2).astype(np.float32)
    mask = MASK.copy()
    mask[30:36, 2:9, 3:11] = True
    air = np.zeros(SHAPE, bool)
    air[26, 14:30, 10:24] = True
    laplacian, edge_sum = masked_laplacian(image, mask, air)
    expected = spsolve(laplacian.tocsc(), edge_sum)
    batch = [np.stack(pair)[:, None] for pair in ((image * ~mask, image), (mask, mask & False), (air, air & False))]
    found = continue_harmonically(*map(torch.from_numpy, batch)).numpy()
    np.testing.assert_allclose(found[0, 0][mask], expected, atol=1e-3 * np.abs(expected).max())
    assert not found[0, 0][~mask].any() and not found[1].any()


@pytest.mark.parametrize("x", [20, 21])
def test_a_mask_as_thin_as_a_voxel_has_a_regression_wherever_it_lies(x):
    """The regression is fitted on every second voxel along each axis, between which a thin mask may lie."""
    image, mask = np.where(LABELS == 3, 0.9, 0.3), np.zeros(SHAPE, bool)
    mask[x, 15:25, 15:25] = True
    found, plain = (initial_estimate(image, mask, labels, spacing_mm=1.0) for labels in (LABELS, UNKNOWN))
    assert np.abs(found - plain)[mask].mean() > 0.002, "the regression changes something"


def test_a_batch_is_filled_as_its_volumes_are():
    image = (0.5 + 0.3 * smoothed(2, 1.0)).astype(np.float32)
    masks = np.stack([MASK, np.roll(MASK, (5, -4, 3), (0, 1, 2))])
    labels, air = np.stack([LABELS, UNKNOWN]), np.zeros_like(masks)
    volumes = [torch.from_numpy(np.stack(list(parts)))[:, None] for parts in (image * ~masks, masks, labels, air)]
    both = fill(*volumes, spacing_mm=1.0)
    for k in range(2):
        torch.testing.assert_close(
            both[k], fill(*(part[k : k + 1] for part in volumes), spacing_mm=1.0)[0], atol=2e-4, rtol=0
        )
    assert torch.equal(both[~volumes[1]], volumes[0][~volumes[1]])


def test_examples_run():
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


SHAPE = (40, 44, 36)
RADIUS = np.linalg.norm(np.indices(SHAPE) - np.array([20, 22, 18]).reshape(3, 1, 1, 1), axis=0)
BRAIN = RADIUS <= 14
LESION = np.linalg.norm(np.indices(SHAPE) - np.array([9, 22, 18]).reshape(3, 1, 1, 1), axis=0) <= 7


@pytest.mark.parametrize("mask", [LESION & BRAIN, LESION], ids=["to the surface", "into the air"])
@pytest.mark.parametrize("error_vox", [-1, 0, 1])
def test_a_brain_is_not_dark_at_its_surface_however_a_lesion_is_drawn(mask, error_vox, monkeypatch):
    """A constant brain of voxels of 2 mm, compared with air as known; the surface of the tissue map errs by a voxel."""
    tissue = np.where(14 + error_vox >= RADIUS, 3, 0)
    surface, means = LESION & BRAIN & (RADIUS > 12), []
    for reach_mm in (module.SURFACE_MM, -1.0):
        monkeypatch.setattr(module, "SURFACE_MM", reach_mm)
        found = initial_estimate(np.where(mask, np.nan, BRAIN), mask, tissue, spacing_mm=2.0)
        means.append(found[surface].mean())
        assert found.max() < 1.2
    assert abs(1 - means[0]) < 0.85 * (1 - means[1]), means


def test_air_counts_again_where_a_mask_is_drawn_far_beyond_the_surface():
    far = np.linalg.norm(np.indices(SHAPE) - np.array([20, 22, 18]).reshape(3, 1, 1, 1), axis=0)
    mask = LESION | ((far > 14) & (np.indices(SHAPE)[0] < 8))
    air = air_at_surface(np.where(mask, 0, BRAIN * 1.0), mask, np.where(BRAIN, 3, 0), spacing_mm=(2.0, 2.0, 2.0))
    assert not (air & BRAIN).any() and not (air & mask).any()
    assert RADIUS[air].max() <= 14 + 5 + 1, "10 mm beyond the surface"
    found = initial_estimate(np.where(mask, 0, BRAIN * 1.0), mask, np.where(BRAIN, 3, 0), spacing_mm=2.0)
    assert found[mask & (RADIUS > 20)].max() < 0.3
