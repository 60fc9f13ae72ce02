"""Laws of what is said about a rebuilt volume: closed forms of scores, Parseval's theorem, counted neighbours."""

import numpy as np
import pytest

from ldm_lib.evaluation.image_quality import blockiness, brain_scores, error_spectrum, power_spectrum, psnr, rms


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 1, shape)


# ---- scores over the brain


def test_scores_of_a_constant_error():
    image = noise(8, 9, 10)
    image[:, :4] = 0
    rebuilt = np.where(image > 0, image + 0.1, 7.0)
    scores = brain_scores(rebuilt, image)
    assert scores["psnr"] == pytest.approx(20)
    assert scores["mae"] == pytest.approx(0.1)


def test_ssim_of_two_flat_volumes_has_the_range_one():
    """Wang's formula without variance: (2 a b + c) / (a^2 + b^2 + c), c = (0.01 * 1)^2."""
    a, b = 0.2, 0.05
    scores = brain_scores(np.full((3, 12, 12), b, np.float32), np.full((3, 12, 12), a, np.float32))
    assert scores["ssim"] == pytest.approx((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4), rel=1e-5)


def test_rms_and_psnr_of_numbers():
    assert rms(np.array([3.0, 4.0])) == pytest.approx(12.5**0.5)
    assert psnr(np.full(5, 0.01)) == pytest.approx(40)
    assert np.isnan(rms(np.empty(0))) and np.isnan(psnr(np.empty(0)))


# ---- spectra


@pytest.mark.parametrize("shape", [(12, 10, 8), (7, 9, 11)])
def test_power_adds_up_to_the_mean_square_and_without_the_mean_to_the_variance(shape):
    image = noise(*shape)
    _, power = power_spectrum(image, (1.0, 1.5, 2.0))
    assert power.sum() == pytest.approx(np.mean(image**2))
    assert power[1:].sum() == pytest.approx(image.var())


@pytest.mark.parametrize(("axis", "periods"), [(0, 1), (0, 5), (0, 12), (1, 3), (2, 2), (2, 6)])
def test_a_cosine_lands_in_its_shell(axis, periods):
    shape, spacing = (24, 12, 12), (1.0, 2.0, 2.0)  # 24 mm along each axis
    phase = 2 * np.pi * periods * np.indices(shape)[axis] / shape[axis]
    frequency, power = power_spectrum(3 * np.cos(phase) + 1, spacing)
    at = np.flatnonzero(power > 1e-9)
    nyquist = periods * 2 == shape[axis]  # there the cosine is +-1
    assert frequency[at] == pytest.approx([0, periods / 24])
    assert power[at] == pytest.approx([1, 9 if nyquist else 4.5])


def test_an_oblique_wave_lands_at_the_length_of_its_wave_vector():
    x, y, z = np.indices((20, 20, 20)) / 20
    frequency, power = power_spectrum(np.sin(2 * np.pi * (2 * x + 3 * y - 6 * z)), (1.0, 1.0, 1.0))
    assert frequency[power.argmax()] == pytest.approx(7 / 20) and power.max() == pytest.approx(0.5)


def test_rows_run_from_the_lowest_frequency_to_nyquist():
    rows = error_spectrum(noise(16, 12, 9), noise(16, 12, 9, seed=1), (2.0, 2.0, 2.0))
    assert [row["cycles_per_mm"] for row in rows] == pytest.approx([k / 32 for k in range(1, 9)])
    coarse = error_spectrum(noise(16, 8, 8), noise(16, 8, 8, seed=1), (1.0, 1.0, 2.0))
    assert coarse[-1]["cycles_per_mm"] == pytest.approx(0.25)


def test_an_ideal_low_pass_loses_what_lies_above_and_nothing_below():
    image = noise(16, 16, 16)
    frequencies = np.fft.fftfreq(16)
    length = np.sqrt(sum(f**2 for f in np.meshgrid(*[frequencies] * 3)))
    rebuilt = np.fft.ifftn(np.fft.fftn(image) * (length < 4.5 / 16)).real
    for row in error_spectrum(rebuilt, image, (1.0, 1.0, 1.0)):
        kept = row["cycles_per_mm"] < 4.5 / 16
        assert row["error"] == pytest.approx(0 if kept else row["image"], abs=1e-12)


# ---- traces of blocks


def counted_blockiness(image, brain, period):
    """Pair by pair, as the definition says."""
    ratios = []
    for axis in range(3):
        steps = {True: [], False: []}
        for place in np.ndindex(image.shape):
            before = tuple(p - (k == axis) for k, p in enumerate(place))
            if place[axis] > 0 and brain[place] and brain[before]:
                steps[place[axis] % period == 0].append(abs(image[place] - image[before]))
        ratios.append(np.mean(steps[True]) / np.mean(steps[False]))
    return np.mean(ratios)


def test_blockiness_is_its_definition():
    image, brain = noise(9, 8, 12), noise(9, 8, 12, seed=1) > 0.3
    assert blockiness(image, brain, 4) == pytest.approx(counted_blockiness(image, brain, 4))
    image[~brain] = np.nan
    assert np.isfinite(blockiness(image, brain, 4))


def test_blocks_show():
    blocks = np.kron(noise(4, 4, 4), np.ones((4, 4, 4)))
    everywhere = np.ones(blocks.shape, bool)
    assert blockiness(blocks, everywhere, 4) == np.inf
    assert blockiness(blocks + 0.1 * noise(16, 16, 16, seed=1), everywhere, 4) > 5
    assert blockiness(blocks, everywhere, 3) < 2  # another grid than the one asked about
    assert np.isnan(blockiness(blocks, everywhere, 1))


# ---- more laws


def test_what_lies_far_from_the_brain_is_not_scored():
    image = np.zeros((6, 30, 12))
    image[:, 16:] = noise(6, 14, 12)
    rebuilt = image + 0.05 * noise(6, 30, 12, seed=1)
    elsewhere = rebuilt.copy()
    elsewhere[:, :10] = 3  # beyond the reach of the window
    assert brain_scores(rebuilt, image) == brain_scores(elsewhere, image)


def test_a_perfect_volume():
    image = noise(4, 12, 12)
    assert brain_scores(image, image) == {"psnr": np.inf, "ssim": pytest.approx(1), "mae": 0}


def test_the_error_of_a_fainter_copy_has_the_spectrum_of_the_image():
    image = noise(12, 12, 10).astype(np.float32)
    rows = error_spectrum(0.9 * image, image, (1.0, 1.0, 1.0))
    assert [row["error"] for row in rows] == pytest.approx([0.01 * row["image"] for row in rows], rel=1e-4)


def test_blockiness_of_a_ramp_is_1_and_of_noise_nearly():
    x, y, z = np.indices((16, 16, 16))
    everywhere = np.ones((16, 16, 16), bool)
    assert blockiness(3.0 * x - 2 * y + z, everywhere, 4) == pytest.approx(1)
    assert blockiness(np.ones((16, 16, 16)), everywhere, 4) == 1
    assert blockiness(noise(48, 48, 48), np.ones((48, 48, 48), bool), 4) == pytest.approx(1, abs=0.03)
