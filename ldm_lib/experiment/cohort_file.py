"""Write and read the cases and the split of a run (cohort.json)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.data.case import Case
from ldm_lib.data.options import ReadOptions
from ldm_lib.errors import InputError
from ldm_lib.experiment import path_aliases
from ldm_lib.files import read_json, write_json


def write_cohort(path: Path, cases: Sequence[Case], split: dict[str, list[str]], root: Path) -> None:
    """Cases and split as JSON, the path of each file relative to `root` or to a place of the run that has a name."""
    root = root.absolute()

    def told(value: object) -> object:
        if isinstance(value, ReadOptions):
            return value.model_dump()
        if not isinstance(value, Path):
            return value
        absolute = value.absolute()  # links stay links: what they point to may be renamed
        if absolute.is_relative_to(root):
            return absolute.relative_to(root).as_posix()
        return path_aliases.told(absolute, path.absolute().parents[1])

    rows = [{k: told(v) for k, v in vars(case.sealed()).items() if k != "notes"} for case in cases]
    write_json(path, {"split": split, "cases": rows})


def read_cohort(path: Path, root: Path) -> tuple[list[Case], list[Case]]:
    """Training cases and validation cases of a run; of the latter the first hole of every patient comes first."""
    run_folder = path.absolute().parents[1]
    try:
        content = read_json(path)
        cases = [
            _case_of_row(row, lambda text: root / path_aliases.found(text, run_folder)) for row in content["cases"]
        ]
        train, validation = (set(content["split"][side]) for side in ("train", "validation"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"is damaged ({type(error).__name__}: {error})", where=path.name,
                         fix="run 01_data_audit again") from error  # fmt: skip
    holes_in_turn = sorted((c for c in cases if c.patient in validation), key=lambda c: (c.index, c.id))
    return [c for c in cases if c.patient in train], holes_in_turn


def _case_of_row(row: dict[str, Any], find: Callable[[str], Path]) -> Case:
    plain = {name: row[name] for name in ("id", "patient", "index", "digests")}
    read_options = ReadOptions(**row["read_options"])
    files = {name: value and find(value) for name, value in row.items() if name not in plain and name != "read_options"}
    return Case(**plain, **files, read_options=read_options)
