"""Training: a Detectron2 trainer, and `train`, which sets up one run and sees it through."""

import logging
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import TensorboardXWriter

from ghm_d2.data.loaders import build_train_loader, raise_on_bad_image
from ghm_d2.engine.describe import describe_run, peak_memory_mb
from ghm_d2.engine.divergence import diverged
from ghm_d2.engine.evaluate import Evaluation, evaluate
from ghm_d2.engine.hooks import (
    BestCheckpoint,
    DensityLog,
    MetricsWriter,
    ProgressHook,
    StopOnSignal,
)
from ghm_d2.engine.optimizer import build_optimizer, clips_full_model
from ghm_d2.engine.progress import Progress
from ghm_d2.engine.weights import GHMCheckpointer
from ghm_d2.errors import DivergedError
from ghm_d2.records import RunRecord
from ghm_d2.register import register_all

logger = logging.getLogger(__name__)


class GHMTrainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` that stops at the first step that is not finite.

    It also clips the gradient of the whole model where asked to, and trains in mixed precision
    under SOLVER.AMP.ENABLED.
    """

    def __init__(self, cfg, model, data_loader, optimizer):
        super().__init__(model, data_loader, optimizer)
        self._clip_norm = (
            cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE if clips_full_model(cfg) else float("inf")
        )
        self._device = torch.device(cfg.MODEL.DEVICE).type
        self._amp = cfg.SOLVER.AMP.ENABLED
        # loss scaling is for float16, which CUDA's autocast uses; a CPU's bfloat16 needs none
        self._scaler = torch.amp.GradScaler(
            self._device, enabled=self._amp and self._device == "cuda"
        )
        self.step_seconds: list[float] = []

    def run_step(self):
        """One iteration.

        Raises:
            DataError: an image of the batch cannot be read.
            DivergedError: a loss or the gradient is not finite; the weights are as before.
        """
        start = time.perf_counter()
        batch = raise_on_bad_image(next(self._data_loader_iter))
        data_seconds = time.perf_counter() - start
        try:
            with torch.autocast(self._device, enabled=self._amp):
                losses = self.model(batch)
        except FloatingPointError:  # how Detectron2's RPN says it
            raise diverged(self.model, batch, "the proposals are not finite", self.iter) from None
        total = sum(losses.values())
        if not torch.isfinite(total):
            bad = [
                f"{name} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite()
            ]
            raise diverged(self.model, batch, ", ".join(bad), self.iter)
        self.optimizer.zero_grad()
        self._scaler.scale(total).backward()
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        # under loss scaling an overflow is ordinary: the scaler skips the step
        if not torch.isfinite(norm) and not self._scaler.is_enabled():
            raise diverged(self.model, batch, f"the gradient's norm is {norm.item()}", self.iter)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._write_metrics(losses, data_seconds)
        self.storage.put_scalar("grad_norm", norm.item())
        self.step_seconds.append(time.perf_counter() - start)

    def state_dict(self):
        return super().state_dict() | {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._scaler.load_state_dict(state_dict.get("scaler", {}))


def train(
    cfg,
    dataset_label: str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> tuple[RunRecord, Evaluation]:
    """Train the detector that `cfg` describes, into OUTPUT_DIR.

    The folder then holds metrics.jsonl, density.jsonl, TensorBoard's events, checkpoints
    (`model_final.pth`, `model_best.pth` by AP) and run.json.

    Args:
        cfg: with data sets that are registered and a SEED of at least 0.
        dataset_label: what the record calls the data.
        resume: continue from the folder's last checkpoint.
        progress: is told of every iteration.
        on_evaluation: is called after each evaluation.

    Returns:
        the record, and the last evaluation.

    Raises:
        DataError, WeightsError, DivergedError: as their names say; the record on disk tells
            the last.
        KeyboardInterrupt: after SIGINT or SIGTERM, a checkpoint of the last step saved.
    """
    register_all()
    progress = progress or Progress()
    folder = Path(cfg.OUTPUT_DIR)
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    trainer = GHMTrainer(cfg, model, build_train_loader(cfg), optimizer)
    checkpointer = GHMCheckpointer(model, str(folder), optimizer=optimizer, trainer=trainer)
    best = BestCheckpoint(checkpointer)
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler), best])
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    resuming = resume and checkpointer.has_checkpoint()
    start_iter = trainer.iter + 1 if resuming else 0
    for line in checkpointer.report.warnings() if checkpointer.report else ():
        progress.message(line)

    record = describe_run(cfg, model, dataset_label)
    last: list[Evaluation] = []

    def run_evaluation():
        evaluation = evaluate(model, cfg, cfg.DATASETS.TEST[0], progress)
        last[:] = [evaluation]
        scalars = {f"bbox/{k}": v for k, v in evaluation.metrics.items() if v is not None}
        trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        best.after_eval()
        on_evaluation(evaluation)

    stop = StopOnSignal()
    period = max(1, min(20, cfg.SOLVER.MAX_ITER // 50))
    writers = [MetricsWriter(folder / "metrics.jsonl", start_iter), TensorboardXWriter(str(folder))]
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, run_evaluation),
            DensityLog(folder / "density.jsonl", model, period, start_iter),
            ProgressHook(progress, cfg.MODEL.DEVICE),
            hooks.PeriodicWriter(writers, period),
            stop,
        ]
    )
    record.status = "failed"
    try:
        trainer.train(start_iter, cfg.SOLVER.MAX_ITER)
        record.status = "finished"
    except KeyboardInterrupt:
        record.status = "interrupted"
        if stop.between_steps:
            checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            progress.message(f"saved {checkpointer.get_checkpoint_file()}; --resume continues")
        raise
    except DivergedError:
        record.status = "diverged"
        raise
    finally:
        record.iterations = trainer.iter
        record.peak_memory_mb = peak_memory_mb(cfg.MODEL.DEVICE)
        record.best = best.best
        if trainer.step_seconds:
            record.s_per_iter = statistics.median(trainer.step_seconds)
            record.train_seconds = sum(trainer.step_seconds)
        if last:
            record.metrics, record.per_class = last[0].metrics, last[0].per_class
            record.ms_per_image = last[0].ms_per_image
        record.write(folder)
    return record, last[0]


def choose_seed(cfg) -> None:
    """Replace a negative SEED, Detectron2's "any", by a drawn one, so that it is on record."""
    if cfg.SEED < 0:
        cfg.SEED = random.SystemRandom().randrange(2**31)
