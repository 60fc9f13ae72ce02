"""Laws of filling many cases: shares make the whole, what is whole is not made again, and what is damaged is."""

import json

import numpy as np
import pytest

from ldm_lib import sampling
from ldm_lib.inpainter import Inpainter
from ldm_lib.presets import resolve
from ldm_lib.sampling import fill_cases
from ldm_lib.volumes import read_volume


@pytest.fixture(scope="module")
def inpainter(tiny_model_folder):
    return Inpainter.load(tiny_model_folder, device="cpu", precision="32")


def settings(**changes):
    return resolve("smoke", {"num_inference_steps": 2, "samples": 2} | changes)["05_sampling"]


def volumes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


@pytest.fixture(scope="module")
def whole(inpainter, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fill_cases(inpainter, cases[:4], settings(), folder), folder


@pytest.mark.parametrize("world", [2, 3])
def test_shares_make_the_whole_byte_for_byte(inpainter, cases, whole, tmp_path, world):
    rows, folder = whole
    shares = [fill_cases(inpainter, cases[:4], settings(), tmp_path, share=slice(r, None, world)) for r in range(world)]
    assert volumes(tmp_path) == volumes(folder) and len(volumes(folder)) == 4 * 4
    assert sorted(row["case"] for share in shares for row in share) == sorted(row["case"] for row in rows)


def filled_now(monkeypatch, inpainter, cases, config, folder):
    """The cases that a call fills, not finds."""
    made, fill = [], sampling._fill

    def spied(case, *rest):
        made.append(case.key)
        return fill(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_fill", spied)
        rows = fill_cases(inpainter, cases, config, folder)
    return made, rows


def test_what_is_filled_is_found_and_what_is_damaged_or_missing_is_made_again(
    inpainter, cases, whole, tmp_path, monkeypatch
):
    rows, folder = whole
    fill_cases(inpainter, cases[:3], settings(), tmp_path)
    assert filled_now(monkeypatch, inpainter, cases[:4], settings(), tmp_path) == (
        [cases[3].key],
        [{**row, "seconds": found["seconds"]} for row, found in zip(rows, _rows(tmp_path, cases[:4]), strict=True)],
    )
    results = [tmp_path / case.result_name for case in cases[:4]]
    results[0].write_bytes(results[0].read_bytes()[:-1])
    results[1].unlink()
    (tmp_path / "filled" / f"{cases[2].key}.json").unlink()
    made, _ = filled_now(monkeypatch, inpainter, cases[:4], settings(), tmp_path)
    assert made == [case.key for case in cases[:3]] and volumes(tmp_path) == volumes(folder)


def _rows(folder, cases):
    return [json.loads((folder / "filled" / f"{case.key}.json").read_text())["row"] for case in cases]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"samples": 1}, {"num_inference_steps": 3}, {"sampler": "ddim"}])
def test_other_settings_are_other_results(inpainter, cases, tmp_path, monkeypatch, changes):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    first = read_volume(tmp_path / cases[0].result_name).raw
    made, _ = filled_now(monkeypatch, inpainter, cases[:1], settings(**changes), tmp_path)
    assert made == [cases[0].key] and not np.array_equal(first, read_volume(tmp_path / cases[0].result_name).raw)
