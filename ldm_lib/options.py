"""Define the value types of parameters and the base class of all options.

The options of a sub-package stand in its `options.py`; the parameter models of the notebooks are composed of them in
`experiment/stages.py`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ldm_lib.errors import ConfigError

# Names of the versions before 0.8 -> the name that replaced them, or the advice to remove them and why.
RENAMED = {
    "shipped_weights": "pretrained",
    "front_end": "input_transform",
    "variety": "domain_randomisation",
    "min_ceiling_psnr": "min_reconstruction_psnr",
    "obedience_cases": "fidelity_cases",
    "what_if_days": "counterfactual_days",
    "norm": "remove it: normalisation is per voxel, but for imported weights",
    "perceptual_file": "remove it: there is no perceptual loss any more",
    "perceptual_weight": "remove it: there is no perceptual loss any more",
    "adversarial_weight": "remove it: there is no discriminator any more",
    "adversarial_start": "remove it: there is no discriminator any more",
    "voided_fraction": "remove it: half of the crops are of the voided image",
    "air_fraction": "remove it: a tenth of the crops are at random places",
    "schedule_shift": "remove it: it did not improve results",
    "zero_terminal_snr": "remove it: it did not improve results",
    "min_snr_gamma": "remove it: it made results worse",
    "latent_noise": "remove it: known latents are as they were encoded",
    "strategy": "remove it: training on several devices always uses DDP",
}
RENAMED_VALUES = {"draft": "initial_estimate", "usual": "narrow", "true": "exact"}  # of parameters with choices

MAX_COUNT = 10**8  # a larger count is a typing error that would take days or all memory
ORIENTATION_TEXT = 'empty, or three letters, one of R and L, of A and P, of S and I, such as "LPS"'
NAME_TEXT = "letters, digits, '.', '_' and '-' only, the first a letter or digit, at most 128"
INTEGERS_TEXT = 'positive integers separated by commas, such as "32,64,128"'
NUMBERS_TEXT = 'numbers from 0 up, separated by commas, such as "0,1,1.5"'
PLAIN_TYPES = {"boolean": "true, false", "string": "text", "object": "mapping of names to values", "null": "null"}
LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def _orientation(text: str) -> str:
    """Check that the letters of an orientation, such as "LPS", name three axes."""
    if text and sorted("RLAPSI".find(letter) // 2 for letter in text) != [0, 1, 2]:
        raise ValueError(ORIENTATION_TEXT)
    return text


def safe_name(text: str) -> str:
    """Check a name that becomes a file name: letters, digits, '.', '_' and '-', at most 128 characters, no path."""
    if not _SAFE_NAME.match(text):
        raise ValueError(NAME_TEXT)
    return text


def _integers(text: str) -> str:
    """Check a list of positive integers, such as "32,64,128"."""
    if not text or not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ValueError(INTEGERS_TEXT)
    return text


def _numbers(text: str) -> str:
    """Check a list of finite numbers from 0 up, such as "0,1,1.5"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError(NUMBERS_TEXT)
    return text


