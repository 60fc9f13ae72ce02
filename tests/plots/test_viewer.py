"""The explorer: always a static figure, a widget only in an interactive session."""

import numpy as np
import pytest

from ldm_lib.plots import viewer

RNG = np.random.default_rng(0)
VOLUMES = {"voided": RNG.random((10, 12, 8)), "target": RNG.random((10, 12, 8))}
MASK = np.zeros((10, 12, 8), bool)
MASK[3:6, 4:7, 2:5] = True


class Kernel:
    """Stand in for a shell with a front end."""

    kernel = object()


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(viewer, "get_ipython", Kernel)
    monkeypatch.delenv(viewer.HEADLESS_VARIABLE, raising=False)
    monkeypatch.delenv(viewer.OWNER_VARIABLE, raising=False)


def explore(**options):
    return viewer.explore(VOLUMES, spacing_mm=(1, 1, 1), mask=MASK, **options)


def parts(explorer):
    top, positions, image = explorer.widget.children
    return (*top.children, *positions.children, image)


def test_without_a_front_end_there_is_a_figure_and_no_widget():
    explorer = explore()
    assert explorer.widget is None
    assert [ax.get_ylabel() for ax in explorer.figure.axes[::3]] == ["voided", "target"]


@pytest.mark.parametrize("variable", ["HEADLESS_VARIABLE", "OWNER_VARIABLE"])
def test_a_headless_run_makes_no_widget(live, monkeypatch, variable):
    assert viewer.is_interactive()
    monkeypatch.setenv(getattr(viewer, variable), "1")
    assert explore().widget is None


def test_every_control_redraws_the_image(live):
    volume, window, outline, x, _, z, image = parts(explore())
    first = image.value
    assert bytes(first).startswith(b"\x89PNG")
    moves = [(volume, "target"), (window, (0.2, 0.6)), (outline, False), (x, 0), (z, 7)]
    pictures = [first]
    for control, value in moves:  # cumulative, so that every image drawn is compared
        control.value = value
        assert image.value not in pictures, control.description
        pictures.append(image.value)
    z.value = 3
    assert image.value == pictures[-2], "the image depends on the present values of the controls only"


def test_sliders_start_at_the_centre_of_the_mask_and_end_at_the_volume(live):
    *_, x, y, z, _image = parts(explore())
    assert [(s.min, s.value, s.max) for s in (x, y, z)] == [(0, 4, 9), (0, 5, 11), (0, 3, 7)]


def test_ordered_volumes_are_selected_by_a_slider(live):
    choice = parts(explore(along="age"))[0]
    assert type(choice).__name__ == "SelectionSlider"
    assert choice.options == ("voided", "target") and choice.description == "age"


def test_the_static_figure_is_displayed_above_the_widget(live, monkeypatch):
    displayed = []
    monkeypatch.setattr(viewer, "display", displayed.append)
    explorer = explore()
    explorer._ipython_display_()
    assert displayed == [explorer.figure, explorer.widget]
