"""Each row of the catalogue through the command line, in one pass over all of them, and what is accepted read right.

The bad cases lie next to good ones, which must be reported as if they were alone.
"""

import io
import json
import os
import re
import signal
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import ROWS, spoilt
from bad_places import COMPLETE, WORD, Place
from bad_volumes import BRAIN_VOXEL

from ldm_lib.__main__ import main
from ldm_lib.data.case import Case, case_of_files, load_case
from ldm_lib.data.cohort import audit, find_cases
from ldm_lib.data.model_grid import grid_case
from ldm_lib.errors import InputError
from ldm_lib.options import safe_name

NEIGHBOURS, CASE = {False: "BraTS-GLI-00008-000", True: "BraTS-GLI-00009-000"}, "BraTS-GLI-00001-000"
NOBODY = 65534
LINE = re.compile(r"\[(\d+)/(\d+)\] (OK|WARNING|ERROR) +(\S.*?)(?:: (.*))?")
EVERY = [name for name, row in ROWS.items() if not row.needs_user]

pytestmark = pytest.mark.usefixtures("outputs")


@dataclass(frozen=True)
class Validation:
    """What `validate` said of a folder: its exit status, per case "OK", "WARNING" or "ERROR" and a text, and JSON."""

    exit: int
    lines: dict[str, tuple[str, str]]
    rows: dict[str, dict[str, object]]
    everything: str


def validated(root: Path, json_file: Path, *words: str) -> Validation:
    """Run the command on a folder; everything but the last line must be a line about a case."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        status = main(["validate", str(root), "--json", str(json_file), *words])
    matches = [LINE.fullmatch(line) for line in printed.getvalue().splitlines()[:-1]]
    assert all(matches), printed.getvalue()
    assert [m.group(1, 2) for m in matches] == [(str(k), str(len(matches))) for k in range(1, len(matches) + 1)]
    lines = {m.group(4): (m.group(3), m.group(5) or "") for m in matches}
    rows = {row["case"]: row for row in json.loads(json_file.read_text())}
    assert rows.keys() == lines.keys() and len(lines) == len(matches)
    return Validation(status, lines, rows, printed.getvalue() + json_file.read_text())


@pytest.fixture(scope="module")
def pass_over_all(tmp_path_factory) -> tuple[dict[str, Place], Validation]:
    """Every row's case and two good ones in one folder, and what one run of the command says of them."""
    folder = tmp_path_factory.mktemp("catalogue")
    root, before = folder / "data", signal.getsignal(signal.SIGTERM)
    for complete, identity in NEIGHBOURS.items():
        Place(root, identity, complete=complete)
    places = {name: spoilt(name, root, f"BraTS-GLI-{k:05d}-000") for k, name in enumerate(EVERY, start=10)}
    found = validated(root, folder / "findings.json")
    signal.signal(signal.SIGTERM, before)
    return places, found


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict[bool, set[str]]:
    """What is reported of a good case, without (False) and with (True) its full image."""
    reported = {}
    for complete in (False, True):
        root = tmp_path_factory.mktemp("good")
        Place(root, complete=complete)
        (row,) = audit(root)
        reported[complete] = set(row.reason.split("; "))
    return reported


