"""Write the front page of a run: one picture, the scores, what was run on what, what did not pass, and the stages.

`report.md` holds it as Markdown, for a pull request, and `index.html` the same as a page. Every number comes from a
file that a stage has written; what a stage has not written yet is left out.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm_lib.errors import LdmError
from ldm_lib.experiment.path_aliases import with_aliases
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.report import write_page
from ldm_lib.experiment.run_folder import read_record, upstream_digests
from ldm_lib.experiment.stages import STAGES, StageConfig
from ldm_lib.files import markdown, replacing

Records = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str]

# The first one of a finished stage is shown; they are drawn by the notebooks.
PICTURES = {
    "05_sampling/figures/overview.png": "The first validation case: voided, one sample, mean, ground truth",
    "04_training/figures/sample.png": "A validation case after the training: voided, one sample, ground truth",
    "02_autoencoder_check/figures/reconstruction.png": "A validation case through the autoencoder",
}
# Label -> stage, and what its parameters and its summary.json say.
FACTS = {
    "data": ("01_data_audit", "cases: {cases}, patients: {patients}, excluded cases: {refused}"),
    "autoencoder": ("02_autoencoder_check", "upper bound {psnr_upper_bound:.2f} dB, sha256 {sha256:.12}"),
    "model": ("04_training", "{parameters:,} parameters, {optimiser_steps:,} steps, sha256 {sha256:.12}"),
    "inpainted": (
        "05_sampling",
        "cases: {cases}, samples: {samples}, steps: {num_inference_steps} of {sampler}",
    ),
    "time per case": ("05_sampling", "{seconds_per_case:.3g} s (median, all samples)"),
}
MOST_WARNINGS = 10  # of one stage
LOG_LINE = re.compile(r"\S+ \S+ (INFO|WARNING) (.*)")
SCORES_NOTE = (
    "Healthy part of the mask, cases: {cases}, patients: {patients}. Mean over patients, in brackets the 95 % "
    "bootstrap interval by patient{single}. Bold: the model. Upper bound: the ground truth through the autoencoder."
)


def write_front_page(run_folder: str | Path) -> Path:
    """Write report.md and index.html of a run from what its stages have written so far, and return the latter."""
    run_folder = Path(run_folder)
    text = _front_page(run_folder)
    with replacing(run_folder / "report.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return write_page(run_folder / "index.html", text, title=f"Run {run_folder.name}")


def _front_page(run_folder: Path) -> str:
    """Return the front page as Markdown."""
    made = {stage: run_folder / stage / "done.json" for stage in STAGES}
    records = {stage: read_record(path) for stage, path in made.items() if path.exists()}
    states = {stage: _state(run_folder, stage, records) for stage in STAGES}
    config = read_record(path) if (path := run_folder / "config.json").exists() else {}
    parts = [f"# Run {_escaped(run_folder.name)}", _progress(run_folder.name, states, config), _passed(records)]
    parts += _picture(run_folder, records) + _pages(records)
    if "06_evaluation" in records and (scores := run_folder / "06_evaluation" / "metrics.csv").exists():
        old = "**Outdated**: an earlier stage has been replaced since.\n\n" * (states["06_evaluation"] == "outdated")
        parts += ["## Scores", old + _scores(scores)]
    facts = [*_settings(records, config), *_facts(run_folder, records), *_made_with(records)]
    parts += ["## What was run", markdown([("", ""), *((label, _escaped(text)) for label, text in facts)])]
    parts += ["## Checks that did not pass, and warnings", _warnings(run_folder, states, records)]
    parts += ["## Stages", _stages(run_folder, states, records)]
    return "\n\n".join(parts) + "\n"


def _state(run_folder: Path, stage: str, records: Records) -> str:
    if stage not in records:
        return "did not finish" if (run_folder / stage / "notebook.partial.ipynb").exists() else "not run"
    try:
        upstream = upstream_digests(run_folder, stage)
    except LdmError:  # an earlier stage is being replaced
        return "outdated"
    return "done" if upstream.items() <= records[stage].get("inputs", {}).items() else "outdated"


def _progress(run: str, states: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Say what is missing, and the command that makes it."""
    missing = [stage for stage, state in states.items() if state != "done"]
    if not missing:
        return f"All {len(states)} stages are done."
    changed = {name: value for stage in missing for name, (value, _) in _changed(stage, config, {}).items()}
    command = ["ldm", "run", *(stage[:2] for stage in missing), "--run", run]
    command += [word for name, value in changed.items() for word in ("--set", f"{name}={value}")]
    command += ["--overwrite"] if "outdated" in states.values() else []
    done = f"{len(states) - len(missing)} of {len(states)} stages are done; missing: {', '.join(missing)}."
    return f"**{done}** To go on: `{shlex.join(command)}`"


