"""Maps made from a scan: made once, made again when anything they came from changed, and never when they do not fit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy import registration, tissue_segmentation
from ldm_lib.data import conditioning_maps
from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.conditioning_maps import (
    add_conditioning_maps,
    made_by,
    make_conditioning_maps,
    make_growth_map,
    make_tissue_map,
)
from ldm_lib.data.mask_synthesis import void
from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
from ldm_lib.errors import InputError
from ldm_lib.images.masks import read_labels, read_unit_map
from ldm_lib.images.volume import write_map


@pytest.fixture
def case(cases, tmp_path):
    """A case of which every file may be changed."""
    copied = {role: shutil.copy(path, tmp_path / f"{role}-{path.name}") for role, path in cases[0].files().items()}
    return replace(cases[0], **copied)


@pytest.fixture
def by_atlas(monkeypatch, made_tissue):
    """Stands in for the registration, which is tested elsewhere, and counts how often it was asked for."""
    asked = []
    monkeypatch.setattr(tissue_segmentation, "tissue_from_scan", lambda *_, **how: asked.append(how) or made_tissue)
    return asked


def test_a_map_is_made_once_and_then_found(case, tmp_path, by_atlas, made_tissue):
    first = make_tissue_map(load_case(case), tmp_path / "maps" / "t.nii.gz")
    again = make_tissue_map(load_case(case), tmp_path / "maps" / "t.nii.gz")
    assert len(by_atlas) == 1 and first.made_now and not again.made_now and again.record == first.record
    np.testing.assert_array_equal(read_labels(first.path, load_case(case).source, (0, 1, 2, 3)), made_tissue.labels)
    assert first.record["found"]["brain_dice"] == made_tissue.registration.brain_dice
    assert set(first.record["from"]) == {"scan", "mask"} and not first.failure


def test_a_change_of_any_source_makes_the_map_again(case, tmp_path, by_atlas, monkeypatch):
    case = case.to_inpaint()
    path, data = tmp_path / "t.nii.gz", load_case(case)
    make_tissue_map(data, path)
    larger = ndimage.binary_dilation(data.mask).astype(np.uint8)
    write_map(case.mask, larger, data.source.affine)
    make_tissue_map(load_case(case), path)
    write_map(case.t1n_voided, (data.voided + (data.voided > 0)).astype(np.int16), data.source.affine)
    make_tissue_map(load_case(case), path)
    make_tissue_map(load_case(case), path, refine="none")
    make_tissue_map(load_case(case), path, refine="none", lesion=data.mask)
    monkeypatch.setattr(conditioning_maps, "CODE_VERSION", 99)
    make_tissue_map(load_case(case), path, refine="none", lesion=data.mask)
    assert len(by_atlas) == 6
    path.write_bytes(path.read_bytes()[:-1])
    assert make_tissue_map(load_case(case), path, refine="none", lesion=data.mask).made_now
    assert not make_tissue_map(load_case(case), path, refine="none", lesion=data.mask).made_now


def test_the_full_image_is_no_source(case, tmp_path, by_atlas):
    """What lies under the mask neither makes a map nor makes it again."""
    path, data = tmp_path / "t.nii.gz", load_case(case)
    make_tissue_map(data, path)
    write_map(case.t1n, np.where(data.mask, 7, data.target).astype(np.int16), data.source.affine)
    assert not make_tissue_map(load_case(case), path).made_now


def test_a_map_that_does_not_fit_is_reported_and_not_kept(case, tmp_path, by_atlas, monkeypatch):
    path = tmp_path / "t.nii.gz"
    make_tissue_map(load_case(case), path)
    monkeypatch.setattr(registration, "MIN_DICE", 1.01)
    failed = make_tissue_map(load_case(case), path, refine="none")
    assert not path.exists() and "brains overlap by Dice" in failed.failure and failed.registration is not None
    assert not make_tissue_map(load_case(case), path, refine="none").made_now
    equipped, made = add_conditioning_maps(case, tmp_path, tissue=True, growth=True)
    assert equipped.tissue is None and equipped.growth == case.growth and len(made) == 1


def test_a_scan_that_cannot_be_registered_at_all_fails_like_one_that_does_not_fit(case, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise InputError("too few voxels", where="registration")

    monkeypatch.setattr(tissue_segmentation, "tissue_from_scan", fail)
    failed = make_tissue_map(load_case(case), tmp_path / "t.nii.gz")
    assert failed.failure == "registration: too few voxels." and not failed.path.exists()
    assert add_conditioning_maps(case, tmp_path, tissue=True, growth=True)[0].tissue is None


def test_who_made_a_map(case, tmp_path, by_atlas):
    made = make_tissue_map(load_case(case), tmp_path / "t.nii.gz")
    assert made_by(None) == "none" and made_by(case.tissue) == "given"
    assert made_by(made.path) == made.record["made_by"] and "MNI152" in made_by(made.path)
    shutil.copy(case.tissue, made.path)
    assert made_by(made.path) == "given"
    for text in ("{not json", json.dumps({"made_by": "somebody"})):
        (tmp_path / "t.json").write_text(text)
        assert made_by(made.path) == "given"


def test_a_tumour_grown_from_an_unhealthy_mask_shows_inside_it(tmp_path):
    make_synthetic_cohort(tmp_path, 1, first=0, spacing_mm=4.0, masks=1)
    data = load_case(find_cases(tmp_path / "data")[0])
    made = make_growth_map(data, data.tissue, tmp_path / "growth.nii.gz")
    growth = read_unit_map(made.path, data.source)
    visible, truth = growth >= 0.2, data.growth >= 0.2
    assert not (visible & ~data.unhealthy).any()
    assert 2 * (visible & truth).sum() / (visible.sum() + truth.sum()) > 0.7
    assert not make_growth_map(data, data.tissue, made.path).made_now
    assert make_growth_map(data, data.tissue, made.path, days=3).made_now


def test_a_tumour_needs_a_start(cases, tmp_path):
    data = load_case(cases[0])
    for unhealthy in (None, np.zeros(data.mask.shape, bool)):
        with pytest.raises(InputError, match="no unhealthy mask to start a tumour from"):
            make_growth_map(replace(data, unhealthy=unhealthy), data.tissue, tmp_path / "g.nii.gz")


def test_only_what_is_asked_for_is_made(case, tmp_path, by_atlas):
    assert add_conditioning_maps(case, tmp_path, tissue=False, growth=False) == (case, [])
    bare = replace(case, tissue=None, growth=None)
    equipped, made = add_conditioning_maps(bare, tmp_path, tissue=True, growth=True)
    assert [prior.path for prior in made] == [equipped.tissue, equipped.growth]
    assert equipped.tissue.parent.name == "tissue_segmentation" and equipped.growth.parent.name == "growth_model"
    healthy, made = add_conditioning_maps(replace(bare, mask_unhealthy=None), tmp_path, tissue=True, growth=True)
    assert healthy.growth is None and len(made) == 1


def test_maps_of_one_scan(case, tmp_path, by_atlas):
    data = load_case(case)
    start = np.argwhere(by_atlas_labels(data, tmp_path) == 3)[0]
    seed_mm = (data.source.affine @ [*start, 1])[:3]
    outputs = {"tissue": tmp_path / "t.nii.gz", "growth": tmp_path / "g.nii.gz"}
    made = make_conditioning_maps(case.t1n_voided, case.mask, **outputs, seed_mm=seed_mm, days=200)
    growth = read_unit_map(made[1].path, data.source)
    assert growth[tuple(start)] > 0.2 and made[1].record["settings"]["days"] == 200
    assert made[1].record["settings"]["seed_mm"] == [float(v) for v in seed_mm]


@pytest.mark.parametrize("role", ["t1n_voided", "mask", "segmentation"])
def test_a_map_never_takes_the_place_of_what_it_is_made_from(case, tmp_path, by_atlas, role):
    files = {"t1n_voided": case.t1n_voided, "mask": case.mask, "segmentation": case.mask_unhealthy}
    before = {name: path.read_bytes() for name, path in files.items()}
    with pytest.raises(InputError, match=r"is one of the inputs\. Fix: name another output"):
        make_conditioning_maps(case.t1n_voided, case.mask, tissue=tmp_path / "t.nii.gz", growth=files[role],
                    segmentation=files["segmentation"])  # fmt: skip
    with pytest.raises(InputError, match=r"would hold both maps\. Fix: name two files"):
        make_conditioning_maps(case.t1n_voided, case.mask, tissue=tmp_path / "t.nii.gz", growth=tmp_path / "t.nii.gz",
                    segmentation=files["segmentation"])  # fmt: skip
    assert {name: path.read_bytes() for name, path in files.items()} == before and not by_atlas


def by_atlas_labels(data, folder):
    return read_labels(make_tissue_map(data, folder / "start.nii.gz").path, data.source, (0, 1, 2, 3))


@pytest.mark.parametrize("wrong", [
    {"growth": "g.nii.gz"},
    {"seed_mm": (0, 0, 0)},
    {"segmentation": "s.nii.gz"},
    {"growth": "g.nii.gz", "seed_mm": (0, 0, 0), "segmentation": "s.nii.gz"},
])  # fmt: skip
def test_growth_needs_an_output_and_one_start(case, tmp_path, by_atlas, wrong):
    with pytest.raises(InputError, match="growth: a growth map needs an output and one start"):
        make_conditioning_maps(case.t1n_voided, case.mask, tissue=tmp_path / "t.nii.gz", **wrong)
    assert not by_atlas


def test_a_case_without_a_voided_file_is_voided_here(case, tmp_path, by_atlas):
    """Two full images that differ under the mask only are one scan to the registration."""
    data = load_case(replace(case, t1n_voided=None))
    np.testing.assert_array_equal(data.voided, void(data.target, data.mask))
