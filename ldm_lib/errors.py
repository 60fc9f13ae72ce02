"""The refusals of this project: each is one line that says where, what, with which numbers, and what to do."""


def printable(text: str) -> str:
    """The text in one line: whatever a terminal would act upon, or no encoding has, is written as Python writes it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class LdmError(Exception):
    """Something the user can mend; the command line prints it without a traceback.

    Args:
        cause: what was given and what is allowed, with the numbers.
        where: the file, case, parameter or stage it is about.
        fix: what to do next, as an imperative.
    """

    def __init__(self, cause: str, *, where: object = "", fix: str = "") -> None:
        self.cause, self.where, self.fix = cause, str(where), fix
        super().__init__(cause, self.where, fix)

    def within(self, *folders: object) -> str:
        """The line, what lies in one of these folders named from there."""
        text = str(self)
        for folder in folders:
            text = text.replace(f"{folder}/", "")
        return text

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f" Fix: {_sentence(self.fix)}" if self.fix else ""
        return printable(f"{place}{_sentence(self.cause)}{mend}")


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text.rstrip('.')}."


class InputError(LdmError):
    """A volume, mask, map or case that cannot be used as given."""


class ConfigError(LdmError):
    """A parameter with an unknown name, a wrong type or a value out of range."""


class RunError(LdmError):
    """A run folder that is locked, incomplete, finished with other settings, or not writable."""


class WeightsError(LdmError):
    """A model folder or checkpoint that is missing, damaged, unsafe or of another kind."""


class TrainingError(LdmError):
    """A training that cannot go on: a non-finite loss, or a checkpoint that does not fit."""


class InterruptionError(LdmError):
    """Work that was asked to end, did so at a place from where it goes on, and is not done.

    Args:
        status: the exit status that says so, 128 and the number of the signal.
    """

    def __init__(self, cause: str, *, where: object = "", fix: str = "", status: int = 143) -> None:
        super().__init__(cause, where=where, fix=fix)
        self.status = status
