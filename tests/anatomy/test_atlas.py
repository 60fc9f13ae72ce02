"""The atlas: shares of tissue that add up, and nilearn's own templates as the oracle of where they lie."""

import numpy as np
import pytest
from nilearn import datasets
from scipy import ndimage

from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.tissue import CSF, GM, WM


@pytest.fixture(scope="module")
def templates():
    """GM and WM as nilearn carries them, (x, y, z)."""
    loaders = datasets.load_mni152_gm_template, datasets.load_mni152_wm_template
    return [load(resolution=1).get_fdata(dtype=np.float32) for load in loaders]


def test_shares_sum_to_one_in_the_brain_and_to_nothing_outside():
    atlas = mni152()
    assert np.abs(atlas.shares.sum(0) - atlas.brain).max() < 1e-5
    assert atlas.shares.min() >= -1e-6


def test_it_is_loaded_once():
    assert mni152() is mni152()


def test_there_is_brain_where_nilearn_says_so():
    atlas, oracle = mni152(), datasets.load_mni152_brain_mask(resolution=1)
    np.testing.assert_array_equal(atlas.affine, oracle.affine)
    theirs = oracle.get_fdata() > 0
    assert 2 * (atlas.brain & theirs).sum() / (atlas.brain.sum() + theirs.sum()) > 0.95


def test_darkness_takes_from_grey_and_white_alike_and_gives_to_csf(templates):
    """The templates say how grey and white share a voxel; darkness can only make less of both."""
    thin = (..., *[slice(None, None, 3)] * 3)  # one voxel in 27 tells as much
    brain, (_, gm, wm), (grey, white) = mni152().brain[thin], mni152().shares[thin], [t[thin] for t in templates]
    assert (gm <= grey + 1e-5).all() and (wm <= white + 1e-5).all()
    np.testing.assert_allclose((gm * white)[brain], (wm * grey)[brain], atol=1e-5)
    assert (grey + white - gm - wm)[brain].mean() > 0.02  # sulci, of which the templates know none


@pytest.mark.parametrize(
    ("where_mm", "tissue"),
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
def test_landmarks_have_their_tissue(where_mm, tissue):
    """Right is right and front is front: the ventricles and nuclei are where anatomists put them in MNI space."""
    atlas = mni152()
    voxel = np.linalg.solve(atlas.affine, [*where_mm, 1])[:3]
    shares = [ndimage.map_coordinates(share, voxel[:, None], order=1)[0] for share in atlas.shares]
    assert 1 + int(np.argmax(shares)) == tissue, shares
