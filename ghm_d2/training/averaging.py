"""SOLVER.EMA_DECAY: averaged weights, which are evaluated and saved in place of the last ones."""

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class AveragedWeights(HookBase):
    """An exponential moving average of the weights of each step.

    After n steps its decay is the smaller of `decay` and (1 + n) / (10 + n), so that a short
    training is no average of its first steps. Buffers, such as batch norm's statistics, are the
    last ones.

    Attributes:
        model: with the averaged weights; it is not trained.
    """

    def __init__(self, detector: nn.Module, decay: float):
        self._detector, self._decay = detector, decay
        self._averaged = AveragedModel(detector, multi_avg_fn=self._average)
        self.model: nn.Module = self._averaged.module

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], weights: list[Tensor], _) -> None:
        steps = self._averaged.n_averaged.item()  # on the CPU: nothing waits for the device
        decay = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(averaged, weights, 1 - decay)

    def after_step(self):
        self._averaged.update_parameters(self._detector)

    def state_dict(self):
        """The weights of the last step, which the next one changes; `model` is saved beside it."""
        steps = self._averaged.n_averaged.item()
        return {"last": self._detector.state_dict(), "steps": steps}

    def load_state_dict(self, state_dict):
        """Before it the detector holds what a checkpoint's model is, the averaged weights."""
        self.model.load_state_dict(self._detector.state_dict())
        self._detector.load_state_dict(state_dict["last"])
        self._averaged.n_averaged.fill_(state_dict["steps"])
