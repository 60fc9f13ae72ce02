"""The fills against closed forms, and the laws that hold for all of them."""

import numpy as np
import pytest

from ldm_lib.errors import InputError
from ldm_lib.inpainting import baselines
from ldm_lib.inpainting.baselines import (
    BASELINES,
    OF_TISSUE,
    harmonic_fill,
    initial_estimate_baseline,
    mean_fill,
    mirror_fill,
    mirror_sum_vox,
    tissue_paint,
)
from ldm_lib.poisson import masked_laplacian

SHAPE = (24, 22, 20)
X, Y, Z = np.indices(SHAPE).astype(float)
BALL = (X - 11) ** 2 + (Y - 9) ** 2 + (Z - 10) ** 2 < 6**2
FILLS = pytest.mark.parametrize("fill", BASELINES.values(), ids=BASELINES.keys())


def brain(seed=0):
    """An int16 volume with air around it and negative voxels in it, and a tissue map."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(-50, 700, SHAPE).astype(np.int16)
    tissue = rng.integers(1, 4, SHAPE)
    for array in (volume, tissue):
        array[:3], array[:, -3:] = 0, 0
    return volume, tissue


@FILLS
def test_known_voxels_stay_bit_for_bit_and_masked_ones_are_not_read(fill):
    volume, tissue = brain()
    how = {"tissue": tissue, "lateral_axis": 0, "spacing_mm": 1.0}
    filled = fill(volume, BALL, **how)
    assert filled.dtype == np.float32 and np.isfinite(filled).all()
    assert np.array_equal(filled[~BALL], volume[~BALL]) and not np.array_equal(filled[BALL], volume[BALL])
    assert np.array_equal(fill(np.where(BALL, np.nan, volume), BALL, **how), filled)
    assert np.array_equal(fill(volume, BALL & False, **how), volume), "the input is unchanged, too"


@FILLS
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v[1:], r"the voided volume is \(23, 22, 20\), the mask \(24, 22, 20\)"),
        (lambda v: v / 0, "voxels outside the mask are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unusable_volumes_are_rejected(fill, spoil, message):
    volume, tissue = brain()
    with pytest.raises(InputError, match=message):
        fill(spoil(volume), BALL, tissue=tissue, lateral_axis=0, spacing_mm=1.0)


@pytest.mark.parametrize("name", ["mean intensity", "mirror", "tissue paint"])
def test_a_volume_of_air_is_rejected(name):
    with pytest.raises(InputError, match="there is no brain"):
        BASELINES[name](np.zeros(SHAPE), BALL, tissue=np.ones(SHAPE), lateral_axis=0, spacing_mm=1.0)


def test_mean_fill_is_the_mean_of_the_brain_outside_the_mask():
    volume, _ = brain()
    known = volume[~BALL]
    expected = known[known != 0].mean()
    assert mean_fill(volume, BALL)[BALL] == pytest.approx(expected, rel=1e-6)


def symmetric_brain(index_sum, axis=0):
    """A brain whose voxels x and index_sum - x are equal; exactly 0 outside."""
    x = np.indices((30, 30, 30))[axis]
    anatomy = np.random.default_rng(0).normal(0, 80, (30, 30, 30)) + 300
    anatomy = np.moveaxis(anatomy, 0, axis)
    partner = np.clip(index_sum - x, 0, 29)
    volume = np.where(x <= partner, anatomy, np.take_along_axis(anatomy, partner, axis))
    centre = [index_sum / 2 if k == axis else 14.5 for k in range(3)]
    radius = sum((i - c) ** 2 for i, c in zip(np.indices(volume.shape), centre, strict=True))
    return np.where(radius < 12**2, volume, 0).astype(np.float32)


@pytest.mark.parametrize(("index_sum", "axis"), [(29, 0), (31, 1), (30, 2)])
def test_mirror_fill_restores_a_symmetric_brain(index_sum, axis):
    volume = symmetric_brain(index_sum, axis)
    x = np.indices(volume.shape)[axis]
    mask = (volume != 0) & (x > index_sum / 2 + 3) & (x <= index_sum)  # whose partners are in the volume
    voided = np.where(mask, 0, volume)
    assert mirror_sum_vox(voided, mask, lateral_axis=axis) == index_sum
    assert np.array_equal(mirror_fill(voided, mask, lateral_axis=axis), volume)


def test_mirror_fill_falls_back_to_the_mean_where_the_mirror_is_no_brain():
    volume = symmetric_brain(18)
    mask = np.zeros(volume.shape, bool)
    mask[7:16, 12:18, 12:18] = True  # the mirror of x = 7..11 is masked, that of 12..15 is not
    mask[20:, 12:18, 12:18] = True  # the mirror lies outside the volume
    mask[5:9, :2, :2] = True  # the mirror lies in air
    expected = np.where(mask, mean_fill(volume, mask), volume)
    expected[12:16, 12:18, 12:18] = volume[12:16, 12:18, 12:18]
    assert np.array_equal(mirror_fill(volume, mask, lateral_axis=0), expected)


HARMONIC = {
    "ramp": 3 * X - 2 * Y + 5 * Z - 40,
    "saddle": (X - 9) ** 2 - (Y - 7) ** 2,
    "triple product": (X - 9) * (Y - 7) * (Z - 11),
}


@pytest.mark.parametrize("function", HARMONIC.values(), ids=HARMONIC.keys())
def test_harmonic_fill_restores_harmonic_functions(function):
    filled = harmonic_fill(np.where(BALL, 0, function), BALL)
    assert filled == pytest.approx(function, abs=1e-5 * np.abs(function).max())


def test_harmonic_fill_lets_no_flux_through_the_border():
    """Known at x = 15 only; cosh across and a cosine along y are the discrete solution."""
    frequency = 3 * np.pi / SHAPE[1]
    decay = np.arccosh(2 - np.cos(frequency))
    solution = np.cosh(decay * (X + 0.5)) * np.cos(frequency * (Y + 0.5))
    solution /= np.abs(solution[15]).max()
    mask = X < 15
    assert harmonic_fill(solution, mask)[mask] == pytest.approx(solution[mask], abs=1e-5)


def test_harmonic_fill_satisfies_the_maximum_principle():
    volume, _ = brain()
    filled = harmonic_fill(volume, BALL)
    edge = np.zeros(SHAPE, bool)
    for axis in range(3):
        for step in (1, -1):
            edge |= np.roll(BALL, step, axis)
    edge &= ~BALL
    assert volume[edge].min() < filled[BALL].min() < filled[BALL].max() < volume[edge].max()


def test_harmonic_fill_solves_to_the_stated_residual():
    """The mean of the neighbours, written out here once more, without the library's matrix."""
    (volume, _), offset = brain(), 5000
    filled = np.pad(harmonic_fill(volume + offset, BALL).astype(float), 1, mode="edge")
    around = sum(np.roll(filled, step, axis) for axis in range(3) for step in (1, -1))
    residual = (6 * filled - around)[1:-1, 1:-1, 1:-1][BALL]
    _, edge_sum = masked_laplacian(volume + offset, BALL)
    assert np.linalg.norm(residual) <= 1e-6 * np.linalg.norm(edge_sum)


