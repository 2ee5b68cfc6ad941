"""What benchmarks share: interleaved timing, peak memory, and on what machine it was."""

import os
import platform
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ghm_d2 import describe, kernels

MORE_PACKAGES = ("mmdet", "triton")  # beside those of a run's record


def interleave(
    runs: dict[str, Callable[[], float]],
    rounds: Iterable[int],
    seconds: float = float("inf"),
    fewest: int = 1,
    seed: int = 0,
) -> dict[str, list[float]]:
    """What each run gives; in every round each takes its turn once: B A C, C A B, ...

    The order is shuffled anew every round, so that nothing always follows the same other one,
    and a change of the machine's speed meets all alike.

    Args:
        runs: each gives the seconds it took.
        seconds: a run sits out the rounds that are left once it has taken so long ...
        fewest: ... and has run so often.
        seed: of the order.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(seed)
    for _ in rounds:
        names = [n for n, t in taken.items() if len(t) < fewest or sum(t) < seconds]
        order.shuffle(names)
        for name in names:
            taken[name].append(runs[name]())
    return taken


def timed(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that `repeats` runs in a row take, until the device is done with them."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch has handed out at one time during `run`, above the start's.

    On a CPU summed over every allocation and release that torch's profiler tells: exact for what
    the calling thread has from torch. What a library takes from the system on its own, or another
    thread of ours from torch, is not among them.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes on stderr
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


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had, on the device; on a CPU within the container's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():  # macOS tells only what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (line,) = (x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable:"))
    free = int(line.split()[1]) * 2**10
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()))
    return free


def environment(device: torch.device) -> dict:
    """ "machine", "kernel" (that "auto" takes), "packages" and "code_version" of the JSON."""
    machine = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "platform": platform.platform(),
        "gpu": None,
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
