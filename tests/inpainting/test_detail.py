"""Laws of the detail of a sample: measured where the covariance is known, drawn with it, continuous at the edge."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.sparse.linalg import eigsh

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import GridCase
from ldm_lib.evaluation.boundary import BIAS, GRADIENT, STEP, boundary_scores
from ldm_lib.evaluation.calibration import spread_skill_ratio
from ldm_lib.geometry import face_neighbours
from ldm_lib.inpainting import detail as module
from ldm_lib.inpainting.detail import LAGS, NUGGET, Detail
from ldm_lib.inpainting.edge_blending import EdgeCorrection
from ldm_lib.inpainting.inpainter import Inpainter

SHAPE, SIGMAS = (72, 72, 72), (0.7, 0.8, 1.2)
# what the autoencoder holds: flat in one half, with waves along y in the other, where its error is larger
FLAT = np.indices(SHAPE)[0] < 36
DECODED = np.where(FLAT, 0.6, 0.6 + 0.1 * np.sin(np.indices(SHAPE)[1] * np.pi / 6)).astype(np.float32)
STD = np.where(FLAT, 0.03, 0.08).astype(np.float32)


def field(seed, sigmas=SIGMAS):
    """White noise blurred by a Gaussian, of variance 1."""
    made = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), sigmas, mode="wrap")
    return (made / made.std()).astype(np.float32)


def true_correlation(lag, sigmas=SIGMAS):
    """The autocorrelation of the blur, for a distance (x, y, z) in voxels."""
    product = 1.0
    for distance, sigma in zip(lag, sigmas, strict=True):
        kernel = ndimage.gaussian_filter1d(np.eye(41)[20], sigma)
        product *= np.correlate(kernel, kernel, "full")[40 + distance] / (kernel @ kernel)
    return product


@pytest.fixture(scope="module")
def scan():
    """A scan: what the autoencoder holds, and detail."""
    target = DECODED + STD * field(0)
    mask = np.square(np.indices(SHAPE) - 36).sum(axis=0) < 12**2
    nothing = np.zeros(SHAPE, bool)
    voided = np.where(mask, 0, target).astype(np.float32)
    return GridCase(voided, target, mask, nothing, nothing.astype(np.float32), np.full(SHAPE, 2, np.uint8))


@pytest.fixture(scope="module")
def smoother():
    """An autoencoder that holds no detail."""
    return SimpleNamespace(factor=4, spacing_mm=1.0, network=None, reconstruct=lambda image: DECODED)


@pytest.fixture(scope="module")
def detail(scan, smoother):
    return Detail.of(scan, smoother)


@pytest.fixture(scope="module")
def samples(scan, detail):
    """Eight samples: the decoded mean with detail, pasted into the scan with the edge correction."""
    edge = EdgeCorrection(scan.mask, reach_vox=16)
    pasted = [scan.voided.copy() for _ in range(8)]
    for seed, sample in enumerate(pasted):
        volume = detail(DECODED, noise(detail, seed))
        sample[scan.mask] = volume[scan.mask] + edge(volume, scan.voided)
    return pasted


def noise(detail, seed):
    return np.random.default_rng(seed).standard_normal(detail.shape, np.float32)


def test_the_standard_deviation_is_measured_for_each_variation_of_the_decoded_volume(scan, detail):
    found, box = detail.std(DECODED), np.abs(np.indices(SHAPE)[0] - 35.5)[detail._box]
    for part in (FLAT, ~FLAT):
        inside = scan.mask[detail._box] & part[detail._box] & (box > 4)  # away from the step between the halves
        assert found[inside].mean() == pytest.approx(STD[part].mean(), rel=0.1)


@pytest.mark.parametrize("lag", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (1, 1, 0), (1, -1, 1)])
def test_the_correlation_is_measured_for_every_distance(detail, lag):
    found = detail.correlation[tuple(LAGS + step for step in lag)]
    assert found == pytest.approx(true_correlation(lag), abs=0.03)


def test_unconditioned_detail_has_the_correlation_and_a_variance_of_1(detail):
    draws = np.stack([detail._unconditioned(noise(detail, seed)) for seed in range(20)])
    assert draws.var() == pytest.approx(1, abs=0.02)
    for axis in range(3):
        ahead, behind = np.moveaxis(draws, axis + 1, 0)[1:], np.moveaxis(draws, axis + 1, 0)[:-1]
        assert (ahead * behind).mean() == pytest.approx(true_correlation(np.eye(3, dtype=int)[axis]), abs=0.03)


def test_samples_are_calibrated_and_as_rough_as_the_scan(scan, samples):
    """The spread is that of the error where the latents hold the mean, and the edge is not visible."""
    inside = np.stack([sample[scan.mask] for sample in samples])
    assert spread_skill_ratio(inside, scan.target[scan.mask]) == pytest.approx(1, abs=0.1)
    scores = [boundary_scores(sample, scan.voided, scan.mask, 1.0) for sample in samples]
    for name, tolerance in ((STEP, 0.08), (GRADIENT, 0.08)):
        assert np.mean([score[name] for score in scores]) == pytest.approx(1, abs=tolerance)
    assert np.mean([score[BIAS] for score in scores]) == pytest.approx(0, abs=0.002)


def test_without_the_condition_the_edge_would_be_visible(scan, detail):
    """So that the law above can fail."""
    volume = DECODED.copy()
    volume[detail._box] += STD[detail._box] * detail._unconditioned(noise(detail, 0))
    assert boundary_scores(np.where(scan.mask, volume, scan.voided), scan.voided, scan.mask, 1.0)[STEP] > 1.2


def test_without_noise_it_is_simple_kriging_of_what_is_known_around_the_mask(scan, smoother, monkeypatch):
    """The oracle inverts a dense covariance."""
    monkeypatch.setattr(module, "LEAST_COVARIANCE", 1e-6)
    detail = Detail.of(scan, smoother)
    found = (detail(DECODED, np.zeros(detail.shape, np.float32)) - DECODED)[detail._box]
    around, std, mask = detail._around, detail.std(DECODED), detail._mask
    units = np.sqrt([-np.log(detail.correlation[tuple(LAGS + step)]) for step in np.eye(3, dtype=int)])
    fixed, masked = np.argwhere(around) * units, np.argwhere(mask)[:500] * units

    def covariance(first, second):
        return np.exp(-np.square(first[:, None] - second[None]).sum(axis=-1))

    known = found[around] / std[around]
    expected = covariance(masked, fixed) @ np.linalg.solve(
        covariance(fixed, fixed) + NUGGET * np.eye(len(fixed)), known
    )
    np.testing.assert_allclose((found[mask] / std[mask])[:500], expected, atol=0.01)
    assert np.abs(expected).max() > 1


def test_around_the_mask_it_is_the_scan_but_for_a_smooth_error(scan, detail):
    """The edge correction takes care of the smooth one; here it is a constant, and nothing of it is left."""
    around = face_neighbours(scan.mask)
    results = [detail(DECODED + np.float32(offset), noise(detail, 0)) for offset in (0, 0.2)]
    np.testing.assert_allclose(results[1] - results[0], 0.2, atol=1e-5)
    remaining = scan.voided[around] - results[0][around]
    assert remaining.std() < 0.4 * (scan.voided - DECODED)[around].std()
    elsewhere = ~scan.mask & ~around
    assert (results[0] == DECODED)[elsewhere].all()


def test_the_scale_is_that_of_the_random_part(detail):
    fixed, once, twice = (detail(DECODED, noise(detail, 1), scale=scale) for scale in (1e-6, 1, 2))
    deep = np.square(np.indices(SHAPE) - 36).sum(axis=0) < 6**2
    np.testing.assert_allclose((twice - fixed)[deep], 2 * (once - fixed)[deep], atol=2e-3)
    assert (once - fixed)[deep].std() > 0.03


def test_there_is_none_outside_the_brain_of_the_tissue_map(scan, smoother):
    tissue = scan.tissue.copy()
    tissue[:, :30] = 0
    made = Detail.of(replace(scan, tissue=tissue), smoother)
    std, outside = made.std(DECODED), (tissue == 0)[made._box]
    assert not std[outside & made._mask].any() and std[~outside & made._mask].all()


def test_without_a_tissue_map_it_is_everywhere(scan, smoother):
    made = Detail.of(replace(scan, tissue=np.zeros_like(scan.tissue)), smoother)
    assert made.std(DECODED)[made._mask].all()


def test_a_scan_with_too_little_to_measure_has_none(scan, smoother):
    voided = np.where(np.indices(SHAPE)[0] > 60, scan.voided, 0)
    voided[:66] = 0
    assert Detail.of(replace(scan, voided=voided.astype(np.float32)), smoother) is None


def test_an_autoencoder_that_loses_nothing_leaves_none_to_draw(scan, smoother):
    exact = SimpleNamespace(**vars(smoother) | {"reconstruct": lambda image: image})
    assert Detail.of(scan, exact) is None


def test_a_scan_whose_detail_is_as_smooth_as_can_be_has_a_covariance_that_is_positive(scan, smoother):
    smooth = replace(scan, voided=np.where(scan.mask, 0, DECODED + STD * field(1, (4, 4, 4))).astype(np.float32))
    made = Detail.of(smooth, smoother)
    assert eigsh(made._among_fixed, 1, which="SA", return_eigenvectors=False, tol=0.01)[0] > 0
    assert np.abs(made(DECODED, noise(made, 0)) - DECODED)[scan.mask].max() < 1


# ---- in samples


@pytest.fixture(scope="module")
def linear(tiny_model_folder):
    """A model whose autoencoder is linear."""
    model = Inpainter.load(tiny_model_folder, device="cpu", precision="32").model
    torch.manual_seed(0)
    codec = Autoencoder.of(channels=(8, 8), latent_channels=3, blocks=1, learned="none", spacing_mm=8.0).freeze()
    return Inpainter(replace(model, autoencoder=codec))


@pytest.fixture(autouse=True)
def few_are_enough(request, monkeypatch):
    if "linear" in request.fixturenames:
        monkeypatch.setattr(module, "MIN_VISIBLE_VOXELS", 20)


HOW = {"num_inference_steps": 2, "seed": 3}


def test_a_sample_has_detail_that_its_seed_and_number_determine(cases, linear):
    data = load_case(cases[0])
    both, again = linear(data, n_samples=2, **HOW), linear(data, n_samples=1, **HOW)
    np.testing.assert_allclose(both.samples[0], again.samples[0], rtol=1e-5, atol=1e-3 * data.scale)
    plain = replace(linear, detail=0.0)(data, n_samples=2, **HOW)
    added = [result - without for result, without in zip(both.samples, plain.samples, strict=True)]
    assert all(part[data.mask].std() > 0 and not part[~data.mask].any() for part in added)
    assert np.abs(added[0] - added[1])[data.mask].max() > 0
    other = linear(data, num_inference_steps=2, seed=4).samples[0]
    assert np.abs(other - both.samples[0])[data.mask].max() > 0


def test_the_estimate_has_the_mean_of_all_detail(cases, linear):
    """Of many samples whose latents are the estimate's, the mean is the estimate; its seed does not matter."""
    data = load_case(cases[0])
    estimate, case_grid = linear.estimate(data).mean, linear.case_grid(data)
    assert np.abs(estimate - replace(linear, detail=0.0).estimate(data).mean)[data.mask].max() > 0
    latent = linear.model.sample(linear.encode(data), ["any"], seed=5, sampler="ddim", num_inference_steps=1)[0]
    detail, volume = linear._detail(case_grid), linear._decode(latent, case_grid)
    drawn = np.array([case_grid.values(detail(volume, noise(detail, seed), scale=0.2)) for seed in range(100)])
    positive = drawn.min(axis=0) > 0  # values below 0 are raised to 0
    tolerance = 5 * np.std(drawn, axis=0) / np.sqrt(len(drawn)) + 1e-3 * data.scale
    difference = np.abs(np.mean(drawn, axis=0) - estimate[data.mask])
    assert positive.sum() > 10 and (difference < tolerance)[positive].all()


def test_the_temperature_scales_it(cases, linear, monkeypatch):
    scales = []
    monkeypatch.setattr(Detail, "__call__", lambda self, volume, noise, *, scale: scales.append(scale) or volume)
    for temperature, amount in ((1.0, 1.0), (0.6, 1.0), (0.6, 0.5)):
        cooler = replace(linear, model=replace(linear.model, temperature=temperature), detail=amount)
        cooler(load_case(cases[0]), **HOW)
    assert scales == pytest.approx([1, 0.6, 0.3])


def test_a_network_that_decodes_has_none(cases, tiny_model_folder):
    inpainter = Inpainter.load(tiny_model_folder, device="cpu", precision="32")
    data = load_case(cases[0])
    assert inpainter._detail(inpainter.case_grid(data)) is None
