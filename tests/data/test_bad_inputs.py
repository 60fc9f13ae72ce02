"""Each row of the catalogue through the audit and through the command line, and what is accepted read right.

Every bad case lies next to a good one, which must be reported as if it were alone.
"""

import json
import os
import re
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import ROWS, spoilt
from bad_places import COMPLETE, WORD, Place
from bad_volumes import BRAIN_VOXEL

from ldm_lib.__main__ import main
from ldm_lib.data.case import CaseData, case_of_files, load_case
from ldm_lib.data.cohort import AuditRow, audit
from ldm_lib.data.model_grid import grid_case
from ldm_lib.errors import InputError
from ldm_lib.options import safe_name

NEIGHBOUR, CASE = "BraTS-GLI-00009-000", "BraTS-GLI-00001-000"
NOBODY = 65534
LINE = re.compile(r"\[(\d+)/(\d+)\] (OK|WARNING|ERROR) +(\S.*?)(?:: (.*))?")

pytestmark = pytest.mark.usefixtures("outputs")


@dataclass(frozen=True)
class Validation:
    """What `validate` said of a folder: its exit status, per case "OK", "WARNING" or "ERROR" and a text, and JSON."""

    exit: int
    lines: dict[str, tuple[str, str]]
    rows: dict[str, dict[str, object]]
    everything: str


@pytest.fixture
def validate(tmp_path, capsys):
    """Run the command on a folder; everything but the last line must be a line about a case."""

    def run(root: Path, *words: str, json_file: Path = tmp_path / "findings.json") -> Validation:
        status = main(["validate", str(root), "--json", str(json_file), *words])
        out, err = capsys.readouterr()
        matches = [LINE.fullmatch(line) for line in out.splitlines()[:-1]]
        assert all(matches), out
        assert [m.group(1, 2) for m in matches] == [(str(k), str(len(matches))) for k in range(1, len(matches) + 1)]
        lines = {m.group(4): (m.group(3), m.group(5) or "") for m in matches}
        rows = {row["case"]: row for row in json.loads(json_file.read_text())}
        assert rows.keys() == lines.keys() and len(lines) == len(matches)
        return Validation(status, lines, rows, out + err + json_file.read_text())

    return run


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


def unusual(reason: str, usual: set[str]) -> str:
    """A reason without what is reported of a good case too."""
    return "; ".join(part for part in reason.split("; ") if part not in usual)


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


@pytest.fixture
def spacious(tmp_path) -> Iterator[Path]:
    """A folder that any user may enter."""
    before = os.umask(0o022)  # the command line has set another
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)
    os.umask(before)


def other_than_the_neighbour(names):
    (name,) = (name for name in names if name != NEIGHBOUR)
    return name


def require_reported(name: str, status: str, reason: str, usual: set[str]) -> None:
    """The row's status and text; a good case's status is "ok", whatever maps it lacks."""
    row, reported = ROWS[name], unusual(reason, usual)
    effective = "ok" if status == "warning" and not reported else status
    assert effective in row.statuses, f"{status}: {reason}"
    if effective != "ok":
        assert re.search(row.says, reported, re.DOTALL), reason
    assert not row.secret or row.secret not in reason


EVERY = [name for name, row in ROWS.items() if not row.needs_user]


@pytest.mark.parametrize("name", EVERY)
def test_the_audit_does_what_the_row_says(name, tmp_path, usual):
    row, root = ROWS[name], tmp_path / "data"
    Place(root, NEIGHBOUR, complete=row.complete)
    spoilt(name, root, CASE)
    found = {row.key: row for row in audit(root)}
    one = found[other_than_the_neighbour(found)]
    require_reported(name, one.status, one.reason, usual[row.complete])
    assert set(found[NEIGHBOUR].reason.split("; ")) == usual[row.complete]


@pytest.mark.parametrize("name", EVERY)
def test_the_command_line_does_what_the_row_says(name, tmp_path, usual, validate):
    row, root = ROWS[name], tmp_path / "data"
    Place(root, NEIGHBOUR, complete=row.complete)
    require_command(name, spoilt(name, root, CASE), validate(root), usual[row.complete])


