"""Many mixed cases, one in five bad, through `validate` and `inpaint`: nothing lost, nothing silent, memory flat.

Good and bad cases are those of the catalogue of bad inputs; each kind of bad comes in turn, in an order drawn from the
seed. What the commands said, wrote and took is held against what the catalogue says they must.
"""

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from bad_inputs import ROWS, spoilt
from bad_places import Place
from soak_runs import LONGEST_S, RUN, reference, start, until

from ldm_lib.options import safe_name

BAD_EVERY = 5
EARLY = 0.1  # fraction of the cases after which memory is first measured
GROWS_TO = 1.2  # times as much memory at the end, at most
AT_ONCE = [name for name, row in ROWS.items() if not (row.needs_user or row.options)]
SPEED = ("--steps", "2", "--device", "cpu")


@dataclass(frozen=True)
class Member:
    """One case of the cohort: where it lies, and the row it was spoilt by, if any."""

    place: Place
    row: str | None

    def may(self, *, inpainted: bool) -> set[str]:
        """What the catalogue lets become of it."""
        if self.row is None:
            return {"accept"}
        row = ROWS[self.row]
        return set(((row.filled if inpainted else "") or row.must).split(" or "))


@dataclass(frozen=True)
class Taken:
    """A command that has ended: its status, what it said, its seconds and its memory early and late, in bytes."""

    status: int
    said: str
    seconds: float
    early: int
    late: int


def cohort(root: Path, count: int, seed: int) -> list[Member]:
    """Write so many cases, one in five of them bad."""
    shutil.rmtree(root, ignore_errors=True)
    names = random.Random(seed).sample(AT_ONCE, len(AT_ONCE))
    members = []
    for k in range(count):
        identity, turn = f"BraTS-GLI-{k:05d}-00{k % 2}", k // BAD_EVERY
        if k % BAD_EVERY == BAD_EVERY - 1:
            name = names[turn % len(names)]
            members.append(Member(spoilt(name, root, identity), name))
        else:
            members.append(Member(Place(root, identity, complete=k % 3 == 0), None))
    return members


def watched(words: list[object], folder: Path, name: str, lines: int) -> Taken:
    """Run a command to its end; memory is that at the first tenth of its lines and the most it ever had."""
    output, began, early = folder / f"{name}.txt", time.monotonic(), 0
    process = start(folder / "outputs", words, output)
    late = 0
    while process.poll() is None:
        late = max(late, _resident(process))
        if not early and output.read_text().count("\n") >= EARLY * lines:
            early = late
        time.sleep(0.05)
    return Taken(process.returncode, output.read_text(), time.monotonic() - began, early, late)


def _resident(process: subprocess.Popen) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def judge(members: list[Member], results: dict[str, tuple[str, str]], *, inpainted: bool) -> list[str]:
    """List the wrong lines of a command: a case without a line, or with another one than the catalogue's."""
    found = []
    for member in members:
        key = _key(member.place.id)
        if key not in results:
            found.append(f"lost: {key} ({member.row or 'good'})")
            continue
        what, why = results[key]
        may = member.may(inpainted=inpainted)
        if what == "reject" and "reject" not in may:
            found.append(f"rejected: {key} ({member.row or 'good'}): {why}")
        if what != "reject" and may == {"reject"}:
            found.append(f"silent: {key} ({member.row})")
        must_say = member.row and (what == "reject" or (what == "warn" and "accept" not in may))
        if must_say and not re.search(ROWS[member.row].says, why, re.DOTALL):
            found.append(f"says otherwise: {key} ({member.row}): {why}")
    return found


def _key(identity: str) -> str:
    """Return the name by which a folder is reported."""
    try:
        return safe_name(identity)
    except ValueError:
        return repr(identity)


