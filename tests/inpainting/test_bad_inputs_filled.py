"""What the catalogue's accepted and warned-of cases are filled with: the right answer, in the file's own form."""

import logging
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bad_files import SECRET
from bad_inputs import ROWS, spoilt
from bad_places import BRIGHTEST, Place
from bad_volumes import BRAIN_VOXEL

import ldm_lib
from ldm_lib.__main__ import main
from ldm_lib.errors import InputError

CASE = "BraTS-GLI-00001-000"

pytestmark = pytest.mark.usefixtures("outputs")


@pytest.fixture(scope="module")
def fill(tiny_model_folder) -> Callable[[Place], nib.Nifti1Image]:
    """Inpaint a place's files, and read the result with nibabel."""

    def filled(place: Place) -> nib.Nifti1Image:
        output = place.root.parent / f"filled{''.join(place.P.suffixes[-2:]).lower()}"
        ldm_lib.inpaint(place.P, place.K, output, model=tiny_model_folder, num_inference_steps=2, device="cpu")
        return nib.load(output)

    return filled


@pytest.fixture(scope="module")
def plain(tmp_path_factory, fill) -> np.ndarray:
    """The good case, filled: (x, y, z) float64."""
    return fill(Place(tmp_path_factory.mktemp("plain") / "data", CASE)).get_fdata()


def require_only_the_mask_changed(place: Place, result: nib.Nifti1Image) -> None:
    """Law 1, by another reader: same form, same grid, and outside the mask the same numbers."""
    given, mask = nib.load(place.P), place.m > 0
    assert result.shape == given.shape and result.header.endianness == given.header.endianness
    assert result.get_data_dtype() == given.get_data_dtype() and type(result) is type(given)
    assert result.header.get_slope_inter() == given.header.get_slope_inter()
    np.testing.assert_array_equal(result.affine, given.affine)
    before, after = (image.get_fdata().reshape(mask.shape) for image in (given, result))
    np.testing.assert_array_equal(after[~mask], before[~mask])
    np.testing.assert_allclose(after[~mask], place.x[~mask], rtol=1e-6)
    assert np.isfinite(after[mask]).all() and (mask.sum() == 1 or after[mask].std() > 0)


ALIKE = {  # name -> what one unit of the good case is in it, and by how much rounding may differ, in its own units
    "big-endian": (1, 0),
    "NIfTI-2": (1, 0),
    "int64": (1, 0),
    "upper-case extension": (1, 0),
    "plain .nii": (1, 0),
    "mask 4D of one volume": (1, 0),
    "mask of 0 and 255": (1, 0),
    "float64": (1, 0.501),
    "slope and intercept": (1, 0.751),
    "uint16 up to 38580": (60, 30.6),
    "values of [0, 1]": (1 / BRIGHTEST, 0.51 / BRIGHTEST),
}


@pytest.mark.parametrize("name", ALIKE)
def test_another_encoding_of_the_same_case_gives_the_same_result(name, tmp_path, fill, plain):
    unit, rounding = ALIKE[name]
    place = spoilt(name, tmp_path / "data", CASE)
    result = fill(place)
    require_only_the_mask_changed(place, result)
    np.testing.assert_allclose(result.get_fdata().reshape(plain.shape), plain * unit, atol=rounding, rtol=1e-6)


def test_a_ras_copy_gives_the_result_of_its_lps_original(tmp_path, fill, plain):
    place = spoilt("RAS copy", tmp_path / "data", CASE)
    result = fill(place)
    require_only_the_mask_changed(place, result)
    assert nib.aff2axcodes(result.affine) == tuple("RAS")
    np.testing.assert_array_equal(result.get_fdata()[::-1, ::-1], plain)


@pytest.mark.parametrize("ending", [".mgz", ".nii.gz"])
def test_mgh_files_give_the_result_of_nifti_files_in_the_format_of_the_outputs_name(
    ending, tmp_path, tiny_model_folder, plain
):
    place = Place(tmp_path / "data", CASE)
    scan, mask = (path.with_name(path.name.replace(".nii.gz", ".mgz")) for path in (place.P, place.K))
    for given, path in ((place.P, scan), (place.K, mask)):
        image = nib.load(given)
        nib.save(nib.MGHImage(np.asarray(image.dataobj), image.affine), path)
        given.unlink()
    assert main(["validate", str(tmp_path / "data")]) == 0
    output = tmp_path / f"filled{ending}"
    few = ["--model", str(tiny_model_folder), "--steps", "2", "--device", "cpu"]
    assert main(["inpaint", "--t1n-voided", str(scan), "--mask", str(mask), "--output", str(output), *few]) == 0
    result = nib.load(output)
    assert isinstance(result, nib.MGHImage if ending == ".mgz" else nib.Nifti1Image)
    assert result.get_data_dtype().newbyteorder("=") == np.int16
    np.testing.assert_array_equal(result.get_fdata(), plain)
    np.testing.assert_allclose(result.affine, nib.load(scan).affine, atol=1e-5)


def test_an_outlier_changes_next_to_nothing_and_comes_back(tmp_path, fill, plain):
    place = spoilt("one outlier 1e30", tmp_path / "data", CASE)
    result = fill(place)
    require_only_the_mask_changed(place, result)
    assert result.get_fdata()[BRAIN_VOXEL] == np.float32(1e30)
    mask = place.m > 0
    np.testing.assert_allclose(result.get_fdata()[mask], plain[mask], atol=0.05 * plain[mask].max())