def require_command(name: str, place: Place, found: Validation, usual: set[str]) -> None:
    """Line, JSON and exit status agree with the row and with each other, and reveal nothing private."""
    key = other_than_the_neighbour(found.lines)
    word, text = found.lines[key]
    assert found.rows[key]["reason"] == text and WORD[found.rows[key]["status"]] == word
    require_reported(name, found.rows[key]["status"], text, usual)
    assert found.exit == (word == "ERROR")
    assert str(place.root) not in found.everything, "an absolute path"
    assert "Traceback" not in found.everything
    assert not ROWS[name].secret or ROWS[name].secret not in found.everything
    assert word != "ERROR" or re.search(r"[^.]\. Fix: \S.*[.?]$", text), text
    if word == "ERROR" and _is_safe(place.id):
        assert re.match(rf"{re.escape(place.id)}(/\S+)?: ", text), f"not relative to the data folder: {text}"
    assert found.rows[NEIGHBOUR]["status"] != "refused"
    assert set(found.lines[NEIGHBOUR][1].split("; ")) == usual


def _is_safe(identity: str) -> bool:
    try:
        return bool(safe_name(identity))
    except ValueError:
        return False


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.needs_user])
def test_files_that_this_user_may_not_read_are_rejected(name, spacious, validate, usual):
    root = spacious / "data"
    Place(root, NEIGHBOUR)
    place = spoilt(name, root, CASE)
    with as_a_user():
        found = validate(root, json_file=spacious / "findings.json")
    require_command(name, place, found, usual[False])


def test_every_bad_case_of_the_catalogue_is_reported_in_one_pass(tmp_path, usual, validate):
    root = tmp_path / "data"
    places = {f"BraTS-GLI-{k:05d}-000": (name, spoilt(name, root, f"BraTS-GLI-{k:05d}-000"))
              for k, name in enumerate(EVERY, start=10)}  # fmt: skip
    found = validate(root)
    assert found.exit == 1 and len(found.lines) == len(EVERY)
    for identity, (name, place) in places.items():
        if place.id == identity:  # those renamed are reported under another key
            row = found.rows[identity]
            require_reported(name, row["status"], row["reason"], usual[ROWS[name].complete])


@pytest.mark.parametrize("role", COMPLETE)
def test_every_file_of_a_case_passes_the_same_validation(role, tmp_path, validate):
    place = Place(tmp_path / "data", CASE, complete=True)
    path = place.paths[role]
    path.write_bytes(path.read_bytes()[:-8])
    word, text = validate(place.root).lines[CASE]
    assert word == "ERROR" and re.match(rf"{CASE}/{re.escape(path.name)}: gzip ends early", text)


# ---- the same case, accepted by an option


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.options])
def test_a_rejected_case_is_accepted_with_the_option_for_it(name, tmp_path, validate):
    Place(tmp_path / "data", NEIGHBOUR)
    spoilt(name, tmp_path / "data", CASE)
    assert validate(tmp_path / "data").exit == 1
    found = validate(tmp_path / "data", *ROWS[name].options)
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


def loaded(place: Place) -> CaseData:
    return load_case(next(row.case for row in audit(place.root)))


NOT_ALWAYS_REJECTED = [name for name in EVERY if ROWS[name].must != "reject"]


@pytest.mark.parametrize("name", NOT_ALWAYS_REJECTED)
def test_a_case_that_is_not_rejected_is_read_correctly(name, tmp_path):
    place = spoilt(name, tmp_path / "data", CASE)
    (row,) = audit(place.root) if _is_safe(place.id) else [AuditRow("", "refused", "", None, {})]
    if row.status == "refused":
        assert "reject" in ROWS[name].must
        return
    data = load_case(row.case)
    np.testing.assert_array_equal(data.source.voxels, place.x.astype(np.float32))
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
    clean, data = loaded(Place(tmp_path / "clean", CASE)), loaded(spoilt("one outlier 1e30", tmp_path / "data", CASE))
    assert data.scale == pytest.approx(clean.scale, rel=0.01)
    seen, expected = grid_case(data, 1).voided, grid_case(clean, 1).voided
    elsewhere = np.ones(seen.shape, bool)
    elsewhere[BRAIN_VOXEL] = False
    np.testing.assert_allclose(seen[elsewhere], expected[elsewhere], rtol=0.01)
    around = expected[tuple(slice(i - 1, i + 2) for i in BRAIN_VOXEL)]
    neighbours = np.delete(around.ravel(), around.size // 2)
    assert seen[BRAIN_VOXEL] == pytest.approx(np.median(neighbours), rel=0.1)
    assert data.source.voxels[BRAIN_VOXEL] == np.float32(1e30)


@pytest.mark.parametrize("name", ["claims 32767^3 voxels", "claims 1290^3 voxels", "extension claims 2 GB"])
def test_memory_is_flat_whatever_a_file_claims(name, tmp_path):
    place = spoilt(name, tmp_path / "data", CASE)
    tracemalloc.start()
    try:
        (row,) = audit(place.root)
        assert row.status == "refused" and tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()
