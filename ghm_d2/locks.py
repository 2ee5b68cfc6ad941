"""File locks. All processes of a machine see them; most network file systems share them."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghm_d2.errors import UsageError
from ghm_d2.run_folder import LOCK_FILE


def take(lock) -> bool:
    """Lock `lock`, a file open for writing (network file systems need that), until it is closed.

    Returns:
        False if another process has locked it.

    Raises:
        UsageError: its file system has no locks.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"{lock.name}: cannot be locked ({error.strerror}); choose an --output on a file "
            "system that supports file locks"
        ) from None
    return True


@contextmanager
def training_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, if its file system has locks.

    Raises:
        UsageError: another process is training in it.
    """
    with open(folder / LOCK_FILE, "a") as lock:
        try:
            free = take(lock)
        except UsageError:
            free = True  # without locks nobody can tell
        if not free:
            raise UsageError(
                f"another process is training in {folder}; choose another folder with --output"
            )
        yield
