"""The atlas: fractions of tissue that sum to one, and nilearn's own templates as the oracle of their positions."""

import numpy as np
import pytest
from nilearn import datasets
from scipy import ndimage

from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.tissue import CSF, GM, WM


@pytest.fixture(scope="module")
def templates():
    """GM and WM templates of nilearn, (x, y, z)."""
    loaders = datasets.load_mni152_gm_template, datasets.load_mni152_wm_template
    return [load(resolution=1).get_fdata(dtype=np.float32) for load in loaders]


def test_fractions_sum_to_one_in_the_brain_and_to_zero_outside():
    atlas = mni152()
    assert np.abs(atlas.fractions.sum(0) - atlas.brain).max() < 1e-5
    assert atlas.fractions.min() >= -1e-6


def test_the_atlas_is_loaded_once():
    assert mni152() is mni152()


def test_the_head_is_that_of_nilearn_to_the_last_bit():
    """Its files are read without importing nilearn, which takes seconds."""
    np.testing.assert_array_equal(mni152().t1, datasets.load_mni152_template(resolution=1).get_fdata(dtype=np.float32))


def test_the_brain_is_that_of_nilearn():
    atlas, oracle = mni152(), datasets.load_mni152_brain_mask(resolution=1)
    np.testing.assert_array_equal(atlas.affine, oracle.affine)
    expected = oracle.get_fdata() > 0
    assert 2 * (atlas.brain & expected).sum() / (atlas.brain.sum() + expected.sum()) > 0.95


def test_dark_voxels_lose_grey_and_white_in_proportion_to_csf(templates):
    """The templates fix the ratio of grey to white in a voxel; a low intensity can only reduce both."""
    thin = (..., *[slice(None, None, 3)] * 3)  # one voxel in 27 is enough
    brain, (_, gm, wm), (grey, white) = mni152().brain[thin], mni152().fractions[thin], [t[thin] for t in templates]
    assert (gm <= grey + 1e-5).all() and (wm <= white + 1e-5).all()
    np.testing.assert_allclose((gm * white)[brain], (wm * grey)[brain], atol=1e-5)
    assert (grey + white - gm - wm)[brain].mean() > 0.02  # sulci, which the templates do not contain


@pytest.mark.parametrize(
    ("position_mm", "tissue"),
    [
        ((-26, -20, 32), WM),  # corona radiata
        ((26, -20, 32), WM),
        ((0, 24, 8), WM),  # genu of the corpus callosum
        ((-28, 0, 2), GM),  # putamen
        ((12, 12, 12), GM),  # head of the caudate
        ((-17, -38, 14), CSF),  # atrium of the lateral ventricle
        ((4, 4, 12), CSF),  # its frontal horn
    ],
)
def test_landmarks_have_their_tissue(position_mm, tissue):
    """Ventricles and nuclei lie at their known positions in MNI space, so right is right and front is front."""
    atlas = mni152()
    voxel = np.linalg.solve(atlas.affine, [*position_mm, 1])[:3]
    fractions = [ndimage.map_coordinates(fraction, voxel[:, None], order=1)[0] for fraction in atlas.fractions]
    assert 1 + int(np.argmax(fractions)) == tissue, fractions
