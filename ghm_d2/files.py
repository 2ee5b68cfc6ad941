"""Files that are written whole or not at all."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ghm_d2.errors import OutputError

_UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.tmp$")  # suffix of a file that is being written
_ABANDONED_AFTER = 3600  # seconds without a change; no write takes as long


def write_json(file: Path, value) -> None:
    """Write `value` as JSON, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
        ValueError: `value` holds a NaN or an infinity, which JSON lacks.
    """
    write_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")


def content_hash(path: str | Path, algorithm: str = "sha256"):
    """Return the hashlib hash of a file, which is read in blocks of 1 MiB; raises OSError."""
    content = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None for NaN ("not defined") and infinities, which JSON lacks."""
    return float(value) if math.isfinite(value) else None


def spreadsheet_cell(value):
    """Quote text for a CSV file if a spreadsheet would read it as a formula, such as "=A1"."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def write_text(file: Path, text: str) -> None:
    """Write `text`, whole or not at all; raises OutputError if the file cannot be written."""
    write_atomically(str(file), lambda out: out.write(text.encode()))


def write_atomically(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` by what `write` writes to the file it is given, or leave `path` unchanged.

    The bytes reach the disk before the name does, so a power cut leaves the old file or the new
    one. A later save into the folder removes the temporary file of a killed writer.

    Raises:
        OutputError: the file cannot be written.
    """
    folder = os.path.dirname(path) or "."
    unfinished = f"{path}.{secrets.token_hex(4)}.tmp"  # another process may write `path` too
    _remove_abandoned(folder)
    try:
        _write_to_disk(unfinished, write)
        os.replace(unfinished, path)
        _sync_folder(folder)
    except OSError as error:
        raise OutputError.of(path, error) from error
    finally:  # after Ctrl-C too; after os.replace there is nothing to remove
        with suppress(OSError):
            os.unlink(unfinished)


def _write_to_disk(path: str, write: Callable[[BinaryIO], Any]) -> None:
    noting = None
    try:
        with open(path, "xb") as file:
            noting = _NotingFile(file)
            write(noting)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError:
        if noting is None or noting.error is None:
            raise
    if noting.error is not None:
        raise noting.error


class _NotingFile:
    """A file that keeps the error of a failed write, which `torch.save` turns into RuntimeError."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def _sync_folder(folder: str) -> None:
    """Flush a folder's entries, the names of its files, to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(opened)


def _remove_abandoned(folder: str) -> None:
    with suppress(OSError):  # a failed clean-up must not stop the save
        for entry in os.scandir(folder):
            oldest = time.time() - _ABANDONED_AFTER
            if _UNFINISHED.search(entry.name) and entry.stat().st_mtime < oldest:
                os.unlink(entry.path)