def unlike(member: Member, result: Path) -> list[str]:
    """List the differences between a result and its case where there may be none, as nibabel reads both."""
    given, inpainted, mask = nib.load(member.place.P), nib.load(result), member.place.m > 0
    before, after = (np.asarray(image.dataobj).reshape(mask.shape) for image in (given, inpainted))
    wrong = [] if given.header == inpainted.header else ["header"]
    wrong += [] if np.array_equal(before[~mask], after[~mask], equal_nan=before.dtype.kind == "f") else ["outside"]
    return [f"{result.name}: {what} changed" for what in wrong]


def soak(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> bool:
    """Run both commands on the cohort, and inpaint once more with a kill halfway; return whether all is well."""
    model = reference(folder, say).outputs / RUN / "04_training" / "model"
    place = folder / "cases"
    shutil.rmtree(place, ignore_errors=True)
    members = cohort(place / "data", count, seed)
    say(f"{count} cases, {sum(m.row is not None for m in members)} of them bad")
    fill = ["inpaint", "--data", place / "data", "--model", model, *SPEED, "--output"]
    found = _validate(members, place, say) + _fill(members, [*fill, place / "filled"], place, say)
    found += _fill_killed([*fill, place / "again"], place, say)
    for line in found:
        say(f"FOUND {line}")
    return not found


def _validate(members: list[Member], place: Path, say: Callable[[str], None]) -> list[str]:
    taken = watched(["validate", place / "data", "--json", place / "rows.json"], place, "validate", len(members))
    words = {"refused": "reject", "warning": "warn", "ok": "accept"}
    rows = {row["case"]: (words[row["status"]], row["reason"]) for row in json.loads((place / "rows.json").read_text())}
    return judge(members, rows, inpainted=False) + _sound("validate", taken, len(members), say)


def _fill(members: list[Member], words: list[object], place: Path, say: Callable[[str], None]) -> list[str]:
    taken = watched(words, place, "inpaint", len(members))
    with (place / "filled" / "results.csv").open(newline="") as stream:
        results = {row["case"]: row for row in csv.DictReader(stream)}
    outcomes = {
        key: ("reject" if row["status"] == "refused" else "accept", row["reason"]) for key, row in results.items()
    }
    found = judge(members, outcomes, inpainted=True) + _sound("inpaint", taken, len(members), say)
    counts = Counter(row["status"] for row in results.values())
    say(f"inpaint: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    good = [m for m in members if m.row is None and outcomes.get(m.place.id, ("reject",))[0] == "accept"]
    return found + [d for m in good for d in unlike(m, place / "filled" / results[m.place.id]["result"])]


def _sound(name: str, taken: Taken, count: int, say: Callable[[str], None]) -> list[str]:
    """Print the measurements of a command, and list what is wrong with them."""
    grew = taken.late / max(taken.early, 1)
    say(f"{name}: exit {taken.status}, {taken.seconds:.0f} s, {taken.seconds / count:.2f} s a case, "
        f"{taken.early / 1e6:.0f} MB after a tenth of the cases, {grew:.2f} times that at the most")  # fmt: skip
    wrong = [f"{name}: exit status {taken.status}"] if taken.status != 1 else []
    wrong += [f"{name}: memory grew {grew:.2f} times"] if grew > GROWS_TO else []
    return wrong + ([f"{name}: a traceback"] if "Traceback" in taken.said else [])


def _fill_killed(words: list[object], place: Path, say: Callable[[str], None]) -> list[str]:
    """Inpaint once more, killed half-way, then to the end: the same files as undisturbed."""
    half = len(list((place / "filled").glob("*.nii.gz"))) // 2
    process = start(place / "outputs", words, place / "killed.txt")
    until(lambda: len(list((place / "again").glob("*.nii.gz"))) >= half or process.poll() is not None, LONGEST_S)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = watched(words, place, "resumed", half)
    one, two = ({p.name: p.read_bytes() for p in (place / n).glob("*.nii.gz")} for n in ("filled", "again"))
    alike = sum(one.get(name) == content for name, content in two.items())
    kept = resumed.said.count(": found")
    say(f"killed half-way and resumed: {kept} found, {alike} of {len(one)} files as undisturbed")
    return [f"differs after a kill: {name}" for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
