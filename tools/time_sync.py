"""Times the one all-reduce of a training step against one for each of its counts.

    python -m torch.distributed.run --nproc-per-node 2 tools/time_sync.py

What is added up is RetinaNet's with GHM-C and GHM-R, five feature levels of 30 and of 10 unit
regions, and the number of foreground anchors. NCCL where each process has a GPU, else gloo.
"""

import os
import statistics
import time

import torch
import torch.distributed as dist

from ghm_d2.losses.sync import Count, sum_up

SHAPES = ((), (5, 30), (5, 10))
STEPS, WARM_UP = 1000, 100


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    values = [torch.ones(shape, dtype=torch.int64, device=device) for shape in SHAPES]
    size = sum(v.numel() * v.element_size() for v in values)
    together = [_seconds(lambda: sum_up(*map(Count, values)), on_gpu) for _ in range(STEPS)]
    apart = [_seconds(lambda: [sum_up(Count(v)) for v in values], on_gpu) for _ in range(STEPS)]
    if rank == 0:
        print(f"{dist.get_world_size()} processes, {dist.get_backend()}, {size} bytes a step")
        _show("one all-reduce", together[WARM_UP:])
        _show(f"{len(values)} all-reduces", apart[WARM_UP:])
    dist.destroy_process_group()


def _seconds(action, on_gpu: bool) -> float:
    dist.barrier()  # so that nobody waits for a process that is late
    start = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _show(name: str, seconds: list[float]) -> None:
    median, high = statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1]
    print(f"{name}: median {1000 * median:.3f} ms, p90 {1000 * high:.3f} ms")


if __name__ == "__main__":
    main()
