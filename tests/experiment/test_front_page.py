"""The front page of a run: its numbers are those of the files, nothing is loaded, and what is missing is said."""

import json
import logging
import re
import shlex
import string
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pandas as pd
import pytest

from ldm_lib.errors import RunError
from ldm_lib.evaluation.metrics import bootstrap_by_patient
from ldm_lib.experiment import front_page, runner
from ldm_lib.experiment.front_page import write_front_page
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.report import POLICY, write_page
from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE, log_to, write_provenance
from ldm_lib.experiment.stage import open_stage
from ldm_lib.experiment.stages import STAGES
from ldm_lib.files import write_csv

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f00010501012718e3660000000049454e44ae426082"
)
AUDIT, _, _, TRAINING, SAMPLING, EVALUATION = STAGES
PAGE = "a-t1n-inference.html"
SUMMARIES = {
    AUDIT: {"cases": 7, "patients": 5, "refused": 2},
    TRAINING: {"parameters": 1234567, "optimiser_steps": 4321, "sha256": "0123456789abcdef" * 4},
    SAMPLING: {"seconds_per_case": 0.4567},
}
METHODS = {"sample": 20.0, "mean of 2": 21.5, "harmonic": 17.25, "tissue paint": 19.125}
ROWS = [
    {"case": f"{patient}-0000", "patient": patient, "method": method, "psnr_01": level + k * k / 7, "ssim": level / 50}
    for method, level in METHODS.items()
    for k, patient in enumerate(("001", "002", "003"))
]
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) https://example.org |"


