"""Write and read the cases and the split of a run (cohort.json)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.data.case import Case
from ldm_lib.errors import InputError
from ldm_lib.experiment.path_aliases import from_alias, to_alias
from ldm_lib.files import read_json, write_json
from ldm_lib.images.options import ReadOptions

_PLAIN = ("id", "patient", "index", "digests")  # fields of a case that are no paths
_NOT_KEPT = ("notes", "dilate", "derivative")  # of the files' names, and of inpainting


def write_cohort(path: Path, cases: Sequence[Case], split: dict[str, list[str]], root: Path) -> None:
    """Write cases and split as JSON, the path of each file relative to `root` or to a folder with an alias."""
    root = root.absolute()

    def plain(value: object) -> object:
        if not isinstance(value, Path):
            return value.model_dump() if isinstance(value, ReadOptions) else value
        absolute = value.absolute()  # links stay links: what they point to may be renamed
        if absolute.is_relative_to(root):
            return absolute.relative_to(root).as_posix()
        return to_alias(absolute, path.absolute().parents[1])

    rows = [{k: plain(v) for k, v in vars(case.with_digests()).items() if k not in _NOT_KEPT} for case in cases]
    write_json(path, {"split": split, "cases": rows})


def read_cohort(path: Path, root: Path) -> tuple[list[Case], list[Case]]:
    """Return training and validation cases of a run; of the latter the first mask of every patient comes first."""
    run_folder = path.absolute().parents[1]
    try:
        content = read_json(path)
        cases = [_case(row, root, run_folder) for row in content["cases"]]
        train, validation = (set(content["split"][side]) for side in ("train", "validation"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"is damaged ({type(error).__name__}: {error})", where=path.name,
                         fix="run 01_data_audit again") from error  # fmt: skip
    first_masks_first = sorted((c for c in cases if c.patient in validation), key=lambda c: (c.index, c.id))
    return [c for c in cases if c.patient in train], first_masks_first


def _case(row: Mapping[str, Any], root: Path, run_folder: Path) -> Case:
    if "allow" in row:  # as versions before 0.8 called the reader's options, with the labels of masks as a list
        row = dict(row)
        options = row.pop("allow")
        row["read_options"] = options | {"mask_labels": ",".join(map(str, options["mask_labels"]))}
    files = {k: v and root / from_alias(v, run_folder) for k, v in row.items() if k not in (*_PLAIN, "read_options")}
    return Case(**{k: row[k] for k in _PLAIN}, **files, read_options=ReadOptions(**row["read_options"]))
