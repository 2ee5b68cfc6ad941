"""SOLVER.EMA_DECAY: averaged weights, evaluated and saved in place of those of the last step."""

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class AveragedWeights(HookBase):
    """An exponential moving average of the weights of each step.

    After n steps the decay is the smaller of `decay` and (1 + n) / (10 + n), so that the first
    steps do not dominate the average of a short training. Buffers, such as batch norm's statistics,
    are copied from the last step.

    Attributes:
        model: the detector with the averaged weights; it is not trained.
    """

    def __init__(self, detector: nn.Module, decay: float):
        self._detector, self._decay = detector, decay
        self._averaged = AveragedModel(detector, multi_avg_fn=self._average)
        self.model: nn.Module = self._averaged.module

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], weights: list[Tensor], _) -> None:
        steps = self._averaged.n_averaged.item()  # a CPU tensor: no wait for the GPU
        decay = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(averaged, weights, 1 - decay)

    def after_step(self):
        self._averaged.update_parameters(self._detector)

    def state_dict(self):
        """Return the last step's weights and the step count; `model` is saved beside them."""
        steps = self._averaged.n_averaged.item()
        return {"last": self._detector.state_dict(), "steps": steps}

    def load_state_dict(self, state_dict):
        """Restore both sets of weights; the detector must hold the checkpoint's averaged ones."""
        self.model.load_state_dict(self._detector.state_dict())
        self._detector.load_state_dict(state_dict["last"])
        self._averaged.n_averaged.fill_(state_dict["steps"])
