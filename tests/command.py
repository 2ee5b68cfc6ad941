"""The command line inside the tests' process, which leaves the process as it found it."""

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from typer.testing import CliRunner

from ghm_d2.cli.app import app


@dataclass
class Done:
    """The result of a command, with the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*words, cwd=None) -> Done:
    """Run `ghm` with words, from the folder `cwd`. An exception is a traceback on stderr."""
    words = [str(word) for word in words]
    with as_it_was(), working_folder(cwd), mock.patch.object(sys, "argv", ["ghm", *words]):
        result = CliRunner(env={"COLUMNS": "80"}).invoke(app, words, prog_name="ghm")
    stderr = result.stderr
    if result.exception and not isinstance(result.exception, SystemExit):
        stderr += "".join(traceback.format_exception(*result.exc_info))
    return Done(result.exit_code, result.stdout, stderr)


@contextlib.contextmanager
def working_folder(folder):
    """contextlib.chdir, which Python 3.10 lacks; None stays where it is."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def as_it_was():
    """Undo what a command does to its process: it need not, since its process ends with it."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.dict(os.environ))
        undo.enter_context(warnings.catch_warnings())
        undo.callback(setattr, threading, "excepthook", threading.excepthook)
        undo.callback(logging.captureWarnings, False)
        for keep in (keep_signals, keep_loggers, keep_data_sets, keep_random_states, keep_torch):
            undo.enter_context(contextlib.contextmanager(keep)())
        yield


def keep_signals():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def keep_loggers():
    """Close the handlers that were added, too."""

    def loggers():
        return [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]

    def state(logger):
        return list(logger.handlers), logger.level, logger.propagate, logger.disabled

    before, raises = {logger: state(logger) for logger in loggers()}, logging.raiseExceptions
    yield
    logging.raiseExceptions = raises
    for logger in loggers():
        handlers, level, *flags = before.get(logger, ([], logging.NOTSET, True, False))
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers, (logger.propagate, logger.disabled) = handlers, flags
        logger.setLevel(level)


def keep_data_sets():
    before = [(catalog, set(catalog.list())) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in before:
        for name in set(catalog.list()) - names:
            catalog.remove(name)


def keep_random_states():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def keep_torch():
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)
    torch.use_deterministic_algorithms(deterministic)
    cudnn.benchmark, cudnn.deterministic = flags
