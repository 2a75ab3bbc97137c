"""What a user can mend: printed by the command line as one message, without a traceback."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxdict = 3


class UserError(ValueError):
    """Input or settings that cannot work; the message says why and what to do instead."""


class UnsupportedModelError(UserError):
    """The model's architecture cannot run packed."""


class OutOfMemoryError(UserError):
    """An allocation failed in a forward pass of so many token slots; the message says what would help."""

    def __init__(self, message: str, slots: int) -> None:
        super().__init__(message)
        self.slots = slots


class TrainingDivergedError(RuntimeError):
    """A loss, a gradient or an update is no longer a number; the message says which weights there are on disk."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


class OtherRankFailedError(RuntimeError):
    """Another process of the job has failed first, and says why; this one has nothing to add."""


class SaveError(RuntimeError):
    """A file of a run could not be written; what was there before still is."""

    def __init__(self, path: object, cause: BaseException):
        self.reason = str(getattr(cause, "strerror", None) or first_line(cause)).rstrip(".")
        super().__init__(
            f"{path} could not be written: {self.reason}; free some space, or check permissions and quota."
        )


def first_line(error: BaseException) -> str:
    """Shorten an error's message to one sentence."""
    line = str(error).strip().split("\n")[0]
    return line if line.endswith(".") else f"{line}."


class DataError(UserError):
    """What a user can put right in the data or its settings; `reason` is the short label it is counted under."""

    def __init__(self, message: str, *, reason: str = "unusable"):
        super().__init__(message)
        self.reason = reason


def bad_row(where: str, message: str, reason: str) -> DataError:
    """Make the error for a single unusable row, with the way out that all of them share."""
    return DataError(f"{where}: {message}. --skip-bad-rows drops and counts such rows", reason=reason)


def short(value: Any) -> str:
    """Show a value of a row, cut to fit into a message."""
    return _SHORT.repr(value)
