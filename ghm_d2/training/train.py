"""`train`: one run from its cfg to its record, in one process or as one rank of a group."""

import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ghm_d2.config import config_text
from ghm_d2.data.loading.loaders import build_train_loader
from ghm_d2.data.registered import has_annotations, set_name
from ghm_d2.describe import describe_run, peak_memory_mb
from ghm_d2.errors import (
    DivergedError,
    OutputError,
    RunError,
    WeightsError,
)
from ghm_d2.files import write_text
from ghm_d2.inference.evaluation.evaluate import Evaluation, evaluate
from ghm_d2.inference.evaluation.expected import check_expected
from ghm_d2.inference.evaluation.results_file import keep_detections, submission_hint, write_results
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.modeling.weights.zoo_settings import other_settings
from ghm_d2.progress import Progress
from ghm_d2.records import DIVERGED, FAILED, FINISHED, INTERRUPTED, RunRecord, SetFigures
from ghm_d2.register import register_all
from ghm_d2.run_folder import (
    ANALYSIS_FILE,
    BEST_WEIGHTS,
    CHECKPOINTS,
    CONFIG_FILE,
    DENSITY_FILE,
    DETECTIONS_FILE,
    DIVERGENCE_FILE,
    FINAL_WEIGHTS,
    LAST_CHECKPOINT,
    METRICS_FILE,
    RUN_FILE,
    WORST_FILE,
)
from ghm_d2.training.averaging import AveragedWeights
from ghm_d2.training.distributed import lost_peers, share_statistics, take_weights_of_first
from ghm_d2.training.divergence import is_finite
from ghm_d2.training.hooks import (
    BestCheckpoint,
    EarlyStop,
    FiniteCheckpointer,
    LossHistory,
    StopOnSignal,
    StoppedEarly,
    WholeRunsEvalHook,
)
from ghm_d2.training.metrics.gradient_ratio import PERIOD
from ghm_d2.training.metrics.profiling import ProfileHook
from ghm_d2.training.metrics.second_half import gradient_ratio, weight_variation
from ghm_d2.training.metrics.trackers import trackers_of
from ghm_d2.training.metrics.writers import (
    DensityLog,
    EventsWriter,
    MetricsWriter,
    ProgressHook,
    WholeStepsWriter,
    drop_lines_from,
)
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.precise_bn import SeededPreciseBN
from ghm_d2.training.prepare import config_errors, speed_up
from ghm_d2.training.trainer import GHMTrainer


def train(
    cfg,
    dataset_label: str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    on_start: Callable[[], None] = lambda: None,
    profiled: bool = False,
) -> tuple[RunRecord, Evaluation]:
    """Train the detector that `cfg` describes, and write the run into OUTPUT_DIR.

    The folder then holds config.yaml, metrics.jsonl, density.jsonl, TensorBoard's events,
    checkpoints (`model_final.pth`, `model_best.pth` by AP), run.json and detections.json, and
    divergence.jsonl if a step diverged. In a group only rank 0 writes, and only its evaluation has
    figures.

    Args:
        cfg: from `prepare`.
        dataset_label: what the record calls the data.
        resume: continue from the folder's last checkpoint.
        progress: is told of every iteration.
        on_start: is called on rank 0 when everything is built and loaded, before anything is
            written.
        profiled: report where the time of a few steps goes; see `ProfileHook`.

    Returns:
        the record, and the last evaluation on the first data set of DATASETS.TEST.

    Raises:
        UsageError: a class or schedule that cannot be built from `cfg`.
        DataError, WeightsError, DivergedError, OutputError: as their names say; the record on
            disk notes a divergence.
        RunError: another rank, or a process that loads images, has ended; or, after all is
            written, the AP is not that of TEST.EXPECTED_RESULTS.
        KeyboardInterrupt: after SIGINT or SIGTERM.
        In each case the last complete step is saved first, if it can be.
    """
    progress = progress or Progress()
    stop = StopOnSignal(progress)
    run = _TrainingRun(cfg, dataset_label, resume, progress)
    if comm.is_main_process():
        on_start()
        run.forget_analysis()
        write_text(run.folder / CONFIG_FILE, config_text(cfg))
    stop.install()
    try:
        run.register_hooks(stop)
        if profiled and comm.is_main_process():
            run.trainer.register_hooks([ProfileHook(run.folder, cfg.MODEL.DEVICE, progress)])
        with lost_peers():
            try:
                run.trainer.train(run.trainer.done, cfg.SOLVER.MAX_ITER)
            except StoppedEarly:
                run.end_with_best()
    except BaseException as error:
        # Ctrl-C ends the loader's workers too, and the loader then raises an error
        interrupted = stop.requested and isinstance(error, RuntimeError | RunError)
        run.cut_short(KeyboardInterrupt() if interrupted else error)
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        stop.restore()
    run.record.status = FINISHED
    run.complete()
    if comm.is_main_process() and run.evaluation:
        if run.evaluation.metrics:  # otherwise `_evaluate` has written them
            keep_detections(run.folder, run.evaluation.detections)
        check_expected(cfg, run.evaluation)
    return run.record, run.evaluation


