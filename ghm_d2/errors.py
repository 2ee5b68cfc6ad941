"""Errors that a user can fix, each with the exit code of the command line.

The message is one line: what is wrong, where (file, key or value) and the remedy.
Any other exception that escapes is a bug in ghm_d2 and ends with exit code 1.
"""

import errno

EXIT_INTERRUPTED = 130


def printable(text: str) -> str:
    """Escape unprintable characters in `text`: they can control a terminal or reverse its text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class GHMError(Exception):
    """Base of the errors below; never raised itself.

    The text is always one line. Names in it may come from strangers, so characters that would end
    the line or control a terminal are escaped.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(GHMError):
    """A run, or a process that it needs, was killed or ended because of a bug."""


class PeerError(RunError):
    """Another rank has ended and has reported why."""


class UsageError(GHMError):
    """A wrong option, configuration key or value."""

    exit_code = 2


class OutputError(GHMError):
    """A file that cannot be written: the disk is full, the folder read-only or gone."""

    exit_code = 2

    @classmethod
    def of(cls, path, error: OSError) -> "OutputError":
        """Return the error for a failure to write `path`, with what to do about it."""
        otherwise = (error.strerror or str(error), "write to another folder")
        reason, remedy = _OUTPUT_FAULTS.get(error.errno, otherwise)
        return cls(
            f"{path} cannot be written: {reason}; {remedy}, then run the command again (a training "
            "with --resume); files saved earlier are intact"
        )


_OUTPUT_FAULTS = {  # errno -> reason, remedy
    errno.ENOSPC: ("its disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("it would exceed the limit on file sizes", "raise the limit (ulimit -f)"),
    errno.EROFS: ("its file system is read-only", "make it writable or write to another one"),
    errno.EACCES: ("permission denied", "make its folder writable or write to another one"),
    errno.ENOENT: ("its folder does not exist", "create the folder again"),
    errno.EIO: ("its disk reports an I/O error", "check the disk or write to another one"),
}


class DataError(GHMError):
    """A data set, image or annotation that cannot be used."""

    exit_code = 3


class WeightsError(GHMError):
    """Weights that are missing, truncated or hostile, or that do not fit the model."""

    exit_code = 3


class DivergedError(GHMError):
    """A loss or gradient is NaN or infinite.

    `what` says briefly which one and when; `report` has the details as plain data.
    """

    exit_code = 4

    def __init__(self, message: str, what: str = "", report: dict | None = None):
        super().__init__(message)
        self.what = what or message
        self.report = report or {}