@contextmanager
def as_a_user() -> Iterator[None]:
    """Rights matter: root, who may read everything, is nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(NOBODY)
    except PermissionError:
        pytest.skip("root cannot give up its rights here")
    try:
        yield
    finally:
        os.seteuid(0)


def require_reported(name: str, place: Place, found: Validation, usual: set[str]) -> None:
    """Line and JSON say what the row must, agree with each other, and reveal nothing private."""
    row, key = ROWS[name], place.id if place.id in found.rows else repr(place.id)
    (word, text), status = found.lines[key], found.rows[key]["status"]
    assert found.rows[key]["reason"] == text and WORD[status] == word
    reported = "; ".join(part for part in text.split("; ") if part not in usual)
    effective = "ok" if status == "warning" and not reported else status  # a good case may lack maps
    assert effective in row.statuses, f"{status}: {text}"
    if effective != "ok":
        assert re.search(row.says, reported, re.DOTALL), text
    assert not row.secret or row.secret not in found.everything
    assert word != "ERROR" or re.search(r"[^.]\. Fix: \S.*[.?]$", text), text
    if word == "ERROR" and _is_safe(place.id):
        assert re.match(rf"{re.escape(place.id)}(/\S+)?: ", text), f"not relative to the data folder: {text}"


def _is_safe(identity: str) -> bool:
    try:
        return bool(safe_name(identity))
    except ValueError:
        return False


@pytest.mark.parametrize("name", EVERY)
def test_the_command_line_does_what_the_row_says(name, pass_over_all, usual):
    places, found = pass_over_all
    require_reported(name, places[name], found, usual[ROWS[name].complete])


def test_every_bad_case_of_the_catalogue_is_reported_in_one_pass(pass_over_all, usual):
    places, found = pass_over_all
    assert found.exit == 1 and len(found.lines) == len(EVERY) + len(NEIGHBOURS)
    keys = {name: place.id if place.id in found.lines else repr(place.id) for name, place in places.items()}
    assert len({*keys.values(), *NEIGHBOURS.values()}) == len(found.lines), "each row has a line of its own"
    words = {name: found.lines[key][0] for name, key in keys.items()}
    assert [n for n in EVERY if "reject" not in ROWS[n].must and words[n] == "ERROR"] == []
    assert [n for n in EVERY if ROWS[n].must == "reject" and words[n] != "ERROR"] == []
    rejected = sum(word == "ERROR" for word, _ in found.lines.values())
    assert rejected == list(words.values()).count("ERROR") and f", {rejected} rejected\n" in found.everything
    root = places[EVERY[0]].root
    assert str(root) not in found.everything and "Traceback" not in found.everything
    for complete, identity in NEIGHBOURS.items():
        assert set(found.lines[identity][1].split("; ")) == usual[complete]


def test_the_exit_status_of_what_is_accepted_is_0_and_of_each_bad_case_1(tmp_path, monkeypatch):
    """One pass over all that must be accepted; each of the others in a folder of its own."""
    accepted = [name for name in EVERY if "reject" not in ROWS[name].must]
    for k, name in enumerate(accepted, start=10):
        spoilt(name, tmp_path / "accepted", f"BraTS-GLI-{k:05d}-000")
    assert validated(tmp_path / "accepted", tmp_path / "findings.json").exit == 0
    for k, name in enumerate(name for name in EVERY if ROWS[name].must == "reject"):
        place = spoilt(name, tmp_path / f"{k}", CASE)
        with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
            status = main(["validate", str(place.root)])
        assert (name, status) == (name, 1) and "ERROR " in printed.getvalue(), printed.getvalue()


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.needs_user])
def test_files_that_this_user_may_not_read_are_rejected(name, usual):
    before = os.umask(0o022)  # the command line has set another
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        root = Path(folder) / "data"
        Place(root, NEIGHBOURS[False])
        place = spoilt(name, root, CASE)
        with as_a_user():
            found = validated(root, Path(folder) / "findings.json")
        os.umask(before)
    assert found.exit == 1
    require_reported(name, place, found, usual[False])


@pytest.mark.parametrize("role", COMPLETE)
def test_every_file_of_a_case_passes_the_same_validation(role, tmp_path):
    place = Place(tmp_path / "data", CASE, complete=True)
    path = place.paths[role]
    path.write_bytes(path.read_bytes()[:-8])
    (row,) = audit(place.root)
    assert row.status == "refused" and re.match(rf"{CASE}/{re.escape(path.name)}: gzip ends early", row.reason)


# ---- the same case, accepted by an option


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.options])
def test_a_rejected_case_is_accepted_with_the_option_for_it(name, tmp_path):
    Place(tmp_path / "data", NEIGHBOURS[False])
    spoilt(name, tmp_path / "data", CASE)
    found = validated(tmp_path / "data", tmp_path / "findings.json", *ROWS[name].options)
    assert found.exit == 0 and found.lines[CASE][0] in ("OK", "WARNING")


@pytest.mark.parametrize("words", [("--assume-orientation", "LXS"), ("--assume-orientation", "LLS"),
                                   ("--mask-labels", "1,x"), ("--mask-labels", "-1")])  # fmt: skip
def test_an_option_without_meaning_is_rejected(tmp_path, words, capsys):
    Place(tmp_path / "data", CASE)
    try:
        status = main(["validate", str(tmp_path / "data"), *words])
    except SystemExit as usage:
        status = usage.code
    err = capsys.readouterr().err
    assert status in (1, 2) and words[0].lstrip("-") in err.replace("_", "-") and "unrecognized" not in err


# ---- a case that is not rejected is read correctly


@pytest.fixture(scope="module")
def found_cases(pass_over_all) -> dict[str, Case]:
    """The cases of the catalogue by id, as they are found in the folder of all of them."""
    places, _ = pass_over_all
    return {case.id: case for case in find_cases(places[EVERY[0]].root)}


@pytest.mark.parametrize("name", [name for name in EVERY if ROWS[name].must != "reject"])
def test_a_case_that_is_not_rejected_is_read_correctly(name, pass_over_all, found_cases):
    places, found = pass_over_all
    place = places[name]
    if not _is_safe(place.id) or found.rows[place.id]["status"] == "refused":
        assert "reject" in ROWS[name].must
        return
    data = load_case(found_cases[place.id])
    shifted = any("the background is" in text for text in data.warnings)
    background = place.x.flat[0] if shifted else 0
    expected = place.x.astype(np.float64) - background
    np.testing.assert_allclose(data.source.voxels, expected, rtol=0, atol=1e-4 if shifted else 0)
    np.testing.assert_array_equal(data.mask, place.m > 0)
    np.testing.assert_allclose(data.source.affine, place.A, atol=1e-4)
    assert np.isfinite(data.voided).all() and not data.voided[data.mask].any()


FILLED = [name for name, row in ROWS.items() if row.filled]


@pytest.mark.parametrize("name", FILLED)
def test_inpainting_is_warned_about_the_image_and_the_mask_alone(name, tmp_path):
    row, place = ROWS[name], spoilt(name, tmp_path / "data", CASE)
    try:
        warnings = load_case(case_of_files(place.P, place.K)).warnings
    except InputError as error:
        assert "reject" in row.filled and re.search(row.says, str(error))
        return
    usual = load_case(case_of_files(*(Place(tmp_path / "good", CASE).paths.values()))).warnings
    reported = "; ".join(warning for warning in warnings if warning not in usual)
    assert re.search(row.says, reported) if "warn" in row.filled else "accept" in row.filled and not reported


def test_an_outlier_is_not_seen(tmp_path):
    """The network sees the median of the neighbours in its place, and a scale that does not know it."""
    places = Place(tmp_path / "clean", CASE), spoilt("one outlier 1e30", tmp_path / "data", CASE)
    clean, data = (load_case(case_of_files(place.P, place.K)) for place in places)
    assert data.scale == pytest.approx(clean.scale, rel=0.01)
    seen, expected = grid_case(data, 1).voided, grid_case(clean, 1).voided
    elsewhere = np.ones(seen.shape, bool)
    elsewhere[BRAIN_VOXEL] = False
    np.testing.assert_allclose(seen[elsewhere], expected[elsewhere], rtol=0.01)
    around = expected[tuple(slice(i - 1, i + 2) for i in BRAIN_VOXEL)]
    neighbours = np.delete(around.ravel(), around.size // 2)
    assert seen[BRAIN_VOXEL] == pytest.approx(np.median(neighbours), rel=0.1)
    assert data.source.voxels[BRAIN_VOXEL] == np.float32(1e30)


# ---- more laws


@pytest.mark.parametrize("name", ["claims 32767^3 voxels", "claims 1290^3 voxels", "extension claims 2 GB"])
def test_memory_is_flat_whatever_a_file_claims(name, tmp_path):
    place = spoilt(name, tmp_path / "data", CASE)
    tracemalloc.start()
    try:
        (row,) = audit(place.root)
        assert row.status == "refused" and tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()
