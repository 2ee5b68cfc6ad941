"""Times a training step's single all-reduce against one all-reduce for each of its counts.

    torchrun --nproc-per-node 2 benchmarks/time_sync.py --device cpu

The counts are those of RetinaNet with GHM-C and GHM-R: five feature levels of 30 and of 10 unit
regions, and the number of foreground anchors. NCCL is used on GPUs, one per process, else gloo. A
single process would have nothing to add up, but the backend is timed all the same.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from measure import environment, figures, write_result
from torch.utils.benchmark import Measurement, Timer

from ghm_d2.losses.density import sync
from ghm_d2.losses.density.sync import Count, sum_up
from ghm_d2.training.distributed import process_group

SHAPES = ((), (5, 30), (5, 10))
ROUNDS = 20


def benchmark(device: str, calls: int) -> dict:
    """Seconds of one call, ready for JSON; all processes have to call it."""
    if dist.get_world_size() == 1:
        sync.world_size = lambda: 2
    torch.set_num_threads(1)
    values = [torch.ones(shape, dtype=torch.int64, device=device) for shape in SHAPES]
    runs = {
        "one all-reduce": lambda: sum_up(*map(Count, values)),
        f"{len(values)} all-reduces": lambda: [sum_up(Count(value)) for value in values],
    }
    timers = {name: Timer("run()", globals={"run": run}) for name, run in runs.items()}
    taken: dict[str, list[Measurement]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            dist.barrier()  # so that nobody waits for a process that is late
            taken[name].append(timer.timeit(calls))
    return {
        "what": "sync",
        "processes": dist.get_world_size(),
        "backend": dist.get_backend(),
        "bytes": sum(value.nbytes for value in values),
        **environment(torch.device(device)),
        "results": [
            {"name": name, **figures(next(iter(Measurement.merge(done))))}
            for name, done in taken.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=50, help=f"calls in each of {ROUNDS} rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: stdout")
    args = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error(
            "start this with torchrun: torchrun --nproc-per-node 2 benchmarks/time_sync.py"
        )
    with process_group(args.device):
        result = benchmark(args.device, args.calls)
        if dist.get_rank() == 0:
            for row in result["results"]:
                print(f"{row['name']}: {1000 * row['median']:.3f} ms", file=sys.stderr)
            write_result(result, args.output)


if __name__ == "__main__":
    main()
