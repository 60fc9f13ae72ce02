"""Define the value types of parameters and the base class of all options.

The options of a room stand in that room's `options.py`; the parameter models of the notebooks are composed of them in
`experiment/stages.py`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ldm_lib.errors import ConfigError

# Names of the versions before 0.8 -> the name that replaced them, or a sentence that says why they are gone.
RENAMED = {
    "shipped_weights": "pretrained",
    "front_end": "input_transform",
    "variety": "domain_randomisation",
    "min_ceiling_psnr": "min_reconstruction_psnr",
    "obedience_cases": "fidelity_cases",
    "what_if_days": "counterfactual_days",
    "norm": "it was removed: normalisation is per voxel, but for imported weights",
    "perceptual_file": "it was removed: there is no perceptual loss any more",
    "perceptual_weight": "it was removed: there is no perceptual loss any more",
    "adversarial_weight": "it was removed: there is no discriminator any more",
    "adversarial_start": "it was removed: there is no discriminator any more",
    "voided_fraction": "it was removed: half of the crops are of the voided image",
    "air_fraction": "it was removed: a tenth of the crops are at random places",
    "schedule_shift": "it was removed: it did not improve results",
    "zero_terminal_snr": "it was removed: it did not improve results",
    "min_snr_gamma": "it was removed: it made results worse",
    "latent_noise": "it was removed: known latents are as they were encoded",
    "strategy": "it was removed: training on several devices always uses DDP",
}
RENAMED_VALUES = {"draft": "initial_estimate", "usual": "narrow", "true": "exact"}  # of parameters with choices

MAX_COUNT = 10**8  # a larger count is a typing error that would take days or all memory
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def _orientation(text: str) -> str:
    """Check that the letters of an orientation, such as "LPS", name three axes."""
    if text and sorted("RLAPSI".find(letter) // 2 for letter in text) != [0, 1, 2]:
        raise ValueError('three letters, one of R and L, of A and P, of S and I, such as "LPS"')
    return text


def safe_name(text: str) -> str:
    """Check a name that becomes a file name: letters, digits, '.', '_' and '-', at most 128 characters, no path."""
    if not _SAFE_NAME.match(text):
        raise ValueError("letters, digits, '.', '_' and '-' only, the first a letter or digit, at most 128")
    return text


def _integers(text: str) -> str:
    """Check a list of positive integers, such as "32,64,128"."""
    if not text or not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ValueError('positive integers separated by commas, such as "32,64,128"')
    return text


def _numbers(text: str) -> str:
    """Check a list of finite numbers from 0 up, such as "0,1,1.5"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError('numbers from 0 up, separated by commas, such as "0,1,1.5"')
    return text


def names(text: str) -> tuple[str, ...]:
    """Split "a, b" into ("a", "b"), and "" into ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _some_integers(text: str) -> str:
    """Check a list of positive integers, or an empty text."""
    return text and _integers(text)


Orientation = Annotated[str, AfterValidator(_orientation)]
IntegerList = Annotated[str, AfterValidator(_integers)]
SomeIntegers = Annotated[str, AfterValidator(_some_integers)]
NumberList = Annotated[str, AfterValidator(_numbers)]
Name = Annotated[str, AfterValidator(safe_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Devices = Annotated[int, Field(ge=1, le=4096)]  # each a process
Workers = Annotated[int, Field(ge=0, le=256)]  # each a process, too
Samples = Annotated[int, Field(ge=1, le=10_000)]  # of one case, each held until the last is drawn
NotNegative = Annotated[float, Field(ge=0)]


def integers(text: str) -> tuple[int, ...]:
    """Convert "32,64,128" to (32, 64, 128)."""
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Convert "0,1,1.5" to (0.0, 1.0, 1.5)."""
    return tuple(float(part) for part in text.split(","))


Group = TypeVar("Group", bound="Options")


class Options(BaseModel):
    """Hold a group of parameters: immutable, every value checked, unknown names rejected.

    Attributes:
        heading: title of the group in parameter cells and in the documentation.
        hint: where the allowed parameters are documented, for error messages.
        untracked: parameters of this group that change how a result is computed, but not the result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    heading: ClassVar[str] = ""
    hint: ClassVar[str] = "see `ldm params 01` to `ldm params 06`"
    untracked: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **values: Any) -> None:
        """Check the values; text is converted.

        Raises:
            ConfigError: an unknown name, a wrong type or a value out of range, in one line.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._explained(error) from None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build the options from values by name, as the constructor does."""
        return cls(**values)

    @classmethod
    def _explained(cls, error: ValidationError) -> ConfigError:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        given = f"{name} = {problem['input']!r}: " if name else ""
        if problem["type"] == "extra_forbidden":
            return ConfigError(f"unknown parameter {name!r}", fix=nearest(name, cls.model_fields))
        renamed = RENAMED_VALUES.get(str(problem["input"])) if problem["type"] == "literal_error" else None
        fix = f"it is called {renamed!r} since version 0.8" if renamed else cls.hint
        return ConfigError(given + problem["msg"].removeprefix("Value error, "), fix=fix)

    def part(self, cls: type[Group]) -> Group:
        """Return the options of one group, such as `LatentOptions`, as an object of that class."""
        return cls(**{name: getattr(self, name) for name in cls.model_fields if hasattr(self, name)})

    def tracked(self) -> dict[str, Any]:
        """Return the parameters that decide the result."""
        untracked = frozenset().union(*(cls.untracked for cls in type(self).__mro__ if issubclass(cls, Options)))
        return {name: value for name, value in self.model_dump().items() if name not in untracked}


class SeedOptions(Options):
    """Hold the seed of all random numbers."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of all random numbers")


class DeviceOptions(Options):
    """Choose where a network runs."""

    heading = "Device"
    untracked = frozenset({"device"})
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device; auto takes a GPU if there is one")
    precision: Literal["auto", "32", "bf16", "16"] = Field(
        "auto", description="floating-point precision; auto: bf16 (or 16) on a GPU, 32 on a CPU"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the parameter that was probably meant, as the fix of an error message."""
    if name in RENAMED:
        new = RENAMED[name]
        return new if " " in new else f"it is called {new!r} since version 0.8"
    match = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {match[0]!r}?" if match else "see `ldm params 01` to `ldm params 06`"