SHAPES = ["odd shape", "smaller than a patch", "anisotropic", "mask of one voxel", "mask touching the border"]
REST = [name for name, row in ROWS.items() if row.must != "reject" and name not in ALIKE and name not in SHAPES]


@pytest.mark.parametrize("name", [*SHAPES, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_the_output_equals_the_input_outside_the_mask(name, tmp_path, fill):
    place = spoilt(name, tmp_path / "data", CASE)
    try:
        result = fill(place)
    except InputError:
        assert "reject" in ROWS[name].must
        return
    require_only_the_mask_changed(place, result)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unusual_file_names_are_taken_literally(tmp_path, fill, form):
    place = Place(tmp_path / "data", CASE)
    place.move("t1n-voided", unicodedata.normalize(form, "BraTS [1]* é\n$(x).nii.gz"))
    shutil.copy(place.K, place.folder / "BraTS 1.nii.gz")  # what a glob would find
    require_only_the_mask_changed(place, fill(place))


def test_inpaint_reports_what_validate_reports(tmp_path, fill, caplog):
    place = spoilt("negative background", tmp_path / "data", CASE)
    with caplog.at_level(logging.WARNING):
        fill(place)
    assert re.search(ROWS["negative background"].says, caplog.text)


# ---- a folder of cases with their full images


UNREAD = [name for name, row in ROWS.items() if row.filled and "reject" not in row.filled]


def command(data: Path, output: Path, model: Path, *words: str) -> int:
    return main(["inpaint", "--data", str(data), "--output", str(output), "--model", str(model), "--steps", "1",
                 "--device", "cpu", *words])  # fmt: skip


def test_inpainting_a_folder_reads_neither_full_images_nor_parts_of_masks(tmp_path, tiny_model_folder, caplog):
    root, output = tmp_path / "data", tmp_path / "out"
    places = {name: spoilt(name, root, f"BraTS-GLI-{k:05d}-000") for k, name in enumerate(UNREAD)}
    unread = Place(root, "BraTS-GLI-00099-000", complete=True)
    unread.paths["t1n"].write_bytes(b"")
    unread.paths["mask-healthy"].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert command(root, output, tiny_model_folder) == 0
    for name, place in (places | {"unread": unread}).items():
        result = nib.load(output / f"{place.id}-t1n-inference.nii.gz")
        require_only_the_mask_changed(place, result)
        logged = "\n".join(line for line in caplog.messages if place.id in line)
        assert name == "unread" or ROWS[name].filled == "accept" or re.search(ROWS[name].says, logged)


# ---- on demand


def test_free_text_of_headers_stays_unless_it_is_scrubbed(tmp_path, tiny_model_folder, capsys, caplog):
    names = [name for name, row in ROWS.items() if row.secret]
    places = {name: spoilt(name, tmp_path / "data", f"BraTS-GLI-{k:05d}-000") for k, name in enumerate(names)}
    assert command(tmp_path / "data", tmp_path / "kept", tiny_model_folder) == 0
    assert command(tmp_path / "data", tmp_path / "scrubbed", tiny_model_folder, "--scrub-header") == 0
    out, err = capsys.readouterr()
    assert SECRET not in out + err + caplog.text
    for folder in ("kept", "scrubbed"):
        for record in (tmp_path / folder).rglob("*.[jc]s*"):
            assert SECRET not in record.read_text()
    for name, place in places.items():
        kept, scrubbed = (tmp_path / folder / f"{place.id}-t1n-inference.nii.gz" for folder in ("kept", "scrubbed"))
        require_only_the_mask_changed(place, nib.load(scrubbed))
        np.testing.assert_array_equal(nib.load(kept).get_fdata(), nib.load(scrubbed).get_fdata())
        free = [nib.load(path).header for path in (kept, scrubbed)]
        texts = [[h[field].item() for field in ("descrip", "db_name", "aux_file", "intent_name")] for h in free]
        assert any(SECRET.encode() in text for text in texts[0]) or free[0].extensions, name
        assert not any(texts[1]) and not free[1].extensions


FIXED = {  # name -> by how much the inpainted voxels may differ from the good case's, as a part of its brightest voxel
    "no orientation in any file": 0,
    "segmentation as mask": 0,
    "segmentation of 2023 as mask": 0,
    "NaN background": 0.501 / BRIGHTEST,
    "one NaN voxel": 0.05,
}


def test_every_row_with_a_fix_is_tested():
    assert set(FIXED) == {name for name, row in ROWS.items() if row.options}


@pytest.mark.parametrize("name", FIXED)
def test_an_input_that_relaxed_validation_accepts_is_inpainted(name, tmp_path, tiny_model_folder, plain):
    place, output = spoilt(name, tmp_path / "data", CASE), tmp_path / "filled.nii.gz"
    words = ["inpaint", "--t1n-voided", str(place.P), "--mask", str(place.K), "--output", str(output), "--model",
             str(tiny_model_folder), "--steps", "2", "--device", "cpu"]  # fmt: skip
    assert main(words) == 1 and not output.exists()
    assert main([*words, *ROWS[name].options]) == 0
    given, result = nib.load(place.P), nib.load(output)
    assert result.shape == given.shape and result.get_data_dtype() == given.get_data_dtype()
    before, after, mask = given.get_fdata(), result.get_fdata(), place.m > 0
    known = ~mask & ~np.isnan(before)
    np.testing.assert_array_equal(after[known], before[known])
    np.testing.assert_allclose(after[mask], plain[mask], atol=FIXED[name] * plain.max())
