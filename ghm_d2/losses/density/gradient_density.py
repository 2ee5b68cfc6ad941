"""Gradient density by unit regions with a moving average (paper, section 3.3)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ghm_d2 import kernels
from ghm_d2.kernels import reference
from ghm_d2.losses.density.state import CountState
from ghm_d2.losses.density.sync import Count, sum_up
from ghm_d2.losses.reduce import check_choice, check_range

SCOPES = ("level", "level_ema", "batch")
NORMALIZERS = ("valid_bins", "bins", "weights")
EMA_INITS = ("zero", "first", "debias")
_recomputing = False


@contextmanager
def recomputing() -> Iterator[None]:
    """Make GHM losses reuse the weights of their last call, without an update of the averages.

    It is for activation checkpointing, which computes a loss twice. Compiled code cannot use it,
    because it keeps no weights.

        checkpoint(f, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()))
    """
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


def is_recomputing() -> bool:
    """Return whether the caller is within `recomputing`."""
    return _recomputing


class GradientDensity(CountState):
    """Computes the weight of a sample in each unit region from the counts R_k of the regions.

    Each region with a sample updates S_k = momentum * S_k + (1 - momentum) * R_k; the others keep
    S_k. A sample in region k has the weight beta / N = 1 / (n * S_k), where n is the number of
    regions with a sample. S is updated in training mode only.

    A prior adds c samples to each region, so the weight is 1 / (n * (S_k + c)). All regions then
    update their averages, which decay towards 0 in regions without a sample. c is `prior` times
    the moving average of the number of foreground samples, and at least `prior`.

    Each row of the counts is a feature level; a loss without levels has one row. With several
    classes, each class has its own density, and the loss is the mean over the classes.

    Args:
        bins: number of unit regions M, at least 1.
        momentum: in [0, 1); 0 means S = R.
        scope: "level": the rows update one average in turn; "level_ema": each row has its own
            average; "batch": all rows are counted together.
        normalizer: "valid_bins" divides by n, "bins" by M, and "weights" by the sum of 1 / S_k, or
            1 / (S_k + c), over the samples, so that beta has mean 1.
        ema_init: "zero" starts an average at 0, "first" at its first count; "debias" divides it by
            1 - momentum^t after t updates. It applies to S and to the foreground average.
        prior: 0 for none; above 0 it needs scope "batch".
        sync: add up the counts of all processes in training. The weights are then multiplied by
            the number of processes, since DistributedDataParallel averages the gradients. If
            False, each process has its own averages: give DistributedDataParallel
            broadcast_buffers=False, or it overwrites them with those of the first process.
        process_group: the processes whose counts are added up; None: all processes.
        num_levels: number of rows of the counts; needed for "level_ema" only.
        num_classes: 1 for one density; above 1 for one per class, which needs scope "batch".
        kernel: one of `kernels.KERNELS`, for this module and the loss that it belongs to.

    Attributes:
        last_counts, last_weights: (rows, bins), one row per level or class, over all processes,
            from the last call that was not compiled; for logging.

    Raises:
        ValueError: an argument is out of range (the message names both); a prior or several
            classes with another scope than "batch".
    """

    ema: Tensor
    num_updates: Tensor
    ema_foreground: Tensor

    def __init__(
        self,
        bins: int,
        momentum: float = 0.0,
        *,
        scope: str = "level",
        normalizer: str = "valid_bins",
        ema_init: str = "zero",
        prior: float = 0.0,
        sync: bool = True,
        process_group=None,
        num_levels: int = 1,
        num_classes: int = 1,
        kernel: str = "auto",
    ):
        super().__init__()
        check_range("bins", bins, 1, integer=True)
        check_range("momentum", momentum, 0, 1)
        check_range("num_levels", num_levels, 1, integer=True)
        check_range("num_classes", num_classes, 1, integer=True)
        check_choice("scope", scope, SCOPES)
        check_choice("normalizer", normalizer, NORMALIZERS)
        check_choice("ema_init", ema_init, EMA_INITS)
        check_choice("kernel", kernel, kernels.KERNELS)
        if prior != 0:
            check_range("prior", prior, 0)
            if scope != "batch":
                raise ValueError(f"a prior above 0 needs scope batch, not {scope}")
        if num_classes > 1 and scope != "batch":
            raise ValueError(f"num_classes above 1 needs scope batch, not {scope}")
        self.bins, self.momentum, self.num_classes = int(bins), float(momentum), int(num_classes)
        self.scope, self.normalizer = scope, normalizer
        self.ema_init, self.prior = ema_init, float(prior)
        self.sync, self.process_group, self.kernel = sync, process_group, kernel
        self.unused = () if prior else ("ema_foreground",)
        self.own = scope == "level_ema" or num_classes > 1  # each row has its own average
        rows = num_levels if scope == "level_ema" else num_classes
        self.add_counts("ema", rows, bins)
        self.add_counts("num_updates", rows, bins, dtype=torch.int64)
        # averages of the number of foreground samples and of 1; debiasing divides by the second
        self.add_counts("ema_foreground", *([num_classes] if num_classes > 1 else []), 2)
        self.last_counts: Tensor | None = None
        self.last_weights: Tensor | None = None

    @torch.no_grad()
    def forward(
        self, counts: Tensor, world: int | None = None, foreground: Tensor | None = None
    ) -> Tensor:
        """Return the weight of a sample in each unit region.

        Args:
            counts: (L, bins) int64, samples by level and region; (L, C, bins) with C > 1 classes.
            world: number of processes over which the counts are already added up; None: the counts
                are those of this process, and `sync` decides whether they are added up here.
            foreground: int64, 0-dim, or (C,) with C > 1 classes: number of foreground samples, for
                the prior, over the same processes as `counts`. None: all are foreground.

        Returns:
            float64 weights in the shape of `counts`; 0 where this batch has no sample.

        Raises:
            ValueError: wrong shape of the counts or of foreground; more levels than
                `num_levels` with scope "level_ema".
        """
        shape, inner = counts.shape, counts.shape[1:]
        counts = self._rows(counts.long())
        foreground = self._foreground(counts, foreground)
        if _recomputing:
            if self.last_weights is None or torch.compiler.is_compiling():
                raise RuntimeError("recomputing() needs an earlier call without torch.compile")
            return self.last_weights.view(-1, *inner).expand(shape)
        if world is None:
            sync, values = self.sync and self.training, (counts, foreground)
            count = Count(*values[: 1 + bool(self.prior)], sync=sync, group=self.process_group)
            sum_up(count)
            (counts, *rest), world = count.values, count.world
            foreground = rest[0] if rest else foreground
        weights = kernels.update_density(
            counts,
            foreground,
            self.ema,
            self.num_updates,
            self.ema_foreground,
            momentum=self.momentum,
            prior=self.prior,
            own=self.own,
            normalizer=self.normalizer,
            ema_init=self.ema_init,
            training=self.training,
            factor=world / self.num_classes,
            kernel=self.kernel,
        )
        if not torch.compiler.is_compiling():
            self.last_counts, self.last_weights = counts, weights
        return weights if weights.shape == shape else weights.view(-1, *inner).expand(shape)

    def _rows(self, counts: Tensor) -> Tensor:
        """Return the counts (rows, bins) that update the averages; ValueError for a wrong shape."""
        inner = (self.bins,) if self.num_classes == 1 else (self.num_classes, self.bins)
        if counts.shape[1:] != inner or counts.dim() < 2:
            wanted = ", ".join(map(str, inner))
            raise ValueError(f"counts must be (L, {wanted}), not {tuple(counts.shape)}")
        if self.scope == "level_ema" and len(counts) > len(self.ema):
            raise ValueError(
                f"num_levels is {len(self.ema)}, but the input has {len(counts)} levels"
            )
        if self.scope != "batch":
            return counts
        summed = counts.sum(0, keepdim=True) if len(counts) > 1 else counts
        return summed.view(-1, self.bins)

    def _foreground(self, counts: Tensor, foreground: Tensor | None) -> Tensor:
        """Return the foreground samples of each row; ValueError for a wrong shape."""
        if not self.prior:
            return counts  # not read without a prior
        if foreground is None:
            return counts.sum(1) if self.num_classes > 1 else counts.sum()
        wanted = self.ema_foreground.shape[:-1]
        if foreground.shape != wanted:
            raise ValueError(
                f"foreground must have the shape {tuple(wanted)}, not {tuple(foreground.shape)}"
            )
        return foreground

    @property
    def prior_count(self) -> Tensor:
        """c, the samples that the prior adds to each region: 0-dim, or (C,) with C > 1 classes.

        It changes during training. Before training, and without a moving average, it is `prior`.
        """
        none = torch.zeros_like(self.ema_foreground[..., 0])
        options = self.momentum, self.prior, self.ema_init, False
        return reference.prior_count(none, self.ema_foreground, *options).to(none.dtype)

    def extra_repr(self) -> str:
        return (
            f"bins={self.bins}, momentum={self.momentum}, scope={self.scope!r}, "
            f"normalizer={self.normalizer!r}, ema_init={self.ema_init!r}, prior={self.prior}, "
            f"num_classes={self.num_classes}, sync={self.sync}"
        )
