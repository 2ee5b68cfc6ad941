"""GHM-C: classification losses weighed by gradient density (paper, equation 8)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ghm_d2 import kernels
from ghm_d2.kernels import reference
from ghm_d2.kernels.reference import upcast
from ghm_d2.losses.density import GradientDensity, exact_gradient_density
from ghm_d2.losses.reduce import check_range
from ghm_d2.losses.sync import Count, sum_up


class CountedLoss(Count):
    """A GHM loss whose samples are counted, and are to be weighed when `sum_up` is done with it.

    Several losses of a step can thus share one all-reduce.

    Args:
        values: int64 tensors by name; their shapes are the same in all processes.
        sync: as of `Count`.
        finish: from the number of processes and these tensors, added up, as keywords, to the loss
            of each level.
    """

    def __init__(
        self, values: Mapping[str, Tensor], sync: bool, finish: Callable[..., list[Tensor]]
    ):
        super().__init__(torch.cat([x.flatten() for x in values.values()]), sync)
        self._shapes = {name: x.shape for name, x in values.items()}
        self._finish = finish

    def losses(self) -> list[Tensor]:
        """The loss of each level, a scalar each. Updates the density: call it once."""
        parts = self.value.split([shape.numel() for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return self._finish(self.world, **{name: x.view(shape) for (name, shape), x in named})

    def total(self) -> Tensor:
        """The sum of `losses`."""
        first, *others = self.losses()
        return sum(others, first)


class HarmonizedLoss(nn.Module):
    """What GHM-C and GHM-R share: count samples by gradient norm, then weigh them.

    `levels` does both. `begin` only counts, for losses that share an all-reduce with others:

        cls, box = ghm_c.begin(logits, labels), ghm_r.begin(pred, target)
        sum_up(cls, box)
        loss = cls.total() + box.total()

    Args:
        loss_weight: factor on the loss, > 0.
        density: `GradientDensity`'s arguments; those that are out of range raise ValueError.
    """

    ROBUST: ClassVar[dict[str, Any]] = {
        "scope": "batch",
        "normalizer": "weights",
        "ema_init": "debias",
        "momentum": 0.9,
    }

    def __init__(self, *, loss_weight: float = 1.0, **density):
        super().__init__()
        check_range("loss_weight", loss_weight, 0)
        self.loss_weight = loss_weight
        self.density = GradientDensity(**density)

    @classmethod
    def robust(cls, **options):
        """The robust form, for batches of few samples: `options` over the arguments `ROBUST`."""
        return cls(**{**cls.ROBUST, **options})

    def levels(self, *tensors) -> list[Tensor]:
        """The losses of several feature levels, to be added up; arguments as in `begin`."""
        counted = self.begin(*tensors)
        sum_up(counted)
        return counted.losses()

    def begin(self, *tensors) -> CountedLoss:
        """Count the samples of several feature levels, of each loss's own arguments."""
        raise NotImplementedError

    def _begin(
        self, samples: str, levels: Sequence[Sequence[Tensor]], *params, **others: Tensor
    ) -> CountedLoss:
        """Arguments as of `kernels.counted`; `others` are more counts, for `_weights`."""
        density = self.density
        by_class = density.num_classes > 1
        if by_class and samples != "sigmoid":
            raise ValueError("a density for each class is of sigmoids; leave out num_classes")
        counts, weigh = kernels.counted(
            samples, levels, density.bins, *params, kernel=density.kernel, by_class=by_class
        )
        if by_class:
            counts = counts.view(len(levels), -1, density.bins)
        if density.prior and samples != "asl1":
            others["foreground"] = _count_foreground(samples, levels, by_class)

        def finish(world: int, **values: Tensor) -> list[Tensor]:
            return weigh(self._weights(world, **values).flatten(1))

        return CountedLoss({"counts": counts, **others}, density.sync, finish)

    def _weights(self, world: int, counts: Tensor, foreground: Tensor | None = None) -> Tensor:
        weights = self.density(counts, world, foreground)
        return weights if self.loss_weight == 1 else self.loss_weight * weights

    def extra_repr(self) -> str:
        return f"loss_weight={self.loss_weight}"


