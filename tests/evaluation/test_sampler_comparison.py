"""Laws of comparing samplers: every one at every number of steps, from one noise, scored as the challenge scores."""

import pytest

from ldm_lib.data.case import load_case
from ldm_lib.diffusion.samplers import samplers_for
from ldm_lib.evaluation.metrics import brats_scores
from ldm_lib.evaluation.sampler_comparison import sampler_rows
from ldm_lib.inpainting.inpainter import Inpainter

HOW = {"seed": 3, "guidance": 1.0, "threshold": 0.2}


@pytest.fixture(scope="module")
def inpainter(tiny_model_folder):
    return Inpainter.load(tiny_model_folder, device="cpu", precision="32")


def test_each_row_is_the_score_of_the_result(cases, inpainter):
    chosen = [load_case(case) for case in cases[:2]]
    rows = list(sampler_rows(inpainter, chosen, steps=(2, 1, 2, 1001), **HOW))  # the schedule has 1000
    expected = [
        (data.case.key, name, n) for data in chosen for name in samplers_for(inpainter.model.schedule) for n in (1, 2)
    ]
    assert [(row["case"], row["sampler"], row["steps"]) for row in rows] == expected
    for row in rows[::5]:
        data = next(d for d in chosen if d.case.key == row["case"])
        filled = inpainter(data, sampler=row["sampler"], num_inference_steps=row["steps"], seed=3).mean
        scores = brats_scores(filled, data.target, data.voided, data.scored)
        assert {name: row[name] for name in scores} == pytest.approx(scores)
        assert 0 < row["seconds"] < 60 and 0 <= row["dice mean"] <= 1
