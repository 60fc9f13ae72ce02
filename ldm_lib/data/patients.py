"""Find the patient of a case, so that the time points of one person never meet on both sides of a split."""

import csv
import re
from pathlib import Path

from ldm_lib.errors import InputError
from ldm_lib.files import expand_path

# The patient in the usual naming schemes; what follows names a time point, a session or a file.
_SCHEMES = (
    r"(BraTS-[A-Za-z]+-\d+)-\d{3}",
    r"(sub-[A-Za-z0-9]+)_.+",  # BIDS
    r"((?:UCSF-PDGM|UPENN-GBM|ReMIND|RHUH|EGD|LGG|GBM)-\d+)[-_].+",
    r"((?:TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5}))[-_.].+",
    r"(OAS\d_\d{4}|OAS3\d{4}|\d{3}_S_\d{4})_.+",  # OASIS, ADNI
)
_MOMENTS = (
    "ses|session|week|visit|time|timepoint|tp|day|month|year|scan|study|date|followup|fu|baseline|pre|post|preop|postop|"
    "intraop|mr"
)
_MOMENT = re.compile(rf"(.*\d[A-Za-z]?)[-_]+(?:{_MOMENTS})[-_]?(?:\d[\w.-]*|[a-d])?", re.IGNORECASE)
_DATE = re.compile(r"(.*\d)[-_]((19|20)\d{2}[-_.]?[01]\d[-_.]?[0-3]\d)")
_SCHEME = re.compile("|".join(_SCHEMES))


def patient_of(identity: str) -> str:
    """Return the patient of an id, which may name a time point, such as BraTS-GLI-00000-000 or sub-01_ses-02.

    An id in no known scheme is a patient of its own.
    """
    if match := _SCHEME.fullmatch(identity):
        return next(group for group in match.groups() if group)
    for pattern in (_DATE, _MOMENT):
        while match := pattern.fullmatch(identity):
            identity = match[1]
    return identity


def read_patients(path: str | Path) -> dict[str, str]:
    """Return case -> patient of a table: a CSV or TSV file with the columns `case` and `patient`.

    Raises:
        InputError: no such table, a column is missing, a cell is empty, or a case is there twice with two patients.
    """
    path, patients = expand_path(path), {}
    fix = "give a CSV file with the columns case,patient"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read ({getattr(error, 'strerror', None) or 'no text'})", where=path, fix=fix
        ) from error
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    if missing := {"case", "patient"} - set(rows.fieldnames or ()):
        held = ", ".join(rows.fieldnames or ()) or "nothing"
        raise InputError(f"no column {', '.join(sorted(missing))}; its first line is: {held}", where=path, fix=fix)
    for number, row in enumerate(rows, start=2):
        case, patient = ((row[name] or "").strip() for name in ("case", "patient"))
        if not (case and patient):
            raise InputError(f"line {number} has no {'patient' if case else 'case'}", where=path, fix="fill it in")
        if patients.setdefault(case, patient) != patient:
            cause = f"line {number}: {case} is of {patient}, but of {patients[case]} above"
            raise InputError(cause, where=path, fix="keep one line of each case")
    return patients