def _picture(run_folder: Path, records: Records) -> list[str]:
    drawn = [path for path in PICTURES if Path(path).parts[0] in records and (run_folder / path).exists()]
    return [f"[![{PICTURES[path]}]({path})]({path})\n\n*{PICTURES[path]}*" for path in drawn[:1]]


def _pages(records: Records) -> list[str]:
    """Return links to the pages of cases that stage 05 has written."""
    stage = "05_sampling"
    pages = [Path(name) for name in sorted(records.get(stage, {}).get("outputs", ())) if name.endswith(".html")]
    links = (f"[{_escaped(page.stem)}]({stage}/{quote(page.as_posix())})" for page in pages)
    return [f"In a browser, to look around in: {', '.join(links)}"] if pages else []


def _passed(records: Records) -> str:
    checks = [check["passed"] for record in records.values() for check in record["checks"]]
    return f"{sum(checks)} of {len(checks)} checks passed."


def _scores(path: Path) -> str:
    from ldm_lib.evaluation.case_scores import MEDOID, SAMPLE
    from ldm_lib.evaluation.summary import methods_table, read_scores

    table = read_scores(path)
    head, *rows = methods_table(table)
    bold = [[f"**{name}**" if name in (SAMPLE, MEDOID) or name.startswith("mean of ") else name, *cells]
            for name, *cells in rows]  # fmt: skip
    numbers = {"cases": table["case"].nunique(), "patients": table["patient"].nunique()}
    note = SCORES_NOTE.format(**numbers, single="; a single patient has none" if numbers["patients"] == 1 else "")
    return f"{markdown([head, *bold])}\n\n{note}"


def _facts(run_folder: Path, records: Records) -> list[Row]:
    """Return label and text of what the finished stages say of themselves."""
    rows = []
    for label, (stage, template) in FACTS.items():
        if stage in records:
            known = records[stage]["parameters"] | read_record(run_folder / stage / "summary.json")
            try:
                rows.append((label, template.format_map(known)))
            except (KeyError, TypeError, ValueError):  # a summary of another version
                continue
    return rows


def _settings(records: Records, config: Mapping[str, Any]) -> list[Row]:
    """Return label and text of the preset, the parameters that differ from it, and the source of the data."""
    audit = records.get("01_data_audit", {}).get("parameters", {})
    given = [name for name in ("data_dir", "brains_dir") if audit.get(name)]
    stages_of: dict[str, list[str]] = {}
    for stage in STAGES:
        for name, (value, default) in _changed(stage, config, records).items():
            if name not in given:
                stages_of.setdefault(f"{name} = {value!r} (preset: {default!r})", []).append(stage[:2])
    changed = "; ".join(f"{change} in {', '.join(stages)}" for change, stages in stages_of.items())
    rows = [("preset", str(config.get("preset", "none"))), ("changed parameters", changed or "none")]
    source = f"{given[0]} = {audit[given[0]]}" if given else "synthetic cohort"
    return [*rows, ("source", source)] if audit else rows


