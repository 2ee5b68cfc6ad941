"""Logging: the records of libraries go into the run's log.txt, and nowhere else.

This project's own records from before log.txt exists, such as on the data, also go to stderr.
"""

import logging
import os
import threading
import warnings
from pathlib import Path

from ghm_d2.errors import printable
from ghm_d2.run_folder import LOG_FILE

from .console import err
from .group import rank


class _Early(logging.Handler):
    """Shows this project's log records on stderr before a run has a log, and keeps them for it."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record):
        self.records.append(record)
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        err.print(printable(f"{kind}{record.getMessage()}"), markup=False, highlight=False)


def log_to(folder: Path) -> None:
    """Send the log records of Detectron2, fvcore and this project to `folder`/log.txt."""
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    early = [h for h in logging.getLogger("ghm_d2").handlers if isinstance(h, _Early)]
    for record in (record for h in early for record in h.records):
        handler.handle(record)
    for name in ("detectron2", "fvcore", "ghm_d2", "py.warnings"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def quiet() -> None:
    """Silence the log records and warnings of libraries, in child processes too.

    This project's own records are shown.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # only rank 0 has a log; an unexpected error on another rank still ends in a traceback
    level = logging.CRITICAL if rank() else logging.ERROR
    for name in ("detectron2", "fvcore", "lvis"):
        logging.getLogger(name).setLevel(level)
    own = logging.getLogger("ghm_d2")
    own.setLevel(level if rank() else logging.INFO)  # only rank 0 shows messages
    own.handlers, own.propagate = [_Early()], False
    threading.excepthook = _log_failure
    logging.raiseExceptions = False  # a log on a full disk must not end a run


def _log_failure(failed: threading.ExceptHookArgs) -> None:
    """Log the exception that ended a thread; the code that waits for the thread tells the user."""
    info = (failed.exc_type, failed.exc_value, failed.exc_traceback)
    logging.getLogger("ghm_d2").error("a thread failed", exc_info=info)