def names(text: str) -> tuple[str, ...]:
    """Split "a, b" into ("a", "b"), and "" into ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _some_integers(text: str) -> str:
    """Check a list of positive integers, or an empty text."""
    return text and _integers(text)


# A schema's "allowed" is what a text may be, in words.
Orientation = Annotated[str, AfterValidator(_orientation), Field(json_schema_extra={"allowed": ORIENTATION_TEXT})]
IntegerList = Annotated[str, AfterValidator(_integers), Field(json_schema_extra={"allowed": INTEGERS_TEXT})]
SomeIntegers = Annotated[
    str, AfterValidator(_some_integers), Field(json_schema_extra={"allowed": f"empty, or {INTEGERS_TEXT}"})
]
NumberList = Annotated[str, AfterValidator(_numbers), Field(json_schema_extra={"allowed": NUMBERS_TEXT})]
Name = Annotated[str, AfterValidator(safe_name), Field(json_schema_extra={"allowed": NAME_TEXT})]
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


def in_words(schema: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema allows, such as "integer from 1 to 4,096" or "auto, cpu, cuda"."""
    if "allowed" in schema:
        return str(schema["allowed"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(in_words(choice) for choice in schema["anyOf"])
    if schema["type"] == "array":
        return f"list ({in_words(schema['items'])})"
    if schema["type"] in PLAIN_TYPES:
        return PLAIN_TYPES[schema["type"]]
    limits = [f"{word} {schema[key]:,}" for key, word in LIMITS.items() if key in schema]
    return f"{schema['type']} {', '.join(limits)}".replace(", to", " to").strip()


Group = TypeVar("Group", bound="Options")


class Options(BaseModel):
    """Hold a group of parameters: immutable, every value checked, unknown names rejected.

    Attributes:
        heading: title of the group in parameter cells and in the documentation.
        hint: where the allowed parameters are documented, or what else to do, for error messages.
        untracked: parameters of this group that change how a result is computed, but not the result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    heading: ClassVar[str] = ""
    hint: ClassVar[str] = "give an allowed value"
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
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        """List the parameters in the docstring, for `help`."""
        super().__pydantic_init_subclass__(**settings)
        lines = [_attribute(name, field) for name, field in cls.model_fields.items() if field.description]
        if lines and cls.__doc__:
            cls.__doc__ = "\n        ".join([f"{cls.__doc__.rstrip()}\n\n    Attributes:", *lines]) + "\n    "

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build the options from values by name, as the constructor does."""
        return cls(**values)

    @classmethod
    def _explained(cls, error: ValidationError) -> ConfigError:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            return ConfigError(f"unknown parameter {name!r}", fix=nearest(name, cls.model_fields, cls.hint))
        if problem["type"] == "missing":
            return ConfigError(f"no {name!r} is given", fix=cls.hint)
        if not name:  # several parameters that contradict each other
            return ConfigError(problem["msg"].removeprefix("Value error, "), fix=cls.hint)
        renamed = RENAMED_VALUES.get(str(problem["input"])) if problem["type"] == "literal_error" else None
        fix = f"it is called {renamed!r} since version 0.8" if renamed else cls.hint
        finite = "finite " if problem["type"] == "finite_number" else ""
        allowed = finite + cls.allowed(*problem["loc"])
        return ConfigError(f"{name} = {problem['input']!r}: allowed: {allowed}", fix=fix)

    @classmethod
    def allowed(cls, name: object, *within: object) -> str:
        """Describe the allowed values of a parameter, or of an item within a list or mapping."""
        schema = cls.model_json_schema()["properties"][name]
        for _ in within:
            schema = schema.get("items", schema.get("additionalProperties", schema))
        return in_words(schema)

    def part(self, cls: type[Group]) -> Group:
        """Return the options of one group, such as `LatentOptions`, as an object of that class."""
        return cls(**{name: getattr(self, name) for name in cls.model_fields if hasattr(self, name)})

    def tracked(self) -> dict[str, Any]:
        """Return the parameters that decide the result."""
        untracked = frozenset().union(*(cls.untracked for cls in type(self).__mro__ if issubclass(cls, Options)))
        return {name: value for name, value in self.model_dump().items() if name not in untracked}


def _attribute(name: str, field: FieldInfo) -> str:
    """Describe a parameter in one line: name, description, choices and default."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    default = "required" if field.is_required() else f"default {field.default!r}"
    among = f"{', '.join(map(repr, choices))}; " if choices else ""
    return f"{name}: {field.description} ({among}{default})"


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


def nearest(name: str, known: Iterable[str], otherwise: str = "give one of them") -> str:
    """Suggest the name that was probably meant, or what to do otherwise, as the fix of an error message."""
    if name in RENAMED:
        new = RENAMED[name]
        return new if " " in new else f"it is called {new!r} since version 0.8"
    match = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {match[0]!r}?" if match else otherwise


def assignments(texts: Iterable[str]) -> dict[str, str]:
    """Return ["key=value", ...] as a mapping; a key that is given twice is rejected."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError(f"--set {text}: not KEY=VALUE", fix="write for example --set max_epochs=10")
        if name in values:
            raise ConfigError(f"--set {name} is given twice, {values[name]!r} and {value!r}", fix="keep one")
        values[name] = value
    return values
