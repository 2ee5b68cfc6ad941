"""Writes a data set folder whole or not at all, and never over somebody else's files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghm_d2.data.coco_json import SPLITS
from ghm_d2.errors import DataError, UsageError

IMPORT_REPORT, MAKE_REPORT = "import_report.json", "make_report.json"
CLEAN_REPORT = "clean_report.json"
REPORTS = {IMPORT_REPORT, MAKE_REPORT, CLEAN_REPORT}
_OURS = {f"{split}.json" for split in SPLITS} | {"images"} | REPORTS


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which replaces `folder` when the body succeeds.

    Raises: UsageError if `folder` is not empty and `overwrite` is False, or if it holds anything
    that `ghm data make`, `import` or `clean` did not write; DataError if it cannot be written.
    """
    folder = Path(folder).absolute()
    _refuse_foreign(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private, unlike mkdir
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        yield draft
        if overwrite and folder.exists():
            _refuse_foreign(folder, overwrite)  # it may have changed meanwhile
            shutil.rmtree(folder)
        _move(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)  # replaces an empty folder, and never one that holds something
    except OSError:
        raise UsageError(
            f"{folder}: another process has written to this folder; choose another folder"
        ) from None


def _refuse_foreign(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder}: is not a folder")
    content = {entry.name for entry in folder.iterdir()}
    if content and not overwrite:
        raise UsageError(f"{folder}: is not empty; choose another folder or pass --overwrite")
    foreign = sorted(content - _OURS)
    if content and (foreign or not content & REPORTS):
        held = f"contains {foreign[0]}, which" if foreign else "this folder"
        raise UsageError(
            f"{folder}: {held} was not written by ghm, so --overwrite does not delete it; "
            "choose another folder"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
