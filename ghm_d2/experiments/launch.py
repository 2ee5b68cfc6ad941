"""Trains each run in a separate process: on this machine, or as a job of `submitit`.

A separate process frees all its memory at the end and has its own memory peak. If it dies, no
other run is lost.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ghm_d2.errors import EXIT_INTERRUPTED, DivergedError, GHMError, UsageError
from ghm_d2.experiments.plan import PlannedRun
from ghm_d2.locks import take
from ghm_d2.progress import Progress
from ghm_d2.records import FINISHED, RunRecord, RunsTable
from ghm_d2.run_folder import BEST_WEIGHTS, CHECKPOINTS, FINAL_WEIGHTS, LOCK_FILE, LOG_FILE

BUSY = 75  # exit code: another process is training this run


def train_run(run: PlannedRun, table_file: Path, device: str) -> int:
    """Train and analyse one run, and add it to the table; an interrupted run is resumed.

    Returns:
        0, BUSY, EXIT_INTERRUPTED, or the exit code of an error, whose message is in log.txt. A
        diverged run counts as a result: 0.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / LOCK_FILE, "a") as lock:
        if not take(lock):
            return BUSY
        table = RunsTable(table_file)
        if run.is_done(table):
            return 0
        _log_to(run.folder / LOG_FILE)
        for unfinished in run.folder.glob("*.tmp"):
            unfinished.unlink()  # left by a killed process
        try:
            _train(run, device)
        except DivergedError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except GHMError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except Exception:
            traceback.print_exc()
            return 1
        record = asdict(RunRecord.read(run.folder))
        folder = Path(os.path.relpath(run.folder, table_file.parent)).as_posix()
        table.append({"key": run.key, "folder": folder, "record": record})
        if not run.analyse:
            for weights in (FINAL_WEIGHTS, BEST_WEIGHTS):  # nobody reads a trial's weights
                (run.folder / weights).unlink(missing_ok=True)
    return 0


def is_training(run: PlannedRun) -> bool:
    """True while another process trains this run.

    Raises:
        UsageError: its folder is on a file system without locks.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / LOCK_FILE, "a") as lock:
        return not take(lock)


def _log_to(file: Path) -> None:
    """Append all output of this process, including its libraries' output, to a file."""
    sys.stdout.flush()
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _train(run: PlannedRun, device: str) -> None:
    from ghm_d2.training.train import train

    _quiet()
    cfg = run.build_config(device)
    cfg.OUTPUT_DIR = str(run.folder)
    record, evaluation = run.record(), None
    weights = run.folder / FINAL_WEIGHTS
    if record is None or record.status != FINISHED or not weights.is_file():
        # a finished run without its weights is trained again
        resume = record is None or record.status != FINISHED
        record, evaluation = train(cfg, run.label, resume=resume, progress=LogProgress())
        for checkpoint in run.folder.glob(CHECKPOINTS):
            checkpoint.unlink()  # model_final and model_best stay
    if run.analyse:
        from ghm_d2.analysis.after_training import analyse_run

        analyse_run(cfg, record, LogProgress(), evaluation)


class LogProgress(Progress):
    """Writes the messages that a person should read into log.txt."""

    def message(self, text):
        print(text, flush=True)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("detectron2", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)


def find_devices(words: str) -> list[str]:
    """The devices of this machine that `--device` names, such as ["cuda:0", "cuda:1"].

    Args:
        words: as for `pick_device`, or several with commas between them. "cuda" means all GPUs,
            and so does "auto" if there are any.

    Raises:
        UsageError: a device is unknown or not available.
    """
    import torch

    from ghm_d2.training.prepare import pick_device

    found: list[str] = []
    for word in words.split(","):
        device = pick_device(word.strip())
        every = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        found += every if device == "cuda" else [device]
    return list(dict.fromkeys(found))


def _share_cores(runs: int) -> None:
    """Divide the cores among simultaneous runs by OMP_NUM_THREADS, unless it is set already.

    Processes started from here inherit the variable.
    """
    import torch

    if runs == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // runs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)  # so the plan is timed, and names its device, as the runs do


class LocalLauncher:
    """Starts runs on the devices of this machine, up to `jobs` at a time on each."""

    def __init__(self, devices: Sequence[str], jobs: int = 1):
        """
        Args:
            devices: as from `find_devices`.
            jobs: number of simultaneous runs on each device, at least 1.
        """
        self.free = [*devices] * jobs
        _share_cores(len(self.free))

    def start(self, run: PlannedRun, table_file: Path) -> "LocalJob":
        """Start a run on a free device; there must be one."""
        return LocalJob(run, table_file, self.free)


class LocalJob:
    """A run in a process on this machine."""

    def __init__(self, run: PlannedRun, table_file: Path, free: list[str]):
        self._free, self._device = free, free.pop(0)
        spawn = multiprocessing.get_context("spawn")  # CUDA does not work after a fork
        arguments = (run, table_file, self._device)
        self._process = spawn.Process(target=_in_process, args=arguments)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        code = self._process.exitcode
        if code is not None and self._device:
            self._free.append(self._device)
            self._device = ""
        return code

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end."""
        if self._process.is_alive():
            self._process.terminate()

    def wait(self) -> None:
        """Wait for the run's end."""
        self._process.join()


def _in_process(run: PlannedRun, table_file: Path, device: str) -> None:
    os.setpgrp()  # Ctrl-C reaches the comparison only, which asks the run to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(train_run(run, table_file, device))


def _end_with_parent() -> None:
    """When the comparison has ended or was killed, let the run save a checkpoint and end."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class SubmititLauncher:
    """Submits each run through `submitit` as a Slurm job, or as a local one without Slurm.

    Slurm's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, ...) say where jobs go.
    """

    def __init__(self, folder: Path, minutes: int, device: str):
        """
        Args:
            folder: where submitit keeps its logs.
            minutes: time limit of a job.
            device: a job's device: "cpu", "cuda" (the job asks for a GPU) or "auto".

        Raises:
            UsageError: submitit is not installed.
        """
        try:
            import submitit
        except ImportError:
            raise UsageError("--launcher submitit needs submitit: pip install submitit") from None
        self._executor = submitit.AutoExecutor(folder=folder)
        gpus = int(device.startswith("cuda"))
        self._executor.update_parameters(name="ghm", timeout_min=minutes, gpus_per_node=gpus)
        self._device = device
        self.free = [None]  # there is always room in a queue

    def start(self, run: PlannedRun, table_file: Path) -> "SubmititJob":
        """Submit a run."""
        return SubmititJob(self._executor.submit(train_run, run, table_file, self._device))


class SubmititJob:
    """A run in a job of `submitit`."""

    def __init__(self, job):
        self._job = job

    def poll(self) -> int | None:
        """The exit code, or None while the job waits or runs."""
        if not self._job.done():
            return None
        return 1 if self._job.exception() else self._job.result()

    def stop(self) -> None:
        """Cancel the job; it can be resumed."""
        self._job.cancel()

    def wait(self) -> None:
        """Return at once: the queue ends a cancelled job."""
