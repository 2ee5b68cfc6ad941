"""The process group of a distributed training, as torchrun starts it, and its collectives."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ghm_d2.errors import EXIT_INTERRUPTED, PeerError, UsageError

_GRACE = 30  # seconds for saving a checkpoint, as torchrun allows
LOST = "another rank has ended, so this rank cannot continue"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join torchrun's process group within the context: NCCL with one GPU per rank, gloo on CPUs.

    Without torchrun this does nothing. If torchrun ends first, the process gets SIGTERM.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UsageError: another device, or fewer GPUs on this machine than ranks.
        PeerError: the other ranks cannot be reached, or one ended while this one waited for it.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    rank = int(os.environ["LOCAL_RANK"])
    if device not in ("cpu", "cuda"):
        raise UsageError(f"several processes need --device cpu or cuda, not {device}")
    if device == "cuda":
        if rank >= torch.cuda.device_count():
            raise UsageError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs, but this machine "
                f"has {torch.cuda.device_count()}; start fewer processes, or use --device cpu"
            )
        torch.cuda.set_device(rank)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with lost_peers():
        _join("nccl" if device == "cuda" else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: it may wait forever for lost ranks


def _join(backend: str) -> None:
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # after a restart torchrun may reuse the store, which has the ranks' old addresses; several
        # machines count restarts separately, so they have no common prefix
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(EXIT_INTERRUPTED)  # still waiting in the backend, where Python handles no signals


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turn a backend's error about a rank that has ended into `PeerError`."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if lost and dist.is_torchelastic_launched():
            raise PeerError(LOST) from None
        raise


def parallel(model: nn.Module, device: str) -> nn.Module:
    """Wrap `model` in DistributedDataParallel, unless it is wrapped or there is only one rank."""
    if comm.get_world_size() == 1 or isinstance(model, DistributedDataParallel):
        return model
    devices = [torch.cuda.current_device()] if device == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values`, of any shape, over all ranks in place, and return them."""
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def same_for_all(value):
    """Return rank 0's `value`, which is plain data, on every rank."""
    if comm.get_world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


@torch.no_grad()
def take_weights_of_first(model: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers."""
    if comm.get_world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def share_statistics(model: nn.Module) -> None:
    """Give all ranks rank 0's batch norm statistics; each rank gathers its own in training."""
    if comm.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            dist.broadcast(module.running_mean, 0)
            dist.broadcast(module.running_var, 0)
