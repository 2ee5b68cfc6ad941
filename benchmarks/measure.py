"""Helpers of the benchmarks: timing in turn, peak memory, and the machine's description."""

import json
import os
import platform
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, Timer

from ghm_d2 import describe, kernels

MORE_PACKAGES = ("mmdet", "triton")  # besides those of a run's record


def measure_in_turn(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float = float("inf"),
    warm_up: float = 0.02,
) -> dict[str, Measurement]:
    """Time every run once in each round, in an order that is shuffled anew (seed 0).

    A change in the machine's speed then affects all runs alike, and no run always follows the same
    other one. A run that is too short to be timed well is repeated within a round.

    Args:
        seconds: a run that has taken this long in all skips the rounds that are left.
        warm_up: seconds of each run before the first round.
    """
    threads = torch.get_num_threads()  # a Timer's own default is one
    timers = {n: Timer("run()", globals={"run": r}, num_threads=threads) for n, r in runs.items()}
    repeats = {n: t.blocked_autorange(min_run_time=warm_up) for n, t in timers.items()}
    taken: dict[str, list[Measurement]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        names = [n for n, done in taken.items() if _total_seconds(done) < seconds]
        for name in order.sample(names, len(names)):
            taken[name].append(timers[name].timeit(repeats[name].number_per_run))
    return {name: next(iter(Measurement.merge(done))) for name, done in taken.items()}


def _total_seconds(measurements: list[Measurement]) -> float:
    return sum(sum(m.raw_times) for m in measurements)


def figures(measurement: Measurement) -> dict:
    """Seconds of one run, for JSON: "median", "iqr" (interquartile range), and "times" of all."""
    return {"median": measurement.median, "iqr": measurement.iqr, "times": measurement.times}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch holds at one time during `run`, above those held at its start.

    On a CPU it is the sum of the allocations and releases that torch's profiler sees, without the
    memory that a library takes directly from the system.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's notes on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def environment(device: torch.device) -> dict:
    """The machine, the versions, and the loss kernel that "auto" stands for, for JSON."""
    machine = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_gb"] = properties.total_memory / 1e9
        machine["cuda"] = torch.version.cuda
    return {
        "machine": machine,
        "kernel": kernels.name_for(device),
        "packages": describe.versions(*MORE_PACKAGES),
        "code_version": describe.code_version(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_result(result: dict, output: Path | None) -> None:
    """Write JSON into the file `output`, or to stdout without one."""
    text = json.dumps(result, indent=1) + "\n"
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
