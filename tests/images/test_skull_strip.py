"""The brain of a head is found by deepbet: mostly by a stand-in with its interface, once by the package itself."""

import sys
from importlib.util import find_spec

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform
from packages import deepbet_stand_in

from ldm_lib.__main__ import main
from ldm_lib.data.case import case_of_files, load_case
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.images.options import ReadOptions

SPACING_MM = 4.0
AFFINE = np.diag([-SPACING_MM, -SPACING_MM, SPACING_MM, 1])
POSITION = (np.indices((50, 56, 48)).T - (25, 28, 24)).T * SPACING_MM


def ball(radius_mm, place=(0, 0, 0)):
    return sum((p - c) ** 2 for p, c in zip(POSITION, place, strict=True)) <= radius_mm**2


BRAIN, MASK = ball(64), ball(20, (40, 0, 0))
SCALP = (ball(88) | (POSITION[2] < 0) & (np.hypot(*POSITION[:2]) < 60)) & ~BRAIN
HEAD = (BRAIN * 100 + SCALP * 150.5).astype(np.float32)


@pytest.fixture
def deepbet(tmp_path):
    with deepbet_stand_in(tmp_path / "packages"):
        yield


def case(folder, head=HEAD, mask=MASK, affine=AFFINE, order="LPS"):
    paths = [folder / f"{name}-{order}.nii.gz" for name in ("head", "lesion")]
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(order))
    for path, array in zip(paths, (head.astype(np.float32), mask.astype(np.uint8)), strict=True):
        nib.save(nib.Nifti1Image(array, affine).as_reoriented(turn), path)
    return case_of_files(*paths, read_options=ReadOptions(skull_strip=True))


def test_a_made_brain_mask_is_used_like_a_given_one(deepbet, tmp_path):
    data = load_case(case(tmp_path))
    np.testing.assert_array_equal(data.brain, BRAIN)
    np.testing.assert_array_equal(data.mask, MASK & BRAIN)
    np.testing.assert_array_equal(data.voided, np.where(BRAIN & ~MASK, 100, 0))
    np.testing.assert_array_equal(data.source.raw, HEAD)
    brain_ml = (BRAIN & ~MASK).sum() * SPACING_MM**3 / 1000
    assert f"no brain mask given, made with deepbet: {brain_ml:.0f} mL" in data.warnings


def test_voxels_under_the_mask_are_not_read(deepbet, tmp_path):
    other = np.where(MASK, np.random.default_rng(0).integers(1, 99, MASK.shape), HEAD)
    one, another = (load_case(case(tmp_path, head)) for head in (HEAD, other))
    np.testing.assert_array_equal(one.brain, another.brain)
    np.testing.assert_array_equal(one.voided, another.voided)


@pytest.mark.parametrize(
    ("head", "cause"),
    [
        (np.where(BRAIN, 150.5, HEAD), r"head-LPS.nii.gz: deepbet finds no brain in it. Fix: check its orient"),
        (np.where(BRAIN & ~ball(40), 150.5, HEAD), r"finds 2\d\d mL of brain; allowed: 300 to 2500. Fix: check"),
        (np.where(SCALP, 150, HEAD), r"finds \d{4} mL of brain; allowed: 300 to 2500. .* --brain-mask FILE`"),
    ],
)
def test_a_head_whose_brain_is_not_found_is_rejected_in_one_line(deepbet, tmp_path, head, cause):
    with pytest.raises(InputError, match=cause) as error:
        load_case(case(tmp_path, head))
    assert "\n" not in str(error.value)


def test_without_the_package_the_error_names_it_and_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "deepbet", None)  # an import of it fails
    monkeypatch.setattr("ldm_lib.images.options.find_spec", lambda name: None)
    line = (
        "skull_strip: the package deepbet, which finds brains, is not installed. "
        "Fix: pip install 'brain-mri-inpainting[whole-head]'."
    )
    with pytest.raises(ConfigError) as error:
        ReadOptions(skull_strip=True)
    assert str(error.value) == line
    assert main(["validate", str(tmp_path), "--skull-strip"]) == 1
    assert capsys.readouterr().err == f"ERROR {line}\n"


def test_validate_strips_heads_and_rejects_them_without_the_option(deepbet, tmp_path, capsys):
    head = case(tmp_path)
    folder = tmp_path / "data/BraTS-GLI-00001-000"
    folder.mkdir(parents=True)
    head.t1n_voided.rename(folder / "BraTS-GLI-00001-000-t1n-voided.nii.gz")
    head.mask.rename(folder / "BraTS-GLI-00001-000-mask.nii.gz")
    assert main(["validate", str(tmp_path / "data")]) == 1
    printed = capsys.readouterr().out
    assert "not skull-stripped" in printed and "Fix: let its brain mask be made with --skull-strip, or" in printed
    assert main(["validate", str(tmp_path / "data"), "--skull-strip"]) == 0
    assert "1 usable" in capsys.readouterr().out


@pytest.mark.slow
def test_the_package_itself_finds_the_brain_of_a_synthetic_head_in_any_voxel_order(cases, tmp_path):
    """The brain of the synthetic cohort in a bright scalp; both voxel orders give the same brain."""
    if not find_spec("deepbet"):
        pytest.skip("deepbet is not installed: pip install 'brain-mri-inpainting[whole-head]'")
    data = load_case(cases[0])
    brain = data.voided > 0
    position = (np.indices(brain.shape).T - np.argwhere(brain).mean(0)).T * data.source.spacing_mm[0]
    scalp = (sum((p / r) ** 2 for p, r in zip(position, (90, 110, 90), strict=True)) <= 1) & ~brain
    head = np.where(scalp, 0.3 * data.scale, data.voided)
    found = []
    for order in ("LPS", "RAS"):
        found.append(load_case(case(tmp_path, head, data.mask, data.affine, order)))
    dice = 2 * (found[0].brain & brain).sum() / (found[0].brain.sum() + brain.sum())
    assert dice > 0.85
    np.testing.assert_array_equal(found[1].lps(found[1].brain), found[0].lps(found[0].brain))
