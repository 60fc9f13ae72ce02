"""Laws of the tissue labels, their random deformation and smooth random fields."""

import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy.tissue import CSF, GM, TISSUES, WM, smooth_field
from ldm_lib.data import augmentation
from ldm_lib.data.augmentation import deform_labels


@pytest.fixture
def onion():
    """Shells of WM, GM and CSF in a background, 2 mm voxels."""
    x, y, z = np.indices((40, 44, 36)) - np.array([20, 22, 18]).reshape(3, 1, 1, 1)
    radius = np.sqrt(x**2 + y**2 + z**2)
    return np.select([radius < 7, radius < 11, radius < 15], [WM, GM, CSF], 0).astype(np.uint8)


def test_no_displacement_and_no_patches_change_nothing(onion, monkeypatch):
    monkeypatch.setattr(augmentation, "MAX_PATCHES", 0)
    same = deform_labels(onion, np.random.default_rng(0), spacing_mm=2, max_displacement_mm=0)
    np.testing.assert_array_equal(same, onion)
    assert same is not onion


@pytest.mark.parametrize("spacing_mm", [2.0, (1.0, 2.0, 3.0)])
def test_labels_come_from_at_most_the_largest_displacement_away(onion, spacing_mm, monkeypatch):
    monkeypatch.setattr(augmentation, "MAX_PATCHES", 0)
    h = np.broadcast_to(spacing_mm, 3)
    farthest, changed = 0.0, 0
    for seed in range(6):
        deformed = deform_labels(onion, np.random.default_rng(seed), spacing_mm=h)
        for label in (0, *TISSUES):
            distance = ndimage.distance_transform_edt(onion != label, sampling=h)
            farthest = max(farthest, distance[deformed == label].max())
        changed += (deformed != onion).sum()
    assert 0.5 < farthest <= 4.0 + np.linalg.norm(h) / 2  # rounding to the nearest voxel adds half a diagonal
    assert changed > 0.01 * 6 * (onion > 0).sum()


def test_patches_blank_and_relabel_but_never_grow_the_brain(onion):
    blanked = relabelled = 0
    for seed in range(8):
        rough = deform_labels(onion, np.random.default_rng(seed), spacing_mm=2, max_displacement_mm=0)
        assert not rough[onion == 0].any()
        assert set(np.unique(rough)) <= {0, *TISSUES}
        blanked += ((rough == 0) & (onion > 0)).sum()
        relabelled += ((rough != onion) & (rough > 0)).sum()
    assert blanked > 100
    assert relabelled > 100


def test_the_generator_decides(onion):
    one, two, other = (deform_labels(onion, np.random.default_rng(k), spacing_mm=2) for k in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_smooth_field_is_one_field_on_any_grid():
    fine, coarse = np.arange(0, 60, 0.5), np.arange(0, 60, 2.0)
    extent = (60, 60, 60)
    a = smooth_field(np.random.default_rng(1), [fine, coarse, fine], 7, extent)
    b = smooth_field(np.random.default_rng(1), [coarse, coarse, coarse], 7, extent)
    np.testing.assert_allclose(a[::4, :, ::4], b, atol=1e-5)


def test_smooth_field_has_unit_variance_everywhere():
    positions = [np.linspace(0, 20, 21)] * 3
    fields = np.stack([smooth_field(np.random.default_rng(k), positions, 5, (20, 20, 20)) for k in range(400)])
    np.testing.assert_allclose(fields.std(0), 1, atol=0.2)
    np.testing.assert_allclose(fields.mean(0), 0, atol=0.25)
    # halfway along a node distance neighbours still agree; three node distances away they do not
    assert np.corrcoef(fields[:, 0, 0, 0], fields[:, 2, 0, 0])[0, 1] > 0.8
    assert abs(np.corrcoef(fields[:, 0, 0, 0], fields[:, 20, 0, 0])[0, 1]) < 0.2