def _count_foreground(samples: str, levels: Sequence[Sequence[Tensor]], by_class: bool) -> Tensor:
    """The rows with a class that is not background, of (logits, labels) a level: 0-dim or (K,)."""
    classes = levels[0][0].shape[1] - (samples == "softmax")
    labels = torch.cat([y for _, y in levels])
    foreground = (labels >= 0) & (labels < classes)
    if not by_class:
        return foreground.sum()
    return reference.histogram(torch.where(foreground, labels, classes), classes)


class GHMC(HarmonizedLoss):
    """GHM-C over sigmoids: a sample is one (anchor, class) pair.

    With bins=1 and momentum=0 it is exactly the mean binary cross entropy.

    Args:
        bins, momentum: published as 30 and 0.75 for COCO.
        **options: `loss_weight` and `GradientDensity`'s options; its prior is of the rows with a
            class. With `num_classes=K` each class has its own density, and prior by its own rows.
    """

    ROBUST: ClassVar[dict[str, Any]] = {**HarmonizedLoss.ROBUST, "prior": 3.0}

    def __init__(self, bins: int = 30, momentum: float = 0.75, **options):
        super().__init__(bins=bins, momentum=momentum, **options)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of one set of anchors, a scalar.

        Args:
            logits: (N, K).
            labels: (N,) int64; 0..K-1 a class, K background, -1 ignored.
        """
        return self.levels([logits], [labels])[0]

    def begin(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> CountedLoss:
        """Count the samples of several feature levels; arguments as in `forward`, a level each."""
        return self._begin("sigmoid", list(zip(logits, labels, strict=True)))


class SoftmaxGHMC(HarmonizedLoss):
    """GHM-C over a softmax: a sample is one row, its gradient norm 1 - p_y.

    With bins=1 and momentum=0 it is exactly the mean cross entropy.

    Args:
        bins, momentum, **options: as of `GHMC`; its prior is of the rows with a class other than
            background, the last.
    """

    ROBUST: ClassVar[dict[str, Any]] = GHMC.ROBUST

    def __init__(self, bins: int = 30, momentum: float = 0.75, **options):
        super().__init__(bins=bins, momentum=momentum, **options)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar.

        Args:
            logits: (N, K + 1).
            labels: (N,) int64; 0..K, -1 ignored.
        """
        return self.levels([logits], [labels])[0]

    def begin(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> CountedLoss:
        """Count the samples of several feature levels; arguments as in `forward`, a level each."""
        return self._begin("softmax", list(zip(logits, labels, strict=True)))


def exact_ghm_c_loss(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """GHM-C with the exact density (paper, equation 8 with 5-7): the yardstick for `GHMC`.

    Unlike `GHMC`, it takes the valid samples out of the batch, which waits for the device.

    Args:
        logits: (N, K).
        labels: (N,) int64; 0..K-1 a class, K background, -1 ignored.
        epsilon: length of the region around each gradient norm; 1 / M compares with M bins.

    Returns:
        a scalar, 0 with a graph where no anchor is valid.

    Raises:
        ValueError: epsilon out of range.
    """
    loss, norm, valid = reference.sigmoid_samples(upcast(logits), labels)
    density = exact_gradient_density(norm[valid], epsilon)
    return (loss[valid] / density).sum()


class ExactGHMC(nn.Module):
    """`exact_ghm_c_loss` in `GHMC`'s place: neither unit regions nor a moving average.

    Of several processes each has the density of its own samples.

    Args:
        epsilon: length of the region around each gradient norm.
        loss_weight: factor on the loss, > 0.
        scope: "level": a density a feature level; "batch": one over all.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, epsilon: float, *, loss_weight: float = 1.0, scope: str = "level"):
        super().__init__()
        check_range("loss_weight", loss_weight, 0)
        if scope not in ("level", "batch"):
            raise ValueError(f"scope is one of level, batch, not {scope!r}")
        self.epsilon, self.loss_weight, self.scope = epsilon, loss_weight, scope

    def levels(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """The losses of several feature levels, to be added up; arguments as in `GHMC`."""
        if self.scope == "batch":
            logits, labels = [torch.cat(list(logits))], [torch.cat(list(labels))]
        return [
            self.loss_weight * exact_ghm_c_loss(x, y, self.epsilon)
            for x, y in zip(logits, labels, strict=True)
        ]

    def begin(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> CountedLoss:
        """As `GHMC.begin`, of a loss that has nothing to add up."""
        none = {"none": labels[0].new_empty(0)}
        return CountedLoss(none, False, lambda *_, **__: self.levels(logits, labels))
