"""The base of GHM-C and GHM-R: count samples, add up over processes, weigh the losses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ghm_d2 import kernels
from ghm_d2.losses.density.gradient_density import GradientDensity, is_recomputing
from ghm_d2.losses.density.sync import Count, sum_up
from ghm_d2.losses.reduce import REDUCTIONS, check_choice, check_range


class CountedLoss(Count):
    """A GHM loss with counted samples, which are weighed after `sum_up` has added up the counts.

    Several losses of a step can thus share one all-reduce.

    Args:
        counted: the counted samples.
        weigh: maps the number of processes and, as keywords, the summed `values` to the weights.
        values: int64 tensors by name; their shapes are the same in all processes.
        sync, group: as in `Count`.
    """

    def __init__(
        self,
        counted: kernels.Counted,
        weigh: Callable[..., Tensor],
        values: Mapping[str, Tensor],
        sync: bool,
        group=None,
    ):
        super().__init__(*values.values(), sync=sync, group=group)
        self._counted, self._names = counted, tuple(values)
        self._weigh: Callable[..., Tensor] | None = weigh

    def losses(self) -> list[Tensor]:
        """Return the loss of each level, a scalar, with the weights that `weights` returns."""
        return self._counted.sums(self.weights())

    def total(self) -> Tensor:
        """Return the sum of `losses`; faster than adding them up."""
        return self._counted.total(self.weights())

    def weights(self) -> Tensor:
        """Return the weight beta / N of a sample in each unit region, and update the averages.

        Raises:
            RuntimeError: a second call, which would update the averages twice.
        """
        if self._weigh is None:
            raise RuntimeError("this loss was already computed; call begin() again in each step")
        weigh, self._weigh = self._weigh, None
        return weigh(self.world, **dict(zip(self._names, self.values, strict=True)))


class HarmonizedLoss(nn.Module):
    """The base of GHM-C and GHM-R: count samples by gradient norm, then weigh them.

    `levels` does both. `begin` only counts, for losses that share an all-reduce with others:

        cls, box = ghm_c.begin(logits, labels), ghm_r.begin(pred, target)
        sum_up(cls, box)
        loss = cls.total() + box.total()

    Both ways give the mean over the samples, whatever `reduction` is.

    Args:
        loss_weight: factor on the loss, > 0.
        reduction: "mean" over the samples, the paper's L; "sum"; or "none", the loss
            beta_i l_i of each sample, which is 0 for an ignored one.
        density: arguments of `GradientDensity`, which raises ValueError if one is out of range.
    """

    ROBUST: ClassVar[dict[str, Any]] = {
        "scope": "batch",
        "normalizer": "weights",
        "ema_init": "debias",
        "momentum": 0.9,
    }

    def __init__(self, *, loss_weight: float = 1.0, reduction: str = "mean", **density):
        super().__init__()
        check_range("loss_weight", loss_weight, 0)
        check_choice("reduction", reduction, REDUCTIONS)
        self.loss_weight, self.reduction = float(loss_weight), reduction
        self._share: Tensor | float = 0.0  # the last call's samples divided by its processes
        self.density = GradientDensity(**density)

    @classmethod
    def robust(cls, **options):
        """Return the loss in its robust form, which limits the weight of rare samples.

        Args:
            **options: arguments of the class; they override those of the robust form, `ROBUST`.
        """
        return cls(**{**cls.ROBUST, **options})

    def levels(self, *tensors) -> list[Tensor]:
        """Return the losses of several feature levels, to be added up; arguments as in `begin`."""
        counted = self.begin(*tensors)
        sum_up(counted)
        return counted.losses()

    def begin(self, *tensors) -> CountedLoss:
        """Count the samples of several feature levels; the arguments depend on the loss."""
        raise NotImplementedError

    def _begin(
        self,
        samples: kernels.Samples,
        levels: Sequence[Sequence[Tensor]],
        weights: Sequence[Tensor] | None = None,
        **others: Tensor,
    ) -> CountedLoss:
        """Count as `kernels.counted` does; `others` are more counts, for `_weights`."""
        bins, kernel = self.density.bins, self.density.kernel
        counted = kernels.counted(samples, levels, bins, weights, kernel=kernel)
        return self._counted_loss(counted, others)

    def _reduced(
        self,
        samples: kernels.Samples,
        tensors: Sequence[Tensor],
        weight: Tensor | None,
        **others: Tensor,
    ) -> Tensor:
        """Return the reduced loss of one set of samples: a scalar, or a loss for each sample."""
        weights = None if weight is None else [weight]
        # plain PyTorch weighs each sample, so it counts them too: other kernels round differently
        kernel = "torch" if self.reduction == "none" else self.density.kernel
        counted = kernels.counted(samples, [tensors], self.density.bins, weights, kernel=kernel)
        loss = self._counted_loss(counted, others)
        sum_up(loss)
        if self.reduction == "mean":
            return loss.total()
        # a recomputed loss has the counts of this process alone
        share = self._share if is_recomputing() else loss.value.sum() / loss.world
        if not torch.compiler.is_compiling():
            self._share = share
        beta = loss.weights() * share  # the weights are beta / N times the number of processes
        return counted.total(beta) if self.reduction == "sum" else counted.each(beta)[0]

    def _counted_loss(self, counted: kernels.Counted, others: Mapping[str, Tensor]) -> CountedLoss:
        density, counts = self.density, counted.counts
        if density.num_classes > 1:
            counts = counts.view(len(counts), -1, density.bins)

        def weigh(world: int, **values: Tensor) -> Tensor:
            weights = self._weights(world, **values)
            return weights if weights.dim() == 2 else weights.flatten(1)

        sync = density.sync and self.training and not is_recomputing()
        values = {"counts": counts, **others}
        return CountedLoss(counted, weigh, values, sync, density.process_group)

    def _weights(self, world: int, counts: Tensor, foreground: Tensor | None = None) -> Tensor:
        weights = self.density(counts, world, foreground)
        return weights if self.loss_weight == 1 else self.loss_weight * weights

    def extra_repr(self) -> str:
        return f"loss_weight={self.loss_weight}, reduction={self.reduction!r}"
