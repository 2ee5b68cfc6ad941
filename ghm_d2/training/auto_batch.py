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

FILLED = 0.85  # largest share of the free memory in a trial; later batches may have more objects
FEWEST_ITERATIONS = 1000  # a schedule is not shortened below this
_STEPS = 3  # steps per trial; the optimizer allocates its state in the first


def fit_batch(cfg, progress: Progress) -> tuple[CfgNode, str]:
    """Return `cfg` with the largest batch that fits into the GPU's memory, and a line that says so.

    The configured batch is doubled as long as it fits, or halved until it does. Each batch is tried
    with a few training steps at the largest size of INPUT.MIN_SIZE_TRAIN. The number of images in
    the schedule stays the same, and the batch is not raised so far that fewer than
    FEWEST_ITERATIONS are left. The learning rate is scaled with the batch size (arXiv 1706.02677,
    section 2.1), or with its square root for ADAMW (arXiv 2205.10287).

    Args:
        cfg: from `prepare`; it is not changed.

    Raises:
        UsageError: no GPU, several processes, or not even the smallest batch fits.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UsageError(
            f"--auto-batch measures GPU memory, but the device is {cfg.MODEL.DEVICE}; set "
            "SOLVER.IMS_PER_BATCH instead"
        )
    if comm.get_world_size() > 1:
        raise UsageError(
            "--auto-batch works only with one process: run it on one GPU, stop the run, and set "
            "SOLVER.IMS_PER_BATCH to the batch size that it found times the number of GPUs"
        )
    torch.cuda.init()
    solver = cfg.SOLVER
    batch, share = _largest(cfg, progress)
    if not batch:
        raise UsageError(
            f"even the smallest batch of {solver.ACCUMULATE} does not fit into the GPU's memory; "
            "lower INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True"
        )
    scaled = _scaled(cfg, batch)
    line = f"a batch of {batch} takes {share:.0%} of the GPU's memory"
    if batch != solver.IMS_PER_BATCH:
        line += f": {batch_changes(solver, scaled.SOLVER)}"
    if batch >= solver.IMS_PER_BATCH and _too_few_iterations(cfg, 2 * batch):
        line += f"; a larger batch would leave fewer than {FEWEST_ITERATIONS:,} iterations"
    return scaled, line


def _largest(cfg, progress: Progress) -> tuple[int, float]:
    """Return the largest batch that fits (0 if none does) and its share of the memory."""

    def tried(batch: int) -> float:
        progress.message(f"trying a batch of {batch}")
        return _share_of_memory(cfg, batch)

    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    while batch and (share := tried(batch)) > FILLED:
        batch = batch // 2 // parts * parts
    if batch < cfg.SOLVER.IMS_PER_BATCH:
        return batch, share
    while not _too_few_iterations(cfg, 2 * batch) and (more := tried(2 * batch)) <= FILLED:
        batch, share = 2 * batch, more
    return batch, share


def _too_few_iterations(cfg, batch: int) -> bool:
    return FEWEST_ITERATIONS * batch > cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH


def _share_of_memory(cfg, batch: int) -> float:
    """Return the share of the GPU's free memory that training on `batch` images takes.

    The share is infinite if the GPU runs out of memory.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    torch.cuda.reset_peak_memory_stats(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        _train_a_little(cfg, batch)
        return torch.cuda.max_memory_reserved(device) / available
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _train_a_little(cfg, batch: int) -> None:
    """Run a few training steps as `train` does, without writing files."""
    trial = cfg.clone()
    trial.defrost()
    trial.SOLVER.IMS_PER_BATCH = batch
    trial.DATALOADER.NUM_WORKERS = 0
    trial.INPUT.MIN_SIZE_TRAIN = (max(cfg.INPUT.MIN_SIZE_TRAIN),) * 2  # "range" needs two sizes
    trial.SOLVER.ON_DIVERGENCE = "skip"
    trainer, _, _ = set_up(trial, False, Progress())
    trainer.detector.train()
    trainer.ratio_period = 1  # steps that measure the gradient ratio take the most memory
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(_STEPS):
            trainer.run_step()
            trainer.step_done()


def _scaled(cfg, batch: int) -> CfgNode:
    """Return `cfg` for this batch size; Detectron2 scales learning rate, schedule and periods."""
    scaled = cfg.clone()
    scaled.defrost()
    scaled.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.IMS_PER_BATCH
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    solver = scaled.SOLVER
    solver.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if solver.OPTIMIZER == "ADAMW":
        solver.BASE_LR = cfg.SOLVER.BASE_LR * math.sqrt(batch / cfg.SOLVER.IMS_PER_BATCH)
    # rounding may give a period of 0: an error for checkpoints, and no evaluations at all
    solver.CHECKPOINT_PERIOD = max(1, solver.CHECKPOINT_PERIOD)
    scaled.TEST.EVAL_PERIOD = max(min(1, cfg.TEST.EVAL_PERIOD), scaled.TEST.EVAL_PERIOD)
    return scaled
