"""Several processes: `--num-gpus N` starts torchrun, which starts the same command N times."""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from ghm_d2.errors import EXIT_INTERRUPTED, GHMError, PeerError, RunError, UsageError
from ghm_d2.files import write_text
from ghm_d2.run_folder import CONFIG_FILE, LAUNCH_FILE

_RUN_ID = "TORCHELASTIC_RUN_ID"  # a group's id, the same after restarts
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's error file, one per process
_SHOWS_ERRORS = "GHM_SHOWS_ERRORS"  # set if the launching process shows the errors


@dataclass
class Group:
    """The numbers of processes, machines and restarts, and HOST:PORT where the machines meet."""

    num_gpus: int = 1  # on each machine
    num_machines: int = 1
    rdzv: str | None = None
    max_restarts: int = 0

    @property
    def wanted(self) -> bool:
        """True if torchrun has to be started."""
        asked = (self.num_gpus, self.num_machines, self.max_restarts) != (1, 1, 0)
        return asked and not is_member()


def is_member() -> bool:
    """Return whether torchrun started this process."""
    return _RUN_ID in os.environ


def rank() -> int:
    """The rank of this process; 0 without a group."""
    return int(os.environ.get("RANK", 0)) if is_member() else 0


def restarts() -> int:
    """Return the number of times that torchrun has restarted the group."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if is_member() else 0


def leave_launch_id(folder: Path) -> None:
    """Write into a run's folder the id of the group that began or resumed it."""
    if is_member():
        write_text(folder / LAUNCH_FILE, os.environ[_RUN_ID])


def was_begun(folder: Path) -> bool:
    """Return whether torchrun restarted this group after it had begun the run in `folder`."""
    file = folder / LAUNCH_FILE
    if not restarts() or not file.is_file() or not (folder / CONFIG_FILE).is_file():
        return False
    return file.read_text() == os.environ[_RUN_ID]


def leave_error(error: GHMError) -> bool:
    """Write an error into torchrun's error file; return whether the launching process shows it.

    torchrun's own `record` writes no exit code, but `end_if_hopeless` needs it.
    """
    if not is_member():
        return False
    if not isinstance(error, PeerError):
        row = {"message": str(error), "timestamp": int(time.time()), "exit_code": error.exit_code}
        with open(os.environ[_ERROR_FILE], "w", encoding="utf-8") as out:
            json.dump(row, out)
    return _SHOWS_ERRORS in os.environ


def end_if_hopeless() -> None:
    """End a restarted process with the error before the restart, if it would occur again.

    torchrun restarts a group after any error; one in the configuration or the data would recur.
    """
    if not restarts():
        return
    attempts = Path(os.environ[_ERROR_FILE]).parents[1]
    before = attempts.parent / f"attempt_{restarts() - 1}"
    for file in before.glob("*/error.json"):
        row = json.loads(file.read_text(encoding="utf-8"))
        if row.get("exit_code", 1) not in (1, None):
            shutil.copy(file, os.environ[_ERROR_FILE])
            raise typer.Exit(row["exit_code"])


def launch(
    group: Group, show_error: Callable[[str], None], remedy: str = "--resume continues the run"
) -> None:
    """Run this same command under torchrun, in the processes of `group`, and wait for them.

    Args:
        show_error: is called with the message of the process that failed first.
        remedy: tells the user what to do if a process was killed.

    Raises:
        UsageError: the options do not make a group.
        RunError: a process ended without a message, for example because it was killed.
        typer.Exit: with a process's exit code, after its message was shown.
    """
    _check(group)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _set_environment(group)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    meeting = ["--standalone"]
    if group.num_machines > 1:
        meeting = ["--nnodes", str(group.num_machines), "--rdzv-backend", "c10d"]
        meeting += ["--rdzv-endpoint", group.rdzv, "--rdzv-id", "ghm"]
    words = ["--nproc-per-node", str(group.num_gpus), "--max-restarts", str(group.max_restarts)]
    arguments = run.parse_args([*meeting, *words, "-m", "ghm_d2.cli", *sys.argv[1:]])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        _tell_first(error.failures, show_error, remedy)
    except SignalException:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _check(group: Group) -> None:
    if min(group.num_gpus, group.num_machines) < 1 or group.max_restarts < 0:
        raise UsageError(
            "--num-gpus and --num-machines must be at least 1, and --max-restarts at least 0"
        )
    if group.num_machines > 1 and not group.rdzv:
        raise UsageError("--num-machines needs --rdzv HOST:PORT, the same on all machines")
    if group.num_machines > 1 and group.max_restarts:
        raise UsageError(
            "--max-restarts works only on one machine; with several, run the command with --resume "
            "on each machine after a failure"
        )


def _set_environment(group: Group) -> None:
    """Set environment variables that torchrun's processes inherit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // group.num_gpus)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report ranks that have ended
    # otherwise a restarted group may find the addresses of the previous one
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[_SHOWS_ERRORS] = "1"


def _tell_first(failures: dict, show_error: Callable[[str], None], remedy: str) -> None:
    """Show the message of the process that failed first, and exit with its code."""
    spoken = [f for f in failures.values() if os.path.isfile(f.error_file)]
    killed = [f for f in failures.values() if f.exitcode < 0]
    if spoken:
        first = min(spoken, key=lambda f: f.timestamp)
        show_error(first.message)
        raise typer.Exit(first.exitcode)
    codes = {f.exitcode for f in failures.values()}
    if codes == {EXIT_INTERRUPTED}:
        raise typer.Exit(EXIT_INTERRUPTED)
    first = (killed or list(failures.values()))[0]
    code = first.exitcode
    how = f"was killed by signal {-code}" if killed else f"ended with exit code {code}"
    raise RunError(f"one of the processes (pid {first.pid}) {how}; {remedy}")
