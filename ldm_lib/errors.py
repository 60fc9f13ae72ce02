"""Define the errors that users can fix: one line each, with place, cause, numbers and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    """Return the text in one line, with control and unencodable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class LdmError(Exception):
    """Report something that the user can fix; the command line prints it without a traceback.

    Args:
        cause: what was given and what is allowed, with the numbers.
        where: the file, case, parameter or stage concerned.
        fix: what to do next, as an imperative.
    """

    def __init__(self, cause: str, *, where: object = "", fix: str = "") -> None:
        self.cause, self.where, self.fix = cause, str(where), fix
        super().__init__(cause, self.where, fix)

    def within(self, *folders: object) -> str:
        """Return the message with paths relative to these folders."""
        text = str(self)
        for folder in folders:
            text = text.replace(f"{folder}/", "")
        return text

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        fix = f" Fix: {_sentence(self.fix)}" if self.fix else ""
        return printable(f"{place}{_sentence(self.cause)}{fix}")


@contextmanager
def located(where: object) -> Iterator[None]:
    """Give errors that are raised within this context, and name no place yet, a place."""
    try:
        yield
    except LdmError as error:
        error.where = error.where or str(where)
        raise


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text.rstrip('.')}."


class InputError(LdmError):
    """Reject a volume, mask, map or case that cannot be used as given."""


class ConfigError(LdmError):
    """Reject a parameter with an unknown name, a wrong type or a value out of range."""


class RunError(LdmError):
    """Report a run folder that is locked, incomplete, finished with other settings, or not writable."""


class WeightsError(LdmError):
    """Reject a model folder or checkpoint that is missing, damaged, unsafe or of another kind."""


class TrainingError(LdmError):
    """Stop a training that cannot continue: a non-finite loss, or a checkpoint that does not fit."""


class InterruptionError(LdmError):
    """Report work that was stopped by a signal and can be resumed.

    Args:
        status: the exit status, 128 plus the number of the signal.
    """

    def __init__(self, cause: str, *, where: object = "", fix: str = "", status: int = 143) -> None:
        super().__init__(cause, where=where, fix=fix)
        self.status = status