def test_harmonic_fill_rejects_a_mask_without_edge():
    with pytest.raises(InputError, match="the mask covers all 10560 voxels"):
        harmonic_fill(np.ones(SHAPE), np.ones(SHAPE))


def layers():
    """Four layers along x, one per label, and their intensities: air 0, CSF below 0."""
    tissue = (np.indices((48, 16, 16))[0] // 12).astype(np.uint8)
    return tissue, np.array([0, -20, 300, 500])[tissue]


@pytest.fixture
def unsmoothed(monkeypatch):
    monkeypatch.setattr(baselines, "BORDER_SIGMA_VOX", 0)


def test_tissue_paint_restores_layers_away_from_their_borders():
    tissue, volume = layers()
    mask = np.zeros(tissue.shape, bool)
    mask[1:, 4:12, 4:12] = True
    filled = tissue_paint(np.where(mask, 0, volume), mask, tissue)
    away = np.abs((np.arange(48) + 0.5) % 12 - 6) < 2
    assert np.array_equal(filled[away].round(3), volume[away])
    assert -20 < filled[23, 8, 8] < filled[24, 8, 8] < 300


@pytest.mark.usefixtures("unsmoothed")
def test_tissue_paint_gives_an_unseen_label_the_mean_of_the_brain():
    tissue, volume = layers()
    mask = np.indices(tissue.shape)[0] >= 36
    filled = tissue_paint(volume, mask, tissue)
    assert filled[mask] == pytest.approx(140)


@pytest.mark.usefixtures("unsmoothed")
def test_tissue_paint_learns_from_brain_only():
    tissue, volume = layers()
    volume[24:30] = 0  # air that the map calls GM
    mask = np.zeros(tissue.shape, bool)
    mask[24:36, 4:12, 4:12] = True
    assert tissue_paint(volume, mask, tissue)[mask] == pytest.approx(300)


@pytest.mark.parametrize("name", OF_TISSUE)
def test_a_map_of_another_grid_is_rejected(name):
    with pytest.raises(InputError, match=r"the tissue map is \(23, 22, 20\), the voided volume"):
        BASELINES[name](np.ones(SHAPE), BALL, tissue=np.ones(SHAPE)[1:], lateral_axis=0, spacing_mm=1.0)


def test_the_initial_estimate_does_not_depend_on_units():
    volume, tissue = brain()
    volume += (200 * tissue).astype(np.int16)
    plain, thrice, fourfold = (initial_estimate_baseline(k * volume, BALL, tissue, spacing_mm=4.0) for k in (1, 3, 4))
    np.testing.assert_allclose(thrice, 3 * plain, rtol=1e-4, atol=1e-4 * volume.max())
    np.testing.assert_array_equal(fourfold, 4 * plain)
    assert np.ptp(plain[BALL]) > 10 and not np.allclose(plain, harmonic_fill(volume, BALL), rtol=0.01)


@pytest.mark.usefixtures("unsmoothed")
def test_tissue_paint_without_smoothing_restores_layers_entirely():
    tissue, volume = layers()
    mask = np.zeros(tissue.shape, bool)
    mask[:, 4:12, 4:12] = True
    assert np.array_equal(tissue_paint(volume, mask, tissue), volume)
