"""How long whole training steps take with each pair of losses.

The sides differ in their losses alone: the detectors start from the same seed, and take the same
few batches in turn. Each round makes one step of every side, in a new, seeded order. A step is
the trainer's own: forward, backward, clipping, optimizer; without evaluation or schedule.
"""

import itertools
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.utils.events import EventStorage

from ghm_d2.analysis.cost import loss_ms
from ghm_d2.bench.measure import environment, interleave, peak_bytes, timed
from ghm_d2.config import check_config, merge_overrides
from ghm_d2.data.loaders import build_train_loader, raise_on_bad_image
from ghm_d2.errors import UsageError
from ghm_d2.progress import Progress
from ghm_d2.training.train import set_up
from ghm_d2.training.trainer import GHMTrainer

CLS, REG = "MODEL.RETINANET.CLS_LOSS_TYPE", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE"
ARCH = "MODEL.META_ARCHITECTURE"
CE, DETECTRON2 = "CE + SL1", "Detectron2 focal + SL1"  # its own class
SIDES = {
    CE: (CLS, "ce", REG, "smooth_l1"),
    DETECTRON2: (ARCH, "RetinaNet", CLS, "focal", REG, "smooth_l1"),
    "focal + SL1": (CLS, "focal", REG, "smooth_l1"),
    "GHM-C + SL1": (CLS, "ghm_c", REG, "smooth_l1"),
    "GHM-C + GHM-R": (CLS, "ghm_c", REG, "ghm_r"),
}
WARM_UP, BATCHES = 3, 8  # fvcore's focal loss is compiled in its first runs


@dataclass
class Side:
    """A detector in training, and its one step."""

    cfg: object
    trainer: GHMTrainer

    def step(self) -> None:
        with self.trainer.storage as storage:
            self.trainer.run_step()
            storage.step()


def benchmark_steps(cfg, steps: int, progress: Progress | None = None) -> dict:
    """Time `steps` steps a side; the result is ready for JSON.

    Seconds are medians; `ratios` are those over the two sides in "references". "data" is what an
    ordinary training waits for its next batch with DATALOADER.NUM_WORKERS loaders: the share of
    all its steps' time. `loss_ms` is a batch's losses alone, forward and backward;
    `peak_memory_mb` (MiB) what one step takes above weights, optimizer and gradients, on CUDA
    alone.

    Args:
        cfg: of a RetinaNet, with data sets that are registered. A SEED below 0 becomes 0.

    Raises:
        UsageError: of another detector, or one that cannot be built.
        DataError, WeightsError, DivergedError: as training would.
    """
    progress = progress or Progress()
    if cfg.MODEL.META_ARCHITECTURE not in ("GHMRetinaNet", "RetinaNet"):
        raise UsageError(
            f"{ARCH} is {cfg.MODEL.META_ARCHITECTURE}; ghm bench step times the losses of a "
            "RetinaNet: name its configuration with --config"
        )
    device = torch.device(cfg.MODEL.DEVICE)
    configs = {name: _config(cfg, words) for name, words in SIDES.items()}
    batches = _batches(next(iter(configs.values())))
    sides = {}
    for name, own in progress.track(configs.items(), "building detectors", len(configs)):
        sides[name] = _build(own, batches)
    runs = {name: partial(timed, side.step, device) for name, side in sides.items()}
    interleave(runs, progress.track(range(WARM_UP), "warm-up steps", WARM_UP))
    times = interleave(runs, progress.track(range(steps), "steps of every side", steps))
    data = _waiting_for_data(configs[CE], steps, progress)
    return {
        "what": "steps",
        "setting": {"steps": steps, "batches": BATCHES, "seed": configs[CE].SEED},
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        **environment(device),
        "references": [CE, DETECTRON2],
        "sides": [_figures(name, sides[name], times, device) for name in SIDES],
        "data": data,
    }


def _config(cfg, words):
    own = cfg.clone()
    own.defrost()
    merge_overrides(own, [ARCH, "GHMRetinaNet", *words])
    own.SEED = max(0, cfg.SEED)
    check_config(own)
    return own


def _batches(cfg) -> list[list[dict]]:
    return [raise_on_bad_image(b) for b in itertools.islice(build_train_loader(cfg), BATCHES)]


def _build(cfg, batches: list[list[dict]]) -> Side:
    built, *_ = set_up(cfg, resume=False, progress=Progress())
    return Side(cfg, _trainer(cfg, built, itertools.cycle(batches)))


def _trainer(cfg, built: GHMTrainer, loader) -> GHMTrainer:
    trainer = GHMTrainer(cfg, built.model, loader, built.optimizer)
    trainer.iter, trainer.storage = 0, EventStorage(0)
    return trainer


def _figures(name: str, side: Side, times: dict[str, list[float]], device) -> dict:
    medians = {other: statistics.median(taken) for other, taken in times.items()}
    peak = peak_bytes(side.step, device) / 2**20 if device.type == "cuda" else None
    return {
        "name": name,
        "overrides": list(SIDES[name]),
        "seconds": medians[name],
        "runs": times[name],
        "ratios": {other: medians[name] / medians[other] for other in (CE, DETECTRON2)},
        "loss_ms": loss_ms(side.cfg, side.trainer.model),
        "peak_memory_mb": peak,
    }


def _waiting_for_data(cfg, steps: int, progress: Progress) -> dict:
    """What an ordinary training loop waits for its batches, its first ones left out."""
    trainer, *_ = set_up(cfg, resume=False, progress=Progress())
    total = WARM_UP + steps
    with EventStorage(0) as trainer.storage:
        for trainer.iter in progress.track(range(total), "steps with loading", total):
            trainer.run_step()
            trainer.storage.step()
        waited = [value for value, _ in trainer.storage.history("data_time").values()][WARM_UP:]
    return {
        "side": CE,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seconds": statistics.median(waited),
        "share": sum(waited) / sum(trainer.step_seconds[WARM_UP:]),
    }