class _TrainingRun:
    """A run while it trains: trainer, checkpoints, evaluations and record."""

    def __init__(self, cfg, dataset_label: str, resume: bool, progress: Progress):
        self.cfg, self.progress = cfg, progress
        self.folder = Path(cfg.OUTPUT_DIR)
        self.trainer, self.checkpointer, held = set_up(cfg, resume, progress)
        self.history, self.best, *averaged = held
        # the model that is evaluated: the averaged one, if there is one
        self.evaluated = averaged[0].model if averaged else self.trainer.detector
        self.record = describe_run(cfg, self.trainer.detector, dataset_label)
        objects = self.trainer.data_loader.objects
        names = enumerate(cfg.DATASETS.CLASS_NAMES)
        self.record.train_objects = {name: objects.get(i, 0) for i, name in names}
        self.evaluation: Evaluation | None = None  # on the first data set
        self.figures: dict[str, SetFigures] = {}  # on the others
        self.ends_early = False
        if resume and (self.folder / RUN_FILE).is_file():
            before = RunRecord.read(self.folder)
            self.record.s_per_iter = before.s_per_iter
            if self._is_done():
                self.record.gflops, self.record.loss_ms = before.gflops, before.loss_ms
            # the best AP may come from an evaluation newer than the last checkpoint
            if before.best.get("iteration", 0) <= self.trainer.done:
                self.best.best = max(before.best, self.best.best, key=lambda x: x.get("AP", -1))

    def _is_done(self) -> bool:
        return self.trainer.done >= self.cfg.SOLVER.MAX_ITER

    def forget_analysis(self) -> None:
        """Delete analysis and detections, which are of earlier weights, unless the run is done."""
        if not self._is_done():
            for name in (ANALYSIS_FILE, WORST_FILE, DETECTIONS_FILE):
                (self.folder / name).unlink(missing_ok=True)

    def register_hooks(self, stop: StopOnSignal) -> None:
        """Register the hooks that write into the folder, and those around them.

        Their order matters: an evaluation comes before the rows that hold its AP, and the rows of
        an iteration come before its checkpoint.
        """
        cfg, trainer = self.cfg, self.trainer
        period = max(1, min(20, cfg.SOLVER.MAX_ITER // 50))
        # a multiple of the writers' period, so that a resumed run has the same rows
        trainer.ratio_period = period * max(1, round(PERIOD / period))
        patience, every = cfg.SOLVER.PATIENCE, cfg.TEST.EVAL_PERIOD
        early = [EarlyStop(patience, every, self.best)] if patience and every else []
        precise = cfg.TEST.PRECISE_BN.ENABLED
        precise_bn = [SeededPreciseBN(cfg, trainer.detector)] if precise else []
        writing = []
        if comm.is_main_process():
            trainer.divergence_file = self.folder / DIVERGENCE_FILE
            drop_lines_from(trainer.divergence_file, trainer.done)
            writers = [
                MetricsWriter(self.folder / METRICS_FILE, trainer.done),
                EventsWriter(self.folder, trainer.done),
                *trackers_of(cfg, trainer.done),
            ]
            log = self.folder / DENSITY_FILE
            writing = [
                DensityLog(log, trainer.detector, period, trainer.done),
                ProgressHook(self.progress, cfg.MODEL.DEVICE),
                WholeStepsWriter(writers, period),
            ]
        trainer.register_hooks(
            [
                *precise_bn,  # part of the step
                hooks.CallbackHook(after_step=lambda _: trainer.step_done()),
                hooks.IterationTimer(),
                WholeRunsEvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
                *writing,
                FiniteCheckpointer(
                    self.checkpointer,
                    cfg.SOLVER.CHECKPOINT_PERIOD,
                    max_to_keep=cfg.SOLVER.CHECKPOINTS_KEPT or None,
                ),
                *early,
                stop,
            ]
        )

    @cached_property
    def _is_annotated(self) -> dict[str, bool]:
        """Each data set of DATASETS.TEST -> whether it has annotations."""
        return {name: has_annotations(name) for name in self.cfg.DATASETS.TEST}

    def _evaluate(self) -> None:
        """Evaluate on each data set; on one without annotations only after the last step.

        The first data set, which has annotations if any has, decides which AP is the best. With
        several data sets, the figures of each are logged under its name, as in Detectron2, and
        those of the first also without a name.
        """
        trainer, last = self.trainer, self.cfg.SOLVER.MAX_ITER
        trainer.storage.iter = min(trainer.iter, last)
        share_statistics(self.evaluated)
        first, *others = self._is_annotated
        for name, annotated in self._is_annotated.items():
            if not annotated and trainer.done < last and not self.ends_early:
                continue
            found = evaluate(self.evaluated, self.cfg, name, self.progress)
            if others:
                self._log_figures(found, f"{set_name(name)}/")
            if name == first:
                self._log_figures(found)
                self.evaluation = found
                self.best.update(found.metrics.get("AP"), trainer.done)
            else:
                self.figures[name] = found.figures(name)
            if not annotated and comm.is_main_process():
                label = self.folder.resolve().name
                files = write_results(self.folder, name, label, found.detections)
                self.progress.message(submission_hint(name, files))

    def _log_figures(self, found: Evaluation, prefix: str = "") -> None:
        both = (("bbox", found.metrics), ("segm", found.mask_metrics))
        scalars = {f"{prefix}{what}/{k}": v for what, m in both for k, v in m.items()}
        there = {k: v for k, v in scalars.items() if v is not None}
        self.trainer.storage.put_scalars(**there, smoothing_hint=False)

    def end_with_best(self) -> None:
        """End early: the run's figures and model_final.pth are those of the best weights.

        The last step's checkpoint is kept for a resume with a larger SOLVER.PATIENCE.
        """
        trainer, best, self.ends_early = self.trainer, self.best.best, True
        self._save_last()
        if comm.is_main_process():
            final = GHMCheckpointer(self.evaluated, self.folder)
            final.load(str(self.folder / BEST_WEIGHTS))
            final.save_weights(FINAL_WEIGHTS.removesuffix(".pth"), iteration=best["iteration"])
            self.record.outcome = (
                f"ended after {trainer.done} of {self.cfg.SOLVER.MAX_ITER} iterations: no higher "
                f"AP in {self.cfg.SOLVER.PATIENCE} evaluations"
            )
            self.progress.message(f"{self.record.outcome}; {FINAL_WEIGHTS} has the best weights")
        take_weights_of_first(self.evaluated)
        self._evaluate()

    def cut_short(self, error: BaseException) -> None:
        """Save a checkpoint if possible, and say in the record how the run ended."""
        self.record.status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
        if isinstance(error, DivergedError):
            self.record.status, self.record.outcome = DIVERGED, f"diverged at {error.what}"
        if isinstance(error, OutputError):
            return
        with suppress(Exception):  # the error that ended the run is the one to report
            self._save_last()
            self.complete()

    def _save_last(self) -> None:
        trainer = self.trainer
        trainer.take_back()
        whole = trainer.consistent and trainer.done and is_finite(trainer.detector)
        if whole and comm.is_main_process():
            trainer.iter = trainer.done - 1
            self.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            saved = self.checkpointer.get_checkpoint_file()
            self.progress.message(f"saved {saved}; --resume continues from it")

    def complete(self) -> None:
        """Enter the measurements into the record, and write it."""
        record, trainer = self.record, self.trainer
        record.iterations = trainer.done
        record.world_size = comm.get_world_size()
        record.peak_memory_mb = peak_memory_mb(self.cfg.MODEL.DEVICE)
        record.best = self.best.best
        record.loss_variation = self.history.variation
        record.grad_ratio_cls_box = gradient_ratio(self.folder, self.cfg.SOLVER.MAX_ITER)
        record.weight_variation = weight_variation(self.folder, self.cfg.SOLVER.MAX_ITER)
        record.skipped_steps, record.bad_images = trainer.skipped, len(trainer.bad_images)
        record.train_seconds = trainer.seconds
        if trainer.step_seconds:
            record.s_per_iter = statistics.median(trainer.step_seconds)
        if self.evaluation:
            self.evaluation.write_into(record)
        if self.figures:
            record.evaluated_on = set_name(self.cfg.DATASETS.TEST[0])
            record.other_sets = [figures for figures in self.figures.values() if figures.metrics]
        if comm.is_main_process():
            record.write(self.folder)


def set_up(cfg, resume: bool, progress: Progress) -> tuple[GHMTrainer, GHMCheckpointer, tuple]:
    """Build and load the trainer, the checkpointer and the hooks that are part of a checkpoint.

    These hooks are `LossHistory`, `BestCheckpoint` and, with SOLVER.EMA_DECAY, `AveragedWeights`.
    Nothing is written. All ranks do the same.
    """
    register_all()
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if precision := cfg.get("FLOAT32_PRECISION"):  # not in Detectron2 0.6
        torch.set_float32_matmul_precision(precision)
    seed_all_rng(cfg.SEED)
    model, optimizer, scheduler = _build(cfg)
    checkpointer = GHMCheckpointer(model, cfg.OUTPUT_DIR)
    state = _load(checkpointer, cfg.MODEL.WEIGHTS, resume, progress)
    if not state and (line := other_settings(cfg)):
        progress.message(line)
    start_iter = state["iteration"] + 1 if state else 0
    with config_errors():
        loader = build_train_loader(cfg, start_iter)
    trainer = GHMTrainer(cfg, model, loader, optimizer, start_iter, progress.message)
    held = LossHistory(), BestCheckpoint(checkpointer)
    decay = cfg.SOLVER.EMA_DECAY
    averaged = [AveragedWeights(trainer.detector, decay)] if decay else []
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler), *held, *averaged])
    if state:
        trainer.load_state_dict(state)
        progress.message(f"resuming after {start_iter} iterations")
    checkpointer.add_checkpointable("trainer", trainer)
    if averaged:
        checkpointer.model = averaged[0].model  # what is saved as "model"
    return trainer, checkpointer, (*held, *averaged)


def _build(cfg):
    with config_errors():
        model = speed_up(build_model(cfg), cfg)
        optimizer = build_optimizer(cfg, model)
        return model, optimizer, build_lr_scheduler(cfg, optimizer)


def _load(checkpointer: GHMCheckpointer, weights: str, resume: bool, progress: Progress) -> dict:
    """Load the last checkpoint if the run is resumed and has one, else `weights`.

    Returns:
        the trainer's state in the checkpoint; empty if the run starts anew.
    """
    resuming = resume and checkpointer.has_checkpoint()
    loaded = checkpointer.resume_or_load(weights, resume=resume)
    report = checkpointer.report
    if resuming and (report.missing or report.mismatched):
        raise WeightsError(f"the run cannot be resumed: {report.warnings()[-1]}")
    for line in (*checkpointer.fallbacks, *(report.warnings() if report else ())):
        progress.message(line)
    if resuming and "trainer" not in loaded:
        raise WeightsError(
            f"{report.path} contains only weights, without the training state that --resume needs; "
            f"write the name of a checkpoint ({CHECKPOINTS}) into {LAST_CHECKPOINT}"
        )
    return loaded["trainer"] if resuming else {}
