"""`GHMTrainer`: runs the steps of a training, in one process or as one of several ranks."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.nn.parallel import DistributedDataParallel

from ghm_d2.data.loading.loaders import raise_on_bad_image, take_faults
from ghm_d2.errors import DataError, DivergedError
from ghm_d2.files import finite_or_none
from ghm_d2.training.distributed import parallel, sum_over_ranks
from ghm_d2.training.divergence import diverged, first_nonfinite_output
from ghm_d2.training.metrics.gradient_ratio import GRADIENT_RATIO, shared_features, squared_norms
from ghm_d2.training.metrics.profiling import part as profiled
from ghm_d2.training.metrics.writers import append_lines

_NORMS = 100  # how many of the last gradient norms a divergence report shows


class GHMTrainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` with checked, reproducible steps.

    - A step with a NaN or infinite loss or gradient changes nothing: it stops the training, or is
      skipped and counted, as SOLVER.ON_DIVERGENCE says.
    - The random numbers of a step depend only on SEED, the iteration and the rank, and its images
      come from `build_train_loader`, so that a resumed run repeats the uninterrupted one.
    - W ranks train as one process: gradients and logged losses are averaged over them, and all
      stop after the same step.
    - It trains in mixed precision under SOLVER.AMP, and splits a batch into SOLVER.ACCUMULATE
      parts. Each part has its own gradient density, and moving averages advance once per part.

    Attributes:
        detector: the model itself; `model` may be its DistributedDataParallel.
        done: number of complete steps.
        consistent: True if model, optimizer and schedule are those after `done` steps.
        stop_requested: True if this process was asked to end after the current step.
        stopping: True if any rank had been asked to end by the last step.
        seconds: time spent in steps, with loading, since the run began, also before a resume.
        step_seconds: duration of each step since the run began or was resumed.
        skipped: number of steps skipped because of a NaN or infinite loss or gradient.
        bad_images: file name -> why that image could not be read.
        divergence_file: file for reports of diverged steps; None for no reports.
        ratio_period: iterations between two logs of "grad_ratio_cls_box", the ratio of the
            gradients of classification and boxes at the features that both read; 0 for no logs.
    """

    def __init__(
        self,
        cfg,
        model,
        data_loader,
        optimizer,
        done: int = 0,
        tell: Callable[[str], None] = lambda text: None,
    ):
        """
        Args:
            model: the detector, or its DistributedDataParallel.
            done: number of steps done before a resume.
            tell: is called with messages for the user.
        """
        self.detector = model.module if isinstance(model, DistributedDataParallel) else model
        super().__init__(parallel(model, cfg.MODEL.DEVICE), data_loader, optimizer)
        self.done, self.consistent = done, True
        self.stop_requested = self.stopping = False
        self.seconds, self.step_seconds = 0.0, []
        self.skipped, self.bad_images = 0, {}
        self.divergence_file: Path | None = None
        self.ratio_period = 0
        self._cfg, self._tell = cfg, tell
        self._device = torch.device(cfg.MODEL.DEVICE).type
        self._dtype = _autocast_dtype(cfg.SOLVER.AMP, self._device)
        self._scaler = torch.amp.GradScaler(self._device, enabled=self._dtype == torch.float16)
        self._kept: list[torch.Tensor] = []  # the buffers before the step
        self._head_gradients: list[torch.Tensor] = []  # `squared_norms` of the step's parts
        self._in_step = False

    def run_step(self):
        """Run one iteration.

        Raises:
            DataError: too many images cannot be read.
            DivergedError: a loss or the gradient is NaN or infinite, and the step is not skipped;
                model and optimizer are as before it.
        """
        start = time.perf_counter()
        with profiled("data"):
            batch = raise_on_bad_image(next(self._data_loader_iter))
        faults = take_faults(batch)
        data_seconds = time.perf_counter() - start
        self._keep_buffers()
        seed_all_rng(_step_seed(self._cfg.SEED, self.iter, comm.get_rank()))
        try:
            losses, finite = self._share(self._backward(batch), faults)
        except (FloatingPointError, AssertionError) as error:
            self._leave_out(batch, {}, math.nan, self._why_stopped(batch, error))
            self.consistent = False
        else:
            self._update(batch, losses, finite, data_seconds)
        self.step_seconds.append(time.perf_counter() - start)
        self.seconds += self.step_seconds[-1]

    def _update(self, batch, losses: dict[str, float], finite: bool, data_seconds: float) -> None:
        """Update the weights, or leave the step out if its loss or gradient is NaN or infinite."""
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        # under loss scaling an overflow of the gradient is ordinary: the scaler skips the step and
        # halves the scale, until it is too small to be the reason (it is 1 without loss scaling)
        finite &= np.isfinite(norm) or self._scaler.get_scale() > 1
        if not finite:
            self._leave_out(batch, losses, norm)
        self.consistent = False
        if finite:
            with profiled("optimizer"):
                self._scaler.step(self.optimizer)
            self._log(losses, norm, data_seconds)
        self._scaler.update()

    def _backward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """Return the batch's losses, averaged over its parts, and set the parameters' gradients."""
        self.optimizer.zero_grad()
        self._head_gradients = []
        parts = _parts(batch, self._cfg.SOLVER.ACCUMULATE)
        total: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts, 1):
            alone = i < len(parts) and self.model is not self.detector
            with self.model.no_sync() if alone else nullcontext():
                losses = self._losses(part)
                with profiled("backward"):
                    self._scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach() / len(parts)
        return total

    def _losses(self, batch) -> dict[str, torch.Tensor]:
        half = torch.autocast(self._device, self._dtype, enabled=self._dtype is not None)
        with half, profiled("forward"):
            if not self.ratio_period or (self.iter + 1) % self.ratio_period:
                return self.model(batch)
            with shared_features(self.detector) as features:
                losses = self.model(batch)
        scaled = {name: self._scaler.scale(loss) for name, loss in losses.items()}
        norms = squared_norms(scaled, features)
        self._head_gradients += [] if norms is None else [norms]
        return losses

    def _why_stopped(self, batch, error: Exception) -> str:
        """Return what was NaN or infinite in the failed forward pass; raise `error` if nothing."""
        self.take_back()
        if isinstance(error, FloatingPointError):  # Detectron2's RPN
            return "proposals are NaN or infinite"
        if first_nonfinite_output(self.detector, batch) is None:
            raise error
        return "predicted boxes are NaN or infinite"  # GIoU, DIoU and CIoU assert

    def _share(self, losses: dict, faults: dict) -> tuple[dict[str, float], bool]:
        """Return the losses' means over the ranks, and whether all of them are finite.

        The same all-reduce tells the ranks about bad images and a request to stop.
        """
        exact = torch.float32 if self._device == "mps" else torch.float64  # MPS has no float64
        values = torch.stack([x.to(exact).reshape(()) for x in losses.values()])
        faults = {name: why for name, why in faults.items() if name not in self.bad_images}
        flags = [not values.isfinite().all(), len(faults), self.stop_requested]
        shared = torch.cat([values, values.new_tensor([float(x) for x in flags])])
        *means, bad, new, stop = sum_over_ranks(shared).tolist()
        if new:
            self._note_bad_images(faults)
        self.stopping = stop > 0
        world = comm.get_world_size()
        return {name: v / world for name, v in zip(losses, means, strict=True)}, not bad

    def _note_bad_images(self, faults: dict[str, str]) -> None:
        for name, why in sorted(x for of_rank in comm.all_gather(faults) for x in of_rank.items()):
            if name not in self.bad_images:
                self._tell(f"{why}; the image is left out of the training")
                self.bad_images[name] = why
        limit = self._cfg.DATALOADER.MAX_BAD_IMAGES
        if len(self.bad_images) > limit:
            self.take_back()
            raise DataError(
                f"{why}; {len(self.bad_images)} images could not be read, but "
                f"DATALOADER.MAX_BAD_IMAGES is {limit}; `ghm data check` lists all such images"
            )

    def _leave_out(
        self, batch: list[dict], losses: dict[str, float], norm: float, stopped: str = ""
    ) -> None:
        """Undo and report a step with a NaN or infinite loss or gradient; return if it is skipped.

        Args:
            stopped: why the forward pass gave no losses, or "". The other ranks do not know about
                such a failure, so a group cannot skip the step.

        Raises:
            DivergedError: the step is not skipped.
        """
        self.take_back()
        error = self._diverged(batch, losses, norm, stopped)
        solver = self._cfg.SOLVER
        skip = solver.ON_DIVERGENCE == "skip" and self.skipped < solver.MAX_SKIPPED_STEPS
        skip &= not stopped or comm.get_world_size() == 1
        if self.divergence_file:
            action = {"action": "skipped" if skip else "stopped"}
            append_lines(self.divergence_file, [self._divergence_row(error, losses, norm) | action])
        if not skip:
            raise error
        self.skipped += 1
        limit = solver.MAX_SKIPPED_STEPS
        self._tell(f"{error.what}: step skipped ({self.skipped} of at most {limit})")

    def _diverged(
        self, batch: list[dict], losses: dict[str, float], norm: float, stopped: str
    ) -> DivergedError:
        bad = [f"{name} is {value}" for name, value in losses.items() if not np.isfinite(value)]
        what = stopped or ", ".join(bad) or f"the gradient's norm is {norm}"
        alone = bool(stopped) or comm.get_world_size() == 1
        together = {} if alone else {"gather": comm.all_gather}
        return diverged(self.detector, batch, what, self.iter, **together)

    def _divergence_row(self, error: DivergedError, losses: dict[str, float], norm: float) -> dict:
        history = self.storage.histories().get("grad_norm")
        norms = [finite_or_none(v) for v, _ in history.values()[-_NORMS:]] if history else []
        return error.report | {
            "losses": {name: repr(value) for name, value in losses.items()},
            "grad_norm": repr(norm),
            "grad_norms_before": norms,
            "lr": [group["lr"] for group in self.optimizer.param_groups][-1],
        }

    def _log(self, losses: dict[str, float], norm: float, data_seconds: float) -> None:
        self.storage.put_scalars(total_loss=sum(losses.values()), grad_norm=norm)
        self.storage.put_scalar("data_time", data_seconds)
        if len(losses) > 1:
            self.storage.put_scalars(**losses)
        if self._head_gradients:
            cls, box = sum_over_ranks(torch.stack(self._head_gradients).sum(0)).tolist()
            if box > 0 and math.isfinite(ratio := math.sqrt(cls / box)):
                self.storage.put_scalar(GRADIENT_RATIO, ratio, smoothing_hint=False)

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        """Copy the buffers, moving averages among them, before the forward pass updates them."""
        buffers = list(self.detector.buffers())
        if self._kept:
            torch._foreach_copy_(self._kept, buffers)
        else:
            self._kept = [b.clone() for b in buffers]
        self._in_step = True

    @torch.no_grad()
    def take_back(self) -> None:
        """Restore the buffers after a step that did not reach the optimizer."""
        if self._in_step and self.consistent:
            torch._foreach_copy_(list(self.detector.buffers()), self._kept)

    def step_done(self) -> None:
        """Count the step; to be called after the learning rate schedule has advanced."""
        self.done, self.consistent, self._in_step = self.iter + 1, True, False

    def state_dict(self):
        own = {"seconds": self.seconds, "skipped": self.skipped, "bad_images": self.bad_images}
        return super().state_dict() | own | {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.seconds = state_dict.get("seconds", 0.0)
        self.skipped = state_dict.get("skipped", 0)
        self.bad_images = dict(state_dict.get("bad_images", {}))
        if state_dict.get("scaler") and self._scaler.is_enabled():
            self._scaler.load_state_dict(state_dict["scaler"])


def _step_seed(seed: int, iteration: int, rank: int) -> int:
    return int(np.random.SeedSequence([max(seed, 0), iteration, rank]).generate_state(1)[0])


def _parts(batch: list[dict], count: int) -> list[list[dict]]:
    size = len(batch) // count
    return [batch[i * size : (i + 1) * size] for i in range(count)]


def _autocast_dtype(amp, device: str) -> torch.dtype | None:
    """Return the dtype for autocast; None if SOLVER.AMP is off."""
    if not amp.ENABLED:
        return None
    return getattr(torch, amp.DTYPE or ("float16" if device == "cuda" else "bfloat16"))
