"""Logging: what libraries say goes into the run's log.txt, and nowhere else.

What this project says before there is a log.txt, as on its data, is shown on stderr too.
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
    """Keep the libraries' log records and warnings to themselves, in child processes too.

    This project's own records are shown.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # of a group the first process alone has a log; a fault of another is a traceback all the same
    level = logging.CRITICAL if rank() else logging.ERROR
    for name in ("detectron2", "fvcore", "lvis"):
        logging.getLogger(name).setLevel(level)
    own = logging.getLogger("ghm_d2")
    own.setLevel(level if rank() else logging.INFO)  # rank 0 tells what is to be told
    own.handlers, own.propagate = [_Early()], False
    threading.excepthook = _log_failure
    logging.raiseExceptions = False  # a log on a full disk is not what a run ends for


def _log_failure(failed: threading.ExceptHookArgs) -> None:
    """Log what a library's thread ended with; whoever waits for the thread tells the user."""
    info = (failed.exc_type, failed.exc_value, failed.exc_traceback)
    logging.getLogger("ghm_d2").error("a thread failed", exc_info=info)
