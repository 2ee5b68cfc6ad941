"""Errors that a user can mend, each with the exit code the command line ends with.

The message is one line: what is wrong, where (file, key or value) and the remedy.
Anything else that escapes is a fault of ours and ends with exit code 1.
"""

EXIT_INTERRUPTED = 130


class GHMError(Exception):
    """Base of the errors below; never raised itself."""

    exit_code = 1


class RunError(GHMError):
    """A run of a comparison ended by a fault of ours, or was killed."""


class UsageError(GHMError):
    """A wrong option, configuration key or value."""

    exit_code = 2


class DataError(GHMError):
    """A data set, image or annotation that cannot be used."""

    exit_code = 3


class WeightsError(GHMError):
    """Weights that are missing, truncated, hostile or do not fit."""

    exit_code = 3


class DivergedError(GHMError):
    """A loss or gradient stopped being finite; `what` says when and which, in brief."""

    exit_code = 4

    def __init__(self, message: str, what: str = ""):
        super().__init__(message)
        self.what = what or message
