"""What a parameter's value may be, and how lists that are written as text are read."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from ldm_lib.errors import ConfigError

MOST = 10**8  # of anything that is counted; a larger number is a slip, and would end in days or without memory
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def given_path(text: str | Path) -> Path:
    """A path as people write it: `~` is their home, and $NAME what the environment says."""
    if "\0" in str(text):
        raise ConfigError("holds a zero byte, which no path may", where=repr(str(text)), fix="write the path anew")
    try:
        return Path(os.path.expandvars(text)).expanduser()
    except RuntimeError as error:
        raise ConfigError("nobody of this name has a home here", where=str(text), fix="write the path out") from error


def _orientation(text: str) -> str:
    """ "LPS" -> itself, when each letter names another axis."""
    if text and sorted("RLAPSI".find(letter) // 2 for letter in text) != [0, 1, 2]:
        raise ValueError('three letters, one of R and L, of A and P, of S and I, such as "LPS"')
    return text


def safe_name(text: str) -> str:
    """A name that can be a file's: letters, digits, '.', '_' and '-', at most 128, no path in it."""
    if not _SAFE_NAME.match(text):
        raise ValueError("letters, digits, '.', '_' and '-' only, the first a letter or digit, at most 128")
    return text


def _integers(text: str) -> str:
    """ "32,64,128" -> itself, when every part is a positive integer."""
    if not text or not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ValueError('positive integers separated by commas, such as "32,64,128"')
    return text


def _numbers(text: str) -> str:
    """ "0,1,1.5" -> itself, when every part is a finite number of at least 0."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError('numbers from 0 up, separated by commas, such as "0,1,1.5"')
    return text


def names(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b"); "" -> ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _some_integers(text: str) -> str:
    """As `_integers`, or nothing."""
    return text and _integers(text)


Orientation = Annotated[str, AfterValidator(_orientation)]
IntegerList = Annotated[str, AfterValidator(_integers)]
SomeIntegers = Annotated[str, AfterValidator(_some_integers)]
NumberList = Annotated[str, AfterValidator(_numbers)]
Name = Annotated[str, AfterValidator(safe_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Devices = Annotated[int, Field(ge=1, le=4096)]  # each a process
Workers = Annotated[int, Field(ge=0, le=256)]  # likewise
Samples = Annotated[int, Field(ge=1, le=10_000)]  # of one case, each held until the last is drawn
NotNegative = Annotated[float, Field(ge=0)]


def integers(text: str) -> tuple[int, ...]:
    """ "32,64,128" -> (32, 64, 128)."""
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """ "0,1,1.5" -> (0.0, 1.0, 1.5)."""
    return tuple(float(part) for part in text.split(","))