class Page(HTMLParser):
    """The tags with their attributes, the text, and the cells of each table row."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.rows, self.inside = [], "", [], False
        self.feed(text[text.index("<body>") :])

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside |= tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.inside and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data


def make(folder, stages=tuple(STAGES), **overrides):
    """A run in which each stage has written what the front page reads."""
    configs = resolve("smoke", {"run": folder.name, **overrides})
    folder.mkdir(parents=True, exist_ok=True)
    write_provenance(folder, preset="smoke", configs=configs, command=["test"])
    for name in stages:
        stage = open_stage(name, configs[name].model_dump())
        if name == SAMPLING:
            (stage.folder / "figures").mkdir()
            (stage.folder / "figures" / "overview.png").write_bytes(PIXEL)
            (stage.folder / PAGE).write_text("")
        if name == EVALUATION:
            write_csv(stage.folder / "metrics.csv", ROWS)
        stage.check("always", True, "yes")
        stage.check("sometimes", name != TRAINING, "no", required=False)
        stage.close(SUMMARIES.get(name, {}))
        (stage.folder / "report.html").write_text("")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path))
    return tmp_path / "one"


def page(run):
    return Page(write_front_page(run).read_text())


def test_every_score_is_the_one_of_the_file_with_its_interval(run):
    rows = {cells[0]: cells[1:] for cells in page(make(run)).rows}
    assert rows["method"] == ["PSNR, dB", "SSIM", "PSNR, dB, over harmonic", "SSIM, over harmonic"]
    table = pd.read_csv(run / EVALUATION / "metrics.csv", dtype={"patient": str}).set_index("method")
    base = table.loc["harmonic"]
    for method in METHODS:
        own = table.loc[method]
        for shown, name, digits in zip(rows[method], ("psnr_01", "ssim"), (2, 3), strict=False):
            found = bootstrap_by_patient(own[name], list(own["patient"]))
            assert shown == f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
        gain = own["psnr_01"].to_numpy() - base["psnr_01"].to_numpy()
        expected = f"{gain.mean():+.2f} " if method != "harmonic" else ""
        assert rows[method][2].startswith(expected) and bool(rows[method][2]) == bool(expected)
    order = [name for name in rows if name in METHODS]
    assert order == sorted(METHODS, key=METHODS.get, reverse=True)


def test_facts_are_those_of_the_summaries_and_records(run):
    found = page(make(run))
    rows = {cells[0]: cells[1:] for cells in found.rows if cells}
    assert rows["data"] == ["cases: 7, patients: 5, excluded cases: 2"]
    assert rows["model"] == ["1,234,567 parameters, 4,321 steps, sha256 0123456789ab"]
    assert rows["time per case"] == ["0.457 s (median, all samples)"] and rows["preset"] == ["smoke"]
    assert rows["changed parameters"] == ["none"] and rows["source"] == ["synthetic cohort"]
    assert "cases: 3, patients: 3." in found.text and "11 of 12 checks passed." in found.text
    for stage in STAGES:
        record = json.loads((run / stage / "done.json").read_text())
        passed = sum(check["passed"] for check in record["checks"])
        assert rows[stage] == ["done", f"{record['seconds']:.0f}", str(record["peak_memory_mb"]), f"{passed} of 2"]
    assert f"{TRAINING}: FAILED sometimes (no)" in found.text and found.text.count("FAILED") == 1


def test_both_pages_say_the_same(run):
    html = page(make(run)).text
    text = re.sub(
        r"\[!\[.*?\]\(.*?\)\]\(.*?\)|\[([\w-]+)\]\(.*?\)|[|*#`]|-{3}|^- ",
        r"\1",
        (run / "report.md").read_text(),
        flags=re.M,
    )
    assert text.replace("\\", "").split() == html.split()


def test_nothing_is_loaded_and_the_picture_is_in_the_page_and_linked_from_the_report(run):
    found = page(make(run)).found
    assert f'content="{POLICY}"' in (run / "index.html").read_text()
    targets = [attrs.get("href") or attrs.get("src") for _, attrs in found if {"href", "src"} & set(attrs)]
    assert [target for target in targets if urlsplit(target).scheme] == [
        attrs["src"] for tag, attrs in found if tag == "img" and attrs["src"].startswith("data:image/png;base64,")
    ]
    local = [target for target in targets if not urlsplit(target).scheme]
    assert len(local) == 8 and f"{SAMPLING}/{PAGE}" in local and all((run / target).is_file() for target in local)
    linked = re.findall(r"\]\((.*?)\)", (run / "report.md").read_text())
    assert "05_sampling/figures/overview.png" in linked and all((run / name).is_file() for name in linked)
    assert not {tag for tag, _ in found} & {"script", "link", "iframe"}


def test_a_run_that_ended_early_says_what_is_missing_and_how_to_go_on(run, monkeypatch):
    made = make(run, list(STAGES)[:3], max_epochs=6, samples=3)
    (made / TRAINING).mkdir()
    (made / TRAINING / "notebook.partial.ipynb").write_text("{}")
    found = page(made)
    rows = {cells[0]: cells[1:] for cells in found.rows if cells}
    assert "3 of 6 stages are done; missing: 04_training, 05_sampling, 06_evaluation." in found.text
    assert rows[TRAINING][0] == "did not finish" and rows[SAMPLING][0] == "not run" and "method" not in rows
    assert "04_training/notebook.partial.ipynb" in found.text
    command = shlex.split(re.search("`(.*)`", (run / "report.md").read_text())[1])
    asked = {}
    monkeypatch.setattr(runner, "run_stages", lambda stages, **kwargs: asked.update(kwargs, stages=stages) or run)
    from ldm_lib.__main__ import main

    assert command[0] == "ldm" and main(command[1:]) == 0
    assert asked["stages"] == ["04", "05", "06"] and asked["run"] == "one" and asked["preset"] == "smoke"
    requested = resolve(asked["preset"], {**asked["overrides"], "run": "one"})
    wanted = resolve("smoke", {"run": "one", "max_epochs": 6, "samples": 3})
    assert {name: requested[name] for name in (TRAINING, SAMPLING)} == {
        name: wanted[name] for name in (TRAINING, SAMPLING)
    }


def test_changed_parameters_are_named_with_the_presets(run):
    rows = {cells[0]: cells[1:] for cells in page(make(run, list(STAGES)[:4], max_epochs=6, seed=3)).rows if cells}
    assert rows["changed parameters"] == [
        "seed = 3 (preset: 0) in 01, 02, 03, 04, 05, 06; max_epochs = 6 (preset: 2) in 04"
    ]


def test_results_of_an_earlier_model_are_outdated(run):
    make(run)
    configs = resolve("smoke", {"run": "one", "seed": 1, "overwrite": True})
    stage = open_stage(TRAINING, configs[TRAINING].model_dump())
    (stage.folder / "weights.txt").write_text("other")
    assert [cells[1] for cells in page(run).rows if cells and cells[0] in (SAMPLING, EVALUATION)] == ["outdated"] * 2
    assert "## Scores\n\n**Outdated**" in (run / "report.md").read_text()
    stage.close(SUMMARIES[TRAINING])
    found = page(run)
    states = {cells[0]: cells[1] for cells in found.rows if cells and cells[0] in STAGES}
    assert list(states.values()) == ["done"] * 4 + ["outdated"] * 2
    assert "ldm run 05 06 --run one --overwrite" in found.text


def test_warnings_of_the_latest_start_are_shown_once_and_not_all(run):
    make(run, [AUDIT])
    log, messages = logging.getLogger("ldm_lib"), ["twice", "twice", *map(str, range(20))]
    log_to(run / "log.txt")
    log.warning("before")
    log.info("%s started", AUDIT)
    for message in messages:
        log.warning("%s", message)
    text = page(run).text
    assert f"{AUDIT}: twice" in text and text.count("twice") == 1 and "before" not in text
    assert f"{AUDIT}: {21 - front_page.MOST_WARNINGS} further warnings in log.txt" in text


def test_names_and_messages_are_shown_as_text(run):
    make(run, [AUDIT])
    record = json.loads((run / AUDIT / "done.json").read_text())
    record["checks"] = [{"check": HOSTILE, "passed": False, "found": HOSTILE, "required": False}]
    (run / AUDIT / "done.json").write_text(json.dumps(record))
    found = page(run)
    assert found.text.count(HOSTILE) == 2
    assert not {tag for tag, _ in found.found} & {"script", "img"}
    assert {attrs["href"] for tag, attrs in found.found if tag == "a"} == {f"{AUDIT}/report.html"}


@pytest.mark.parametrize("text", [string.punctuation, "_a_ a_b *c* `d` $e$ ~~f~~", "# 1. - x", r"\<b\> &amp;"])
def test_any_text_is_shown_as_it_is(tmp_path, text):
    written = write_page(tmp_path / "a.html", f"- {front_page._escaped(text)}", title="<b>").read_text()
    assert Page(written).text.strip() == text and "<title>&lt;b&gt;</title>" in written


def test_a_failed_stage_leaves_a_page(run, executed, monkeypatch):
    def die(stage, config, folder):
        (folder / "notebook.partial.ipynb").parent.mkdir()
        (folder / "notebook.partial.ipynb").write_text("")
        raise RunError("no", where=stage, fix="none")

    once = runner._execute
    monkeypatch.setattr(runner, "_execute", lambda stage, *rest: (once if stage == AUDIT else die)(stage, *rest))
    with pytest.raises(RunError, match="02_autoencoder_check: no"):
        runner.run_stages([], run="one", preset="smoke", overrides={}, command=[], progress=lambda line: None)
    text = (run / "report.md").read_text()
    assert "1 of 6 stages are done" in text and "02_autoencoder_check: **did not finish**" in text
