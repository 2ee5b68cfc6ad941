"""Locks on files: all processes of a machine see them, and mostly those of others on a network."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghm_d2.errors import UsageError
from ghm_d2.run_folder import LOCK_FILE


def take(lock) -> bool:
    """Lock a file, open for writing as network file systems want it, until it is closed.

    Returns:
        False where somebody else has it.

    Raises:
        UsageError: it is on a file system without locks.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"{lock.name}: cannot be locked ({error.strerror}); choose an --output on a file "
            "system with locks"
        ) from None
    return True


@contextmanager
def training_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, where its file system has locks.

    Raises:
        UsageError: another process is training in it.
    """
    with open(folder / LOCK_FILE, "a") as lock:
        try:
            free = take(lock)
        except UsageError:
            free = True  # nobody can tell
        if not free:
            raise UsageError(f"another process is training in {folder}; --output names another one")
        yield
