"""`ghm train --auto-batch`: the largest batch that a GPU's memory holds."""

import gc
import math

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ghm_d2.errors import UsageError
from ghm_d2.progress import Progress
from ghm_d2.training.prepare import batch_changes
from ghm_d2.training.train import set_up

FILLED = 0.85  # share of the memory that a trial may take: other batches have more objects
FEWEST_ITERATIONS = 1000  # a schedule is not shortened below this
_STEPS = 3  # of a trial; the optimizer makes its state in the first


def fit_batch(cfg, progress: Progress) -> tuple[CfgNode, str]:
    """`cfg` with the largest batch that fits into the GPU's memory, and a line that says so.

    The batch is SOLVER.ACCUMULATE times a power of two. Each is tried by a few training steps at
    the largest size of INPUT.MIN_SIZE_TRAIN. The schedule keeps the number of images that it sees,
    but at least FEWEST_ITERATIONS. The learning rate is scaled with the batch (arXiv 1706.02677,
    section 2.1), that of ADAMW with its square root (arXiv 2205.10287).

    Args:
        cfg: from `prepare`; it is not changed.

    Raises:
        UsageError: no GPU, several processes, or not even the smallest batch fits.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UsageError(
            f"--auto-batch measures a GPU's memory, and the device is {cfg.MODEL.DEVICE}: set "
            "SOLVER.IMS_PER_BATCH instead"
        )
    if comm.get_world_size() > 1:
        raise UsageError(
            "--auto-batch is for one process: run it on one GPU, stop, and set "
            "SOLVER.IMS_PER_BATCH to what it found times the number of GPUs"
        )
    solver = cfg.SOLVER
    most = solver.IMS_PER_BATCH * solver.MAX_ITER / FEWEST_ITERATIONS
    best, share, size = 0, 0.0, solver.ACCUMULATE
    while size <= max(most, solver.ACCUMULATE):
        progress.message(f"trying a batch of {size}")
        if (taken := _share_of_memory(cfg, size)) > FILLED:
            break
        best, share, size = size, taken, 2 * size
    if not best:
        raise UsageError(
            f"a batch of {size} does not fit into the GPU's memory: lower INPUT.MIN_SIZE_TRAIN and "
            "INPUT.MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True"
        )
    scaled = _scaled(cfg, best)
    changes = batch_changes(solver, scaled.SOLVER)
    return scaled, f"a batch of {best} takes {share:.0%} of the GPU's memory: {changes}"


def _share_of_memory(cfg, batch: int) -> float:
    """The share of the GPU's memory that training on `batch` images takes; infinite if too much."""
    device = torch.device(cfg.MODEL.DEVICE)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _train_a_little(cfg, batch)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        gc.collect()
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return peak / torch.cuda.mem_get_info(device)[1]


def _train_a_little(cfg, batch: int) -> None:
    """Train as `train` does, in memory alone."""
    trial = cfg.clone()
    trial.defrost()
    trial.SOLVER.IMS_PER_BATCH = batch
    trial.DATALOADER.NUM_WORKERS = 0
    trial.INPUT.MIN_SIZE_TRAIN = (max(cfg.INPUT.MIN_SIZE_TRAIN),)
    trial.SOLVER.ON_DIVERGENCE = "skip"
    trainer, _, _ = set_up(trial, False, Progress())
    trainer.detector.train()
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(_STEPS):
            trainer.run_step()
            trainer.step_done()


def _scaled(cfg, batch: int) -> CfgNode:
    """`cfg` with that batch, its learning rate, schedule and periods scaled by Detectron2."""
    scaled = cfg.clone()
    scaled.defrost()
    scaled.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.IMS_PER_BATCH
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    solver = scaled.SOLVER
    solver.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if solver.OPTIMIZER == "ADAMW":
        solver.BASE_LR = cfg.SOLVER.BASE_LR * math.sqrt(batch / cfg.SOLVER.IMS_PER_BATCH)
    solver.CHECKPOINT_PERIOD = max(1, solver.CHECKPOINT_PERIOD)
    scaled.TEST.EVAL_PERIOD = max(min(1, cfg.TEST.EVAL_PERIOD), scaled.TEST.EVAL_PERIOD)
    return scaled
