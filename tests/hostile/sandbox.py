"""Runs `ghm` in forked processes with limits, from a server that has imported what it needs."""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

SECONDS = 90
ADDRESS_SPACE, RESIDENT, FILE_SIZE = 8 * 2**30, 3 * 2**30, 2**30  # bytes
SHOWN = 2**24  # bytes of a stream that are looked at
# what commands import in their bodies; a process takes seconds for it
PRELOAD = [
    "ghm_d2.cli.app",
    "ghm_d2.data.checking.check",
    "ghm_d2.data.importing.folders",
    "ghm_d2.inference.evaluation.evaluate",
    "ghm_d2.inference.predict",
    "ghm_d2.modeling.dssd.ssd",
    "ghm_d2.modeling.retinanet",
    "ghm_d2.modeling.backbones.timm_backbone",
    "ghm_d2.modeling.yolov3.yolov3",
    "ghm_d2.reports.report",
    "ghm_d2.training.train",
    "matplotlib.font_manager",
]


@dataclass(frozen=True)
class Result:
    """The result of a command: its exit code, streams and peak memory in bytes."""

    code: int | None  # None: killed at the time limit; -n: killed by signal n
    out: str
    err: str
    resident: int


def run(words: list[str], work: Path, streams: Path) -> Result:
    """Run `ghm` with `words` in the folder `work`; what it prints goes to files in `streams`."""
    process = server().Process(target=command, args=(words, work, streams))
    process.start()
    process.join(SECONDS)
    code = process.exitcode
    if code is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    out, err, peak = (first_bytes(streams / name) for name in ("out", "err", "peak"))
    return Result(code, out, err, int(peak or 0))


@functools.cache
def server():
    """The context of multiprocessing whose processes are forks of one that has torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="200"):
        multiprocessing.forkserver.ensure_running()
    return context


def command(words: list[str], work: Path, streams: Path) -> None:
    """The forked process: its limits, then the command."""
    os.setsid()  # so that the processes it starts can be ended with it
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(work)
    os.environ["HOME"] = str(work.parent / "home")
    limits = {"RLIMIT_AS": ADDRESS_SPACE, "RLIMIT_CPU": SECONDS, "RLIMIT_FSIZE": FILE_SIZE}
    for limit, most in limits.items():
        with suppress(OSError, ValueError):  # macOS has no limit of the address space
            resource.setrlimit(getattr(resource, limit), (most, most))
    from ghm_d2.cli.app import main

    sys.argv = ["ghm", *words]
    try:
        main()
    finally:
        (streams / "peak").write_text(str(peak_memory()), encoding="utf-8")


def peak_memory() -> int:
    """The most bytes of memory that this process, or one that it started, has held."""
    people = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    most = max(resource.getrusage(who).ru_maxrss for who in people)
    return most * (1 if sys.platform == "darwin" else 1024)


def first_bytes(path: Path) -> str:
    """The first bytes of a stream, as text."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        return file.read(SHOWN).decode("utf-8", "replace")
