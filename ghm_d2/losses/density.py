"""Gradient density: how many samples have a gradient norm like this one's.

`GradientDensity` is the paper's approximation by unit regions with an exponential moving
average (section 3.3); `exact_gradient_density` is the definition (section 3.2).
"""

import torch
from torch import Tensor

from ghm_d2 import kernels
from ghm_d2.losses.reduce import check_range
from ghm_d2.losses.state import CountState
from ghm_d2.losses.sync import Count, sum_up

SCOPES = ("level", "level_ema", "batch")
NORMALIZERS = ("valid_bins", "bins", "weights")
EMA_INITS = ("zero", "first", "debias")


class GradientDensity(CountState):
    """Turns the counts R_k of unit regions into the weight of a sample in each.

    With S_k = momentum * S_k + (1 - momentum) * R_k for the regions that hold a sample (the
    others keep S_k), a sample in region k weighs beta / N = 1 / (n * S_k), where n counts the
    regions that hold a sample. S is updated in training mode only.

    With a prior each region also counts c samples that are not there, and a sample weighs
    1 / (n * (S_k + c)). All regions' averages then move on, towards 0 in regions without a sample.
    c is `prior` times the moving average of the number of foreground samples, at least `prior`.

    The rows of the counts are feature levels, or the one row of a loss without levels. With
    several classes each has a density of its own, and the loss is the mean of theirs.

    Args:
        bins: number of unit regions M, at least 1.
        momentum: in [0, 1); 0 means S = R.
        scope: "level": rows update one average in turn; "level_ema": each has its own;
            "batch": the rows are one sample set.
        normalizer: "valid_bins" divides by n, "bins" by M; "weights" by the sum of the samples'
            1 / S_k, or 1 / (S_k + c), so that beta has mean 1.
        ema_init: "zero"; "first" starts a region at its first count; "debias" divides S by
            1 - momentum^t after t updates of the region. So too of the foreground samples.
        prior: 0, or above 0 with scope "batch".
        sync: add up the counts of all processes. The weights are then multiplied by their
            number, since DistributedDataParallel averages the gradients.
        num_levels: rows of the counts; needed for "level_ema" only.
        num_classes: 1: one density for all samples; above 1 with scope "batch".
        kernel: one of `kernels.KERNELS`, of this and of the loss that it belongs to.

    Raises:
        ValueError: an argument out of its range, naming both; a prior, or several classes, with
            another scope.
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
        num_levels: int = 1,
        num_classes: int = 1,
        kernel: str = "auto",
    ):
        super().__init__()
        check_range("bins", bins, 1, integer=True)
        check_range("momentum", momentum, 0, 1)
        check_range("num_levels", num_levels, 1, integer=True)
        check_range("num_classes", num_classes, 1, integer=True)
        for name, value, known in (
            ("scope", scope, SCOPES),
            ("normalizer", normalizer, NORMALIZERS),
            ("ema_init", ema_init, EMA_INITS),
            ("kernel", kernel, kernels.KERNELS),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if prior != 0:
            check_range("prior", prior, 0)
            if scope != "batch":
                raise ValueError(f"a prior above 0 needs scope batch, not {scope}")
        if num_classes > 1 and scope != "batch":
            raise ValueError(f"a density for each class needs scope batch, not {scope}")
        self.bins, self.momentum, self.num_classes = bins, momentum, num_classes
        self.scope, self.normalizer = scope, normalizer
        self.ema_init, self.prior = ema_init, prior
        self.sync, self.kernel = sync, kernel
        self.unused = () if prior else ("ema_foreground",)
        self.own = scope == "level_ema" or num_classes > 1  # each row has its own average
        rows = num_levels if scope == "level_ema" else num_classes
        self.register_buffer("ema", torch.zeros(rows, bins))
        self.register_buffer("num_updates", torch.zeros(rows, bins, dtype=torch.int64))
        # averages of the number of foreground samples, and of 1: what debiasing divides by
        several = (num_classes,) if num_classes > 1 else ()
        self.register_buffer("ema_foreground", torch.zeros(*several, 2))

    @torch.no_grad()
    def forward(
        self, counts: Tensor, world: int | None = None, foreground: Tensor | None = None
    ) -> Tensor:
        """Weights of a sample in each unit region.

        Args:
            counts: (L, bins) int64, samples by level and region; (L, C, bins) of several classes.
            world: number of processes whose samples these are, added up already; None: they are
                this process's, and are added up here where `sync` says so.
            foreground: int64, 0-dim, or (C,) of several classes: how many samples are foreground,
                for the prior; of as many processes as `counts`. None: all are.

        Returns:
            of the shape of `counts` and the dtype of `ema`; 0 where this batch has no sample.

        Raises:
            ValueError: counts or foreground of another shape; more levels than
                `num_levels`, where each has its own average.
        """
        shape = counts.shape
        inner = (self.bins,) if self.num_classes == 1 else (self.num_classes, self.bins)
        if shape[1:] != inner or counts.dim() < 2:
            raise ValueError(f"counts are (L, {', '.join(map(str, inner))}), not {tuple(shape)}")
        if self.scope == "level_ema" and len(counts) > len(self.ema):
            raise ValueError(f"num_levels is {len(self.ema)}, too few for {len(counts)} levels")
        if self.scope == "batch":
            counts = counts.sum(0, keepdim=True).view(-1, self.bins)
        if foreground is None:
            foreground = counts.sum(1) if self.num_classes > 1 else counts.sum()
        if foreground.shape != self.ema_foreground.shape[:-1]:
            wanted = tuple(self.ema_foreground.shape[:-1])
            raise ValueError(f"foreground is of shape {wanted}, not {tuple(foreground.shape)}")
        if world is None:
            count, of_foreground = Count(counts, self.sync), Count(foreground, self.sync)
            sum_up(count, of_foreground if self.prior else None)
            counts, world, foreground = count.value, count.world, of_foreground.value
        weights = kernels.update_density(
            counts,
            foreground.contiguous(),
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
        if weights is None:
            weights = self._weights(counts, world / self.num_classes, foreground)
        return weights.view(-1, *inner).expand(shape)

    @property
    def prior_count(self) -> Tensor:
        """c, the samples that the prior adds to each region: 0-dim, (C,) of several classes.

        It follows training; before any, and without a moving average, it is `prior`.
        """
        return self._prior_count(torch.zeros_like(self.ema_foreground[..., 0]))

    def _weights(self, counts: Tensor, factor: float, foreground: Tensor) -> Tensor:
        """What the kernels' `update_density` does, in plain PyTorch."""
        present, new = counts > 0, counts.to(self.ema.dtype)
        smooth = new
        if self.momentum > 0:
            rows = zip(present, new, strict=True)
            smooth = torch.stack([self._update(i, *row) for i, row in enumerate(rows)])
        if self.prior:
            c = self._prior_count(foreground.to(self.ema.dtype), self.training)
            smooth = smooth + c.view(-1, 1)
        if self.normalizer == "weights":
            n = torch.where(present, new / smooth, 0).sum(1, keepdim=True)
        elif self.normalizer == "bins":
            n = new.new_full((), self.bins)
        else:
            n = present.sum(1, keepdim=True).clamp(min=1)
        return torch.where(present, factor / (n * smooth), 0)

    def _update(self, level: int, present: Tensor, new: Tensor) -> Tensor:
        """S after this row's counts, (bins,); positive wherever the counts are."""
        row = level if self.own else 0
        old, updates = self.ema[row], self.num_updates[row]
        if self.training:
            average = self.momentum * old + (1 - self.momentum) * new
            if self.ema_init == "first":
                average = torch.where(updates == 0, new, average)
            moves = torch.ones_like(present) if self.prior else present
            old.copy_(torch.where(moves, average, old))
            updates += moves
            smooth = old.clone()  # the next level goes on with `old`
        else:  # a region first met in evaluation has no average yet
            smooth = torch.where(updates == 0, new, old)
        if self.ema_init == "debias":
            bias = 1 - self.momentum ** updates.clamp(min=1).to(old.dtype)
            smooth = torch.where(updates == 0, smooth, smooth / bias)
        return smooth

    def _prior_count(self, new: Tensor, training: bool = False) -> Tensor:
        """c by this batch's foreground samples `new`, and by those before them."""
        old, seen = self.ema_foreground, self.ema_foreground[..., 1]
        if self.momentum == 0:
            return self.prior * new.clamp(min=1)
        if training:
            now = torch.stack([new, torch.ones_like(new)], -1)
            average = self.momentum * old + (1 - self.momentum) * now
            if self.ema_init == "first":
                average = torch.where(seen[..., None] == 0, now, average)
            old.copy_(average)
        smooth = old[..., 0] / seen if self.ema_init == "debias" else old[..., 0]
        return self.prior * torch.where(seen == 0, new, smooth).clamp(min=1)

    def extra_repr(self) -> str:
        return (
            f"bins={self.bins}, momentum={self.momentum}, scope={self.scope!r}, "
            f"normalizer={self.normalizer!r}, ema_init={self.ema_init!r}, prior={self.prior}, "
            f"num_classes={self.num_classes}, sync={self.sync}"
        )


def exact_gradient_density(norm: Tensor, epsilon: float) -> Tensor:
    """GD(g) of each sample by the definition (paper, equations 5-7), in O(N log N).

    The number of samples with a gradient norm in [g - epsilon/2, g + epsilon/2), divided by
    the length of the part of that interval inside [0, 1].

    Args:
        norm: gradient norms in [0, 1], any shape.
        epsilon: length of the interval, in (0, 1].

    Returns:
        of the shape of `norm`, all positive.

    Raises:
        ValueError: epsilon out of range.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon lies in (0, 1], not {epsilon}")
    norm = norm.contiguous()  # searchsorted warns otherwise
    ordered = norm.flatten().sort().values
    low, high = norm - epsilon / 2, norm + epsilon / 2
    # side "left" on both: low <= x < high
    count = torch.searchsorted(ordered, high) - torch.searchsorted(ordered, low)
    return count.to(norm.dtype) / (high.clamp(max=1) - low.clamp(min=0))
