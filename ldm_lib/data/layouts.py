"""Which files of a folder make a case: by their exact names, and never by a pattern that could take another's."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm_lib.data.case import Case
from ldm_lib.errors import InputError, printable
from ldm_lib.files import expand_path
from ldm_lib.options import safe_name

HOLE_ROLES = ("t1n-voided", "mask", "mask-healthy", "mask-unhealthy")
CONDITIONING_FOLDERS = {"growth": "growth_model", "tissue": "tissue_segmentation"}
DEFAULT_CONDITIONING = "conditioning_data"
_TIME_POINT = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d{3}")
_NIFTI = re.compile(r"\.nii(\.gz)?", re.IGNORECASE)
_ROLE = re.compile(rf"-(?P<role>t1n|{'|'.join(HOLE_ROLES)})(?P<hole>-\d{{4}})?(\.nii(\.gz)?|\.hdr)", re.IGNORECASE)
_NEARLY = re.compile(r"t1n|mask|void|healthy", re.IGNORECASE)
_LEFTOVER = re.compile(r".*(\.(part|partial|tmp|crdownload|download)| \(\d+\)(\.nii)?(\.gz)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Exclusion:
    """A case that is not used, and why."""

    case: str
    reason: str


@dataclass
class _Files:
    """What lies in one patient's folder.

    Attributes:
        found: (role, hole) -> its files; more than one is one too many.
        notes: what was passed over.
    """

    found: dict[tuple[str, str], list[Path]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    @property
    def holes(self) -> list[str]:
        """ "-0000", or "" in the challenge's layout, of every hole that has an image or a mask of its own."""
        return sorted({hole for role, hole in self.found if role in ("mask", "t1n-voided")})


def survey(data_dir: str | Path, conditioning_dir: str | Path = "") -> tuple[list[Case], list[Exclusion]]:
    """Every hole of every patient folder, in order of id, and what cannot be a case; both may be empty.

    Raises:
        InputError: a folder that does not exist.
    """
    root, fix = expand_path(data_dir), "give the folder that holds one folder per patient"
    if not str(data_dir):
        raise InputError("no folder of cases is given", fix=fix)
    if not root.is_dir():
        raise InputError("is a file" if root.is_file() else "no such folder", where=root, fix=fix)
    root = root.resolve()
    conditioning = _conditioning_folder(root, conditioning_dir)
    maps = {role: _maps_in(conditioning / name) for role, name in CONDITIONING_FOLDERS.items()} if conditioning else {}
    inside = tuple(os.path.realpath(folder) for folder in (root, conditioning) if folder)
    cases, exclusions = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name == DEFAULT_CONDITIONING or (conditioning and folder.samefile(conditioning)):
            continue
        found, refused = _cases_of(folder, maps, inside)
        cases += found
        exclusions += refused
    if cases:
        cases[0] = replace(cases[0], notes=(*cases[0].notes, *_astray(root, conditioning)))
    return cases, exclusions


def _astray(root: Path, conditioning: Path | None) -> list[str]:
    """What belongs to no case, and may be meant to."""
    beside = [path.name for path in root.iterdir() if _ROLE.search(path.name) and not path.is_dir()]
    notes = [f"passed over, beside the folders of cases: {_told(beside)}"] if beside else []
    for folder in [conditioning / name for name in CONDITIONING_FOLDERS.values()] if conditioning else []:
        if not folder.is_dir() and os.path.lexists(folder):
            notes.append(f"passed over, no folder: {folder.name}")
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if unfinished := [name for name in names if _LEFTOVER.fullmatch(name) and not name.startswith(".")]:
            notes.append(f"passed over in {folder.name}, unfinished or a second copy: {_told(unfinished)}")
    return notes


def require_outside(output: Path, data_dir: str | Path) -> None:
    """Refuse to write among the cases, where the next look would find it."""
    if output.resolve().is_relative_to(expand_path(data_dir).resolve()):
        raise InputError("lies inside the folder of cases", where=output, fix="name one outside it")


def listing(folder: str | Path) -> str:
    """The first few names in a folder."""
    names = sorted(p.name for p in expand_path(folder).iterdir())
    return _told(names) or "nothing"


