"""Plots of a case: arrays in the voxel order of its file are drawn as the same arrays in LPS order are."""

import doctest
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ldm_lib.data.case import load_case
from ldm_lib.errors import InputError
from ldm_lib.plots import case_plots, figures

DRAW = {
    "plot": lambda case: case_plots.plot(case, {"voided": case.voided, "growth": case.growth}, centre_on=case.growth),
    "plot_difference": lambda case: case_plots.plot_difference(case, case.voided),
    "plot_overlay": case_plots.plot_overlay,
    "plot_samples": lambda case: case_plots.plot_samples(case, [case.voided, case.target]),
    "plot_series": lambda case: case_plots.plot_series(
        case, {"no": case.voided, "old": case.target}, growths={"old": case.growth}
    ),
    "view": lambda case: case_plots.view(case, {"voided": case.voided, "growth": case.growth}).figure,
}


def test_a_result_is_plotted_as_it_is_and_an_array_without_a_name_is_rejected(cases):
    data = load_case(cases[0])
    result = SimpleNamespace(mean=data.voided, samples=[data.voided])
    assert [axes.get_ylabel() for axes in case_plots.plot(data, result).axes[::3]][:2] == ["voided", "inpainted"]
    with pytest.raises(InputError, match=r"volumes are a ndarray\. Fix: give them by name"):
        case_plots.plot(data, data.voided)


@pytest.fixture(scope="module")
def case(cases):
    return load_case(cases[0])


@pytest.fixture(scope="module")
def turned(case):
    """The same case with the axes of its file in another order: z x y, two of them reversed."""
    order = np.ix_(*(np.arange(n)[::step] for n, step in zip(case.mask.shape, (-1, 1, -1), strict=True)))
    arrays = {
        name: np.moveaxis(getattr(case, name)[order], -1, 0)
        for name in ("voided", "mask", "target", "growth", "tissue")
    }
    affine = case.source.affine @ np.array([[0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])
    source = SimpleNamespace(affine=affine, shape=arrays["mask"].shape, spacing_mm=case.source.spacing_mm)
    return replace(case, source=source, **arrays)


def drawn(figure):
    return [image.get_array() for ax in figure.axes for image in ax.get_images()]


@pytest.mark.parametrize("name", DRAW)
def test_the_voxel_order_of_the_file_does_not_show(name, case, turned):
    first, second = (DRAW[name](c) for c in (case, turned))
    assert len(drawn(first)) == len(drawn(second)) > 1
    for a, b in zip(drawn(first), drawn(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.get_suptitle() == second.get_suptitle() and case.case.key in first.get_suptitle()


def test_samples_come_with_mean_ground_truth_and_population_standard_deviation(case):
    samples = [case.target, case.voided, case.target * 0.5]
    figure = case_plots.plot_samples(case, samples)
    stack, centre = np.stack(samples), figures.slice_geometry(
        {"v": case.lps(case.mask)}, case.lps_spacing_mm, mask=case.lps(case.mask)
    ).centre_vox  # fmt: skip
    shown = {ax.get_title(): ax.get_images()[0].get_array() for ax in figure.axes if ax.get_title()}
    expected = {"mean": stack.mean(0), "standard deviation": stack.std(0), "ground truth": case.target}
    for name, volume in expected.items():
        np.testing.assert_array_equal(shown[name], case.lps(volume)[:, :, centre[2]].T, err_msg=name)
    high = np.percentile(case.target[case.target > 0], 99.5)
    assert figure.axes[0].get_images()[0].get_clim() == (0, high)


def test_growth_is_scaled_to_the_images_in_the_viewer_and_has_its_own_scale_in_a_plot(case):
    volumes = {"voided": case.voided, "growth": case.growth}
    in_plot, in_view = case_plots.plot(case, volumes).axes[3], case_plots.view(case, volumes).figure.axes[3]
    assert in_plot.get_images()[0].get_clim() == (0, case.growth.max())
    np.testing.assert_allclose(
        in_view.get_images()[0].get_array(), in_plot.get_images()[0].get_array() * case.scale, rtol=1e-6
    )


def test_errors_name_what_is_missing_or_has_another_shape(case):
    with pytest.raises(InputError, match=r"'mean' has shape \(2, 3, 4\), the case \(30, 30, 20\)"):
        case_plots.plot(case, {"mean": np.zeros((2, 3, 4))})
    with pytest.raises(InputError, match="has no ground truth"):
        case_plots.plot_difference(replace(case, target=None), case.voided)


def test_examples_run(case):
    found = doctest.testmod(case_plots, extraglobs={"case": case})
    assert found.attempted > 10 and not found.failed
