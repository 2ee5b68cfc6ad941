"""Errors that a user can mend, each with the exit code the command line ends with.

The message is one line: what is wrong, where (file, key or value) and the remedy.
Anything else that escapes is a fault of ours and ends with exit code 1.
"""

import errno

EXIT_INTERRUPTED = 130


def printable(text: str) -> str:
    """Return `text` with characters that steer a terminal, or turn its direction, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class GHMError(Exception):
    """Base of the errors below; never raised itself.

    Its text is one line whatever names stand in it, which strangers may have chosen: what would
    end the line or steer a terminal is shown as an escape.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(GHMError):
    """A run, or a process that it needs, ended by a fault of ours or was killed."""


class PeerError(RunError):
    """The end of another process of the group, which has said why."""


class UsageError(GHMError):
    """A wrong option, configuration key or value."""

    exit_code = 2


class OutputError(GHMError):
    """A file that cannot be written: the disk is full, the folder read-only or gone."""

    exit_code = 2

    @classmethod
    def of(cls, path, error: OSError) -> "OutputError":
        """Return the error for a failure to write `path`, with what to do about it."""
        otherwise = (error.strerror or str(error), "write elsewhere")
        reason, remedy = _OUTPUT_FAULTS.get(error.errno, otherwise)
        return cls(
            f"{path} cannot be written: {reason}; files saved earlier are whole; {remedy}, then "
            "run the command again (a training with --resume)"
        )


_OUTPUT_FAULTS = {  # errno -> reason, remedy
    errno.ENOSPC: ("no space is left on its disk", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("it would be longer than the limit on files", "raise the limit (ulimit -f)"),
    errno.EROFS: ("its file system is read-only", "make it writable or write elsewhere"),
    errno.EACCES: ("permission denied", "make its folder writable or write elsewhere"),
    errno.ENOENT: ("its folder is not there", "bring the folder back"),
    errno.EIO: ("its disk failed", "check the disk or write elsewhere"),
}


class DataError(GHMError):
    """A data set, image or annotation that cannot be used."""

    exit_code = 3


class WeightsError(GHMError):
    """Weights that are missing, truncated, hostile or do not fit."""

    exit_code = 3


class DivergedError(GHMError):
    """A loss or gradient stopped being finite.

    `what` says when and which, in brief; `report` is what is known, as plain data.
    """

    exit_code = 4

    def __init__(self, message: str, what: str = "", report: dict | None = None):
        super().__init__(message)
        self.what = what or message
        self.report = report or {}
