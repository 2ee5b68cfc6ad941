"""Training: a Detectron2 trainer, and `train`, which sets up one run and sees it through."""

import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import TensorboardXWriter

from ghm_d2.config import config_text
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
from ghm_d2.engine.load import CONFIG_FILE
from ghm_d2.engine.optimizer import build_optimizer, clips_full_model
from ghm_d2.engine.progress import Progress
from ghm_d2.engine.weights import GHMCheckpointer
from ghm_d2.errors import DataError, DivergedError, UsageError, WeightsError
from ghm_d2.records import RUN_FILE, RunRecord, write_text
from ghm_d2.register import register_all


class GHMTrainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` that stops at the first step that is not finite.

    It also clips the gradient of the whole model where asked to, and trains in mixed precision
    under SOLVER.AMP.ENABLED.

    Attributes:
        done: steps that are complete.
        consistent: whether model, optimizer and schedule are those after `done` steps.
        step_seconds: of each step, loading included.
    """

    def __init__(self, cfg, model, data_loader, optimizer, done: int = 0):
        super().__init__(model, data_loader, optimizer)
        self.done, self.consistent = done, True
        self.step_seconds: list[float] = []
        self._clip_norm = (
            cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE if clips_full_model(cfg) else float("inf")
        )
        self._device = torch.device(cfg.MODEL.DEVICE).type
        self._amp = cfg.SOLVER.AMP.ENABLED
        # loss scaling is for float16, which CUDA's autocast uses; a CPU's bfloat16 needs none
        self._scaler = torch.amp.GradScaler(
            self._device, enabled=self._amp and self._device == "cuda"
        )

    def run_step(self):
        """One iteration.

        Raises:
            DataError: an image of the batch cannot be read.
            DivergedError: a loss or the gradient is not finite; the weights are as before.
        """
        start = time.perf_counter()
        batch = raise_on_bad_image(next(self._data_loader_iter))
        data_seconds = time.perf_counter() - start
        self.consistent = False  # the forward pass updates moving averages
        losses = self._losses(batch)
        self.optimizer.zero_grad()
        self._scaler.scale(sum(losses.values())).backward()
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._check_finite(losses, norm, batch)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._write_metrics(losses, data_seconds)
        self.storage.put_scalar("grad_norm", norm.item())
        self.step_seconds.append(time.perf_counter() - start)

    def _losses(self, batch) -> dict[str, torch.Tensor]:
        try:
            with torch.autocast(self._device, enabled=self._amp):
                return self.model(batch)
        except FloatingPointError:  # how Detectron2's RPN says it
            raise diverged(self.model, batch, "the proposals are not finite", self.iter) from None

    def _check_finite(self, losses: dict[str, torch.Tensor], norm: torch.Tensor, batch) -> None:
        """After the backward pass, so that a GPU is waited for once an iteration."""
        bad = [f"{name} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite()]
        # under loss scaling an overflow of the gradient is ordinary: the scaler skips the step
        if not bad and not torch.isfinite(norm) and not self._scaler.is_enabled():
            bad = [f"the gradient's norm is {norm.item()}"]
        if bad:
            raise diverged(self.model, batch, ", ".join(bad), self.iter)

    def step_done(self) -> None:
        """To be called once the schedule has advanced."""
        self.done, self.consistent = self.iter + 1, True

    def state_dict(self):
        return super().state_dict() | {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if state_dict.get("scaler") and self._scaler.is_enabled():
            self._scaler.load_state_dict(state_dict["scaler"])


def train(
    cfg,
    dataset_label: str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> tuple[RunRecord, Evaluation]:
    """Train the detector that `cfg` describes, into OUTPUT_DIR.

    The folder then holds config.yaml, metrics.jsonl, density.jsonl, TensorBoard's events,
    checkpoints (`model_final.pth`, `model_best.pth` by AP) and run.json.

    Args:
        cfg: with data sets that are registered and a SEED of at least 0.
        dataset_label: what the record calls the data.
        resume: continue from the folder's last checkpoint.
        progress: is told of every iteration.
        on_start: is called when everything is built and loaded, before anything is written.

    Returns:
        the record, and the last evaluation.

    Raises:
        UsageError: a class or schedule that cannot be built from `cfg`.
        DataError, WeightsError, DivergedError: as their names say; the record on disk tells
            the last.
        KeyboardInterrupt: after SIGINT or SIGTERM, a checkpoint of the last step saved.
    """
    progress = progress or Progress()
    stop = StopOnSignal(progress)
    trainer, checkpointer = set_up(cfg, resume, progress)
    folder = Path(cfg.OUTPUT_DIR)
    record = describe_run(cfg, trainer.model, dataset_label)
    before = RunRecord.read(folder) if resume and (folder / RUN_FILE).is_file() else None
    on_start()
    write_text(folder / CONFIG_FILE, config_text(cfg))
    best = BestCheckpoint(checkpointer, before.best if before else {})
    evaluations: list[Evaluation] = []

    def run_evaluation():
        if trainer.done <= trainer.iter and trainer.done < cfg.SOLVER.MAX_ITER:
            return  # the last step failed
        evaluations[:] = [evaluate(trainer.model, cfg, cfg.DATASETS.TEST[0], progress)]
        metrics = evaluations[0].metrics
        both = (("bbox", metrics), ("segm", evaluations[0].mask_metrics))
        scalars = {f"{what}/{k}": v for what, m in both for k, v in m.items() if v is not None}
        trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        best.update(metrics["AP"], trainer.done)

    _register_hooks(trainer, cfg, checkpointer, run_evaluation, progress, stop)
    record.status = "failed"
    stop.install()
    try:
        _run(trainer, cfg.SOLVER.MAX_ITER, stop)
        record.status = "finished"
    except KeyboardInterrupt:
        record.status = "interrupted"
        if trainer.consistent and trainer.done:
            trainer.iter = trainer.done - 1
            checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            progress.message(f"saved {checkpointer.get_checkpoint_file()}; --resume continues")
        raise
    except DivergedError as error:
        record.status = "diverged"
        record.outcome = f"diverged at {error.what}"
        raise
    finally:
        stop.restore()
        _complete(record, before, trainer, best, evaluations, cfg.MODEL.DEVICE)
        record.write(folder)
    return record, evaluations[0]


def set_up(cfg, resume: bool, progress: Progress) -> tuple[GHMTrainer, GHMCheckpointer]:
    """Build and load everything; nothing is written."""
    register_all()
    seed_all_rng(cfg.SEED)
    with _as_usage_errors():
        model = build_model(cfg)
        if cfg.MODEL.DEVICE == "cpu":
            model.to(memory_format=torch.channels_last)  # a quarter less time a step
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = GHMCheckpointer(model, cfg.OUTPUT_DIR)
    resuming = resume and checkpointer.has_checkpoint()
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    report = checkpointer.report
    if resuming and (report.missing or report.mismatched):
        raise WeightsError(f"the run cannot be resumed: {report.warnings()[-1]}")
    for line in report.warnings() if report else ():
        progress.message(line)
    start_iter = loaded["trainer"]["iteration"] + 1 if resuming else 0
    with _as_usage_errors():
        loader = build_train_loader(cfg, start_iter)
    trainer = GHMTrainer(cfg, model, loader, optimizer, done=start_iter)
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler)])
    if resuming:
        trainer.load_state_dict(loaded["trainer"])
        progress.message(f"resuming after {start_iter} iterations")
    checkpointer.add_checkpointable("trainer", trainer)
    return trainer, checkpointer


def _register_hooks(trainer, cfg, checkpointer, run_evaluation, progress, stop) -> None:
    """After the scheduler's. The evaluation goes before what records its AP."""
    folder = Path(cfg.OUTPUT_DIR)
    period = max(1, min(20, cfg.SOLVER.MAX_ITER // 50))
    writers = [
        MetricsWriter(folder / "metrics.jsonl", trainer.done),
        TensorboardXWriter(str(folder)),
    ]
    log = DensityLog(folder / "density.jsonl", trainer.model, period, trainer.done)
    trainer.register_hooks(
        [
            hooks.CallbackHook(after_step=lambda _: trainer.step_done()),
            hooks.IterationTimer(),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, run_evaluation),
            hooks.PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            log,
            ProgressHook(progress, cfg.MODEL.DEVICE),
            hooks.PeriodicWriter(writers, period),
            stop,
        ]
    )


def _run(trainer: GHMTrainer, max_iter: int, stop: StopOnSignal) -> None:
    try:
        trainer.train(trainer.done, max_iter)
    except RuntimeError:
        if stop.requested:  # Ctrl-C reaches the loader's workers too, whose end is an error there
            raise KeyboardInterrupt from None
        raise


def _complete(record, before, trainer, best, evaluations, device) -> None:
    """Enter what was measured; the legs of a resumed run that left a record are added up."""
    record.iterations = trainer.done
    record.peak_memory_mb = peak_memory_mb(device)
    record.best = best.best
    record.loss_variation = loss_variation(trainer)
    if before:
        record.s_per_iter, record.train_seconds = before.s_per_iter, before.train_seconds
    if trainer.step_seconds:
        record.s_per_iter = statistics.median(trainer.step_seconds)
        record.train_seconds = (record.train_seconds or 0.0) + sum(trainer.step_seconds)
    if evaluations:
        last = evaluations[0]
        record.metrics, record.per_class = last.metrics, last.per_class
        record.mask_metrics = last.mask_metrics
        record.ms_per_image = last.ms_per_image


def loss_variation(trainer: GHMTrainer) -> float | None:
    """Standard deviation over mean of loss_cls in the second half of the training.

    None where this process has not seen all of it, as after a late resume.
    """
    if "loss_cls" not in trainer.storage.histories():
        return None
    history = trainer.storage.history("loss_cls").values()
    if 2 * history[0][1] > trainer.max_iter:
        return None
    late = [value for value, iteration in history if 2 * iteration >= trainer.max_iter]
    if len(late) < 2 or not statistics.fmean(late) > 0:
        return None
    return statistics.stdev(late) / statistics.fmean(late)


@contextmanager
def _as_usage_errors():
    """Detectron2's complaints about a configuration, as errors of the configuration."""
    try:
        yield
    except (KeyError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(
            f"the configuration cannot be built: {str(error).partition(chr(10))[0]}"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"no such file: {error.filename}") from None


def choose_seed(cfg) -> None:
    """Replace a negative SEED, Detectron2's "any", by a drawn one, so that it is on record."""
    if cfg.SEED < 0:
        cfg.SEED = random.SystemRandom().randrange(2**31)
