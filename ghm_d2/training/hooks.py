"""The trainer's hooks beside Detectron2's own: losses, evaluations, checkpoints and signals."""

import math
import signal
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ghm_d2.errors import DivergedError
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.progress import Progress
from ghm_d2.run_folder import BEST_WEIGHTS, CHECKPOINTS
from ghm_d2.training.distributed import same_for_all
from ghm_d2.training.divergence import REMEDY, is_finite
from ghm_d2.training.metrics.writers import SMOOTHING_WINDOW, WALL_CLOCK


class LossHistory(HookBase):
    """Keeps past losses in the checkpoint, so that a resumed run logs the same values.

    It keeps the last values of each loss, for the medians in metrics.jsonl, and the mean and
    variance of loss_cls in the second half of the training.
    """

    def __init__(self):
        self._recent: dict[str, list[list[float]]] = {}
        self._late = (0, 0.0, 0.0)  # count, mean, sum of squared deviations
        self._max_iter: int | None = None

    def before_train(self):
        storage = self.trainer.storage
        for name, values in self._recent.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value)
        storage.iter = self.trainer.start_iter
        if self._max_iter != self.trainer.max_iter:  # the second half has moved
            started_late = 2 * self.trainer.start_iter > self.trainer.max_iter
            self._late = (-1, 0.0, 0.0) if started_late else (0, 0.0, 0.0)
            self._max_iter = self.trainer.max_iter

    def after_step(self):
        trainer = self.trainer
        value, iteration = trainer.storage.latest().get("loss_cls", (0.0, -1))
        if iteration != trainer.iter or 2 * iteration < trainer.max_iter or self._late[0] < 0:
            return
        count, mean, squares = self._late  # Welford's algorithm, which keeps no list
        step = value - mean
        mean += step / (count + 1)
        self._late = (count + 1, mean, squares + step * (value - mean))

    @property
    def variation(self) -> float | None:
        """Standard deviation over mean of loss_cls in the second half of the training.

        None if part of that half was not seen, because MAX_ITER was changed late.
        """
        count, mean, squares = self._late
        return math.sqrt(squares / (count - 1)) / mean if count > 1 and mean > 0 else None

    def state_dict(self):
        storage, done = self.trainer.storage, self.trainer.done
        recent = {}
        for name, smooth in storage.smoothing_hints().items():
            if smooth and name not in WALL_CLOCK:
                # an interrupted step may have logged values of iteration `done`
                values = [list(x) for x in storage.history(name).values() if x[1] < done]
                recent[name] = values[-SMOOTHING_WINDOW:]
        return {"recent": recent, "late": list(self._late), "max_iter": self._max_iter}

    def load_state_dict(self, state_dict):
        self._recent, self._late = state_dict["recent"], tuple(state_dict["late"])
        self._max_iter = state_dict["max_iter"]


class WholeRunsEvalHook(hooks.EvalHook):
    """Detectron2's `EvalHook`, without an evaluation after a failure, in which ranks would hang."""

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class FiniteCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's `PeriodicCheckpointer`, which saves no NaN or infinite weights.

    The limit `max_to_keep` includes checkpoints from before a resume.
    """

    def before_train(self):
        super().before_train()
        if self.max_to_keep is not None:
            before = sorted(Path(self.checkpointer.save_dir).glob(CHECKPOINTS))
            self.recent_checkpoints = [str(file) for file in before]
            for file in before[: -self.max_to_keep]:
                self.recent_checkpoints.remove(str(file))
                if comm.is_main_process():
                    file.unlink()

    def after_step(self):
        """Save if a checkpoint is due; raise DivergedError if weights are NaN or infinite."""
        iteration = self.trainer.iter
        due = (iteration + 1) % self.period == 0 or iteration >= self.max_iter - 1
        if due and not is_finite(self.trainer.detector):
            what = f"iteration {iteration}: weights are NaN or infinite"
            raise DivergedError(
                f"{what}; they are not saved, and earlier checkpoints are finite; {REMEDY}", what
            )
        super().after_step()


class BestCheckpoint(HookBase):
    """Keeps the weights with the largest AP as model_best.pth.

    Unlike with Detectron2's hook, this file does not become the last checkpoint: a run is resumed
    where it stopped, not where it was best.

    Attributes:
        best: the best {"AP": ..., "iteration": ...} so far, or empty; saved in the checkpoint.
    """

    def __init__(self, checkpointer: GHMCheckpointer):
        self._checkpointer = checkpointer
        self.best: dict[str, float] = {}

    def update(self, ap: float | None, iteration: int) -> None:
        """Save the weights if `ap`, measured after `iteration` steps, is the highest so far."""
        better = ap is not None and ap > self.best.get("AP", -1.0)
        if better and is_finite(self._checkpointer.model):
            self.best = {"AP": ap, "iteration": iteration}
            self._checkpointer.save_weights(BEST_WEIGHTS.removesuffix(".pth"), iteration=iteration)

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state_dict):
        self.best = dict(state_dict["best"])


class EarlyStop(HookBase):
    """Raises `StoppedEarly` if AP has not risen in `patience` evaluations."""

    def __init__(self, patience: int, period: int, best: BestCheckpoint):
        """
        Args:
            patience: number of evaluations, above 0.
            period: iterations between two evaluations.
            best: the hook that knows the best AP; that of rank 0 decides.
        """
        self._wait, self._period, self._best = patience * period, period, best

    def before_train(self):
        self._check()

    def after_step(self):
        if self.trainer.done % self._period == 0 and self.trainer.done < self.trainer.max_iter:
            self._check()

    def _check(self) -> None:
        best = self._best.best
        due = bool(best) and self.trainer.done - best["iteration"] >= self._wait
        if same_for_all(due):
            raise StoppedEarly


class StoppedEarly(BaseException):
    """SOLVER.PATIENCE has ended a training, which is not an error.

    It is not an `Exception`, because Detectron2's loop would log it with a traceback.
    """


class StopOnSignal(HookBase):
    """Raises KeyboardInterrupt after the step in which SIGINT or SIGTERM arrives.

    A second signal ends the training at once. All ranks end after the same step.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._previous = {}
        self.requested = False

    def install(self) -> None:
        """Handle the signals until `restore`."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: the caller handles signals
                return

    def _request(self, _number, _frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._progress.message("stopping after this step; interrupt again to stop at once")

    def before_step(self):
        self.trainer.stop_requested = self.requested

    def after_step(self):
        alone = comm.get_world_size() == 1
        if self.requested if alone else self.trainer.stopping:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Install the previous handlers again."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