def _made_with(records: Records) -> list[Row]:
    """Return label and text of the time that the stages took, and of the code and the machine of the latest one."""
    if not records:
        return []
    last = max(records.values(), key=lambda record: record["finished"])
    seconds = sum(record["seconds"] for record in records.values())
    made_with = last.get("made_with", {})
    git, machine = made_with.get("git", {}), made_with.get("machine", {})
    changed = f" with {n} changed files" if (n := git.get("changed_files")) else ""
    code = f"version {made_with.get('version', '')}, commit {git.get('commit', ''):.12}{changed}"
    time = f"{seconds:.0f} s for {len(records)} stages; the latest finished {last['finished']}"
    return [
        ("time", time),
        ("code", code),
        ("machine", f"{machine.get('system', '')}, cores: {machine.get('cores', '')}"),
    ]


def _changed(stage: str, config: Mapping[str, Any], records: Records) -> dict[str, tuple[Any, Any]]:
    """Return parameter -> its value and the preset's where they differ: as the stage was made, else as requested."""
    try:
        preset = with_aliases(resolve(config.get("preset", ""))[stage].model_dump())
    except LdmError:  # of another version, or a stage that was run by hand
        return {}
    given = records[stage]["parameters"] if stage in records else config.get(stage, {})
    return {name: (given[name], default) for name, default in preset.items()
            if name in given and given[name] != default and name not in StageConfig.untracked}  # fmt: skip


def _warnings(run_folder: Path, states: Mapping[str, str], records: Records) -> str:
    """List checks that did not pass, stages that are outdated or did not finish, and the log's warnings."""
    logged, found = _logged(run_folder / "log.txt"), []
    for stage, state in states.items():
        if state == "outdated":
            found.append(f"{stage}: **outdated**, an earlier stage has been replaced since")
        elif state == "did not finish":
            found.append(f"{stage}: **did not finish**, see {stage}/notebook.partial.ipynb")
        failed = [check for check in records.get(stage, {}).get("checks", ()) if not check["passed"]]
        found += [f"{stage}: **FAILED** {_escaped(check['check'])} ({_escaped(check['found'])})" for check in failed]
        messages = logged.get(stage, [])
        found += [f"{stage}: {_escaped(message)}" for message in messages[:MOST_WARNINGS]]
        if more := len(messages[MOST_WARNINGS:]):
            found.append(f"{stage}: {more} further warnings in log.txt")
    return "\n".join(f"- {line}" for line in found) or "None."


def _logged(log: Path) -> dict[str, list[str]]:
    """Return the warnings of each stage since it was started last, each once."""
    found, stage = {stage: [] for stage in STAGES}, next(iter(STAGES))
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        level, message = match.groups() if (match := LOG_LINE.match(line)) else ("", "")
        if level == "INFO" and message.removesuffix(" started") in STAGES:
            stage = message.removesuffix(" started")
            found[stage] = []
        elif level == "WARNING" and message not in found[stage]:
            found[stage].append(message)
    return found


def _stages(run_folder: Path, states: Mapping[str, str], records: Records) -> str:
    rows = []
    for stage, state in states.items():
        name = f"[{stage}]({stage}/report.html)" if (run_folder / stage / "report.html").exists() else stage
        cells = ["", "", ""]
        if record := records.get(stage):
            passed = f"{sum(check['passed'] for check in record['checks'])} of {len(record['checks'])}"
            cells = [f"{record['seconds']:.0f}", f"{record['peak_memory_mb']}", passed]
        rows.append([name, state, *cells])
    return markdown([["stage", "state", "seconds", "memory, MB", "checks passed"], *rows])


def _escaped(text: object) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    Examples:
        >>> print(_escaped("<b>a_b</b>"))
        \<b\>a_b\</b\>
    """
    return re.sub(r"([\\`*\[\]<>&$~#]|(?<![^\W_])_|_(?![^\W_])|:(?=//))", r"\\\1", " ".join(str(text).split()))
