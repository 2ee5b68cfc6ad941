"""Caches results of checks in the user's cache folder, under a hash of the checked content.

Processes that need the same result at the same time wait for the one that computes it. A file that
is damaged, or that another user could have written, is ignored.
"""

import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cache_folder() -> Path:
    """Return the user's cache folder for this project, which need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "ghm_d2"


def remembered(key: str, kind: type[T], compute: Callable[[], T]) -> T:
    """Return the cached result for `key`, or compute and cache it.

    Args:
        key: the name of the result's file, without its suffix.
        kind: the result's type, a msgspec.Struct.

    Raises:
        the errors of `compute`, which are not cached.
    """
    file = _open(cache_folder() / "checked" / f"{key}.json")
    if file is None:
        return compute()
    with file:
        with suppress(OSError):  # a file system without locks: processes may do the same work
            _lock(file)
        with suppress(OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            checksum, text = file.read().split(b"\n", 1)
            if checksum == _checksum(text):
                return msgspec.json.decode(text, type=kind)
        result = compute()
        with suppress(OSError, ValueError, OverflowError):  # a full disk; values that JSON lacks
            text = msgspec.json.encode(result)
            file.seek(0)
            file.truncate()
            file.write(_checksum(text) + b"\n" + text)
    return result


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _lock(file) -> None:
    """Lock the file until it is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("another process is checking the same data; waiting for its result")
        fcntl.flock(file, fcntl.LOCK_EX)


def _open(path: Path):
    """Open the file for reading and writing; return None if it cannot be trusted or written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:
        return None
    status = os.fstat(number)
    own = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if own and stat.S_ISREG(status.st_mode):
        return os.fdopen(number, "r+b")
    os.close(number)
    return None