def _told(names: Iterable[str]) -> str:
    names = sorted(map(printable, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _conditioning_folder(root: Path, given: str | Path) -> Path | None:
    if given:
        folder = expand_path(given)
        if not folder.is_dir():
            raise InputError("no such folder", where=folder, fix="leave CONDITIONING_DIR empty if there are no maps")
        return folder.resolve()
    return next((p for p in (root / DEFAULT_CONDITIONING, root.parent / DEFAULT_CONDITIONING) if p.is_dir()), None)


def _maps_in(folder: Path) -> dict[str, list[Path]]:
    """Id -> its map in a conditioning folder."""
    maps = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        identity, ending = path.name[: (path.name.lower().find(".nii"))], path.name[path.name.lower().find(".nii") :]
        if _NIFTI.fullmatch(ending) and not _LEFTOVER.fullmatch(path.name):
            maps[identity].append(path)
    return maps


def _cases_of(
    folder: Path, maps: dict[str, dict[str, list[Path]]], inside: tuple[str, ...]
) -> tuple[list[Case], list[Exclusion]]:
    try:
        identity, files = safe_name(folder.name), _files_in(folder)
    except ValueError as error:
        return [], [Exclusion(repr(folder.name), f"folder name is not a patient id: {error}. Fix: rename it.")]
    except OSError as error:
        told = f"cannot be listed ({error.strerror}). Fix: check the rights of its folder."
        return [], [Exclusion(folder.name, told)]
    if not files.holes:
        told = "".join(f"; {note}" for note in files.notes)
        names = f"Fix: name it {identity}-mask.nii.gz, or {identity}-mask-0000.nii.gz and so on."
        return [], [Exclusion(identity, f"{identity}: no mask file; present: {listing(folder)}{told}. {names}")]
    cases, exclusions = [], []
    for hole in files.holes:
        chosen = {role: files.found.get((role, hole), []) for role in HOLE_ROLES}
        chosen |= {"t1n": files.found.get(("t1n", ""), [])}
        chosen |= {role: maps[role].get(identity, []) if maps else [] for role in CONDITIONING_FOLDERS}
        key, doubled = f"{identity}{hole}", [paths for paths in chosen.values() if len(paths) > 1]
        if doubled:
            told = "; ".join(" and ".join(path.name for path in paths) for paths in doubled)
            exclusions.append(Exclusion(key, f"{identity}: ambiguous: {told}. Fix: keep one of each."))
        elif not chosen["mask"]:
            told = f"{identity}: no mask file beside its t1n-voided."
            exclusions.append(Exclusion(key, f"{told} Fix: put {identity}-mask{hole}.nii.gz there."))
        elif not (chosen["t1n"] or chosen["t1n-voided"]):
            told = f"{identity}: neither t1n nor t1n-voided beside its mask."
            exclusions.append(Exclusion(key, f"{told} Fix: put {identity}-t1n-voided{hole}.nii.gz there."))
        else:
            only = {role.replace("-", "_"): paths[0] if paths else None for role, paths in chosen.items()}
            cases.append(_case(identity, hole, only, [*files.notes, *_leading_out(only, inside)]))
    return cases, exclusions


def _files_in(folder: Path) -> _Files:
    """The files of the patient whose id is the folder's name, and what lies beside them that may be meant so."""
    files, identity = _Files(), folder.name
    unfinished, strange = [], []
    for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        match = _ROLE.fullmatch(name.removeprefix(identity)) if name.startswith(identity) else None
        if match:
            files.found[match["role"].lower(), match["hole"] or ""].append(folder / name)
        elif _LEFTOVER.fullmatch(name):
            unfinished.append(name)
        elif _NIFTI.search(name) and (_NEARLY if name.startswith(identity) else _ROLE).search(name):
            strange.append(name)
    holes = set(files.holes)
    strange += [
        path.name
        for (role, hole), paths in files.found.items()
        for path in paths
        if (hole and role == "t1n") or (role != "t1n" and hole not in holes)
    ]
    if unfinished:
        files.notes.append(f"passed over, unfinished or a second copy: {_told(unfinished)}")
    if strange:
        files.notes.append(f"passed over, their names are not of this case and its holes: {_told(strange)}")
    return files


def _case(identity: str, hole: str, files: dict[str, Path | None], notes: list[str]) -> Case:
    time_point = _TIME_POINT.fullmatch(identity)
    patient = time_point.group(1) if time_point else identity
    return Case(id=identity, patient=patient, index=hole.removeprefix("-"), **files, notes=tuple(notes))


def _leading_out(files: dict[str, Path | None], inside: tuple[str, ...]) -> list[str]:
    """Links out of the folders that were named: they are followed, and told."""
    targets = {role: os.path.realpath(path) for role, path in files.items() if path}
    return [
        f"{_name_of(role, files[role])} is a link out of the data folder, to {os.path.relpath(target, inside[0])}"
        for role, target in targets.items()
        if not any(os.path.commonpath([target, folder]) == folder for folder in inside)
    ]


def _name_of(role: str, path: Path) -> str:
    """A file's name, of a map with its folder: both of a case are called alike."""
    return f"{CONDITIONING_FOLDERS[role]}/{path.name}" if role in CONDITIONING_FOLDERS else path.name
