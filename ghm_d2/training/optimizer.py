"""Builds the optimizer of a configuration: SGD or AdamW, with gradient clipping if it is set."""

import torch
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from ghm_d2.errors import UsageError

OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}


class _ClipsFullModel:
    """A mixin for PyTorch optimizers: `step` first clips the norm of all gradients together."""

    def __init__(self, params, *, max_norm: float, norm_type: float = 2.0, **kwargs):
        """
        Args:
            max_norm, norm_type: as in `torch.nn.utils.clip_grad_norm_`.
            params, **kwargs: passed to the optimizer.
        """
        super().__init__(params, **kwargs)
        self._clip = max_norm, norm_type

    def step(self, closure=None):
        """Clip, then update; argument and result are the optimizer's."""
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, *self._clip)
        return super().step(closure)


class ClippedSGD(_ClipsFullModel, torch.optim.SGD):
    """SGD that clips the norm of all gradients together, as GHM's recipe does (at 35)."""


class ClippedAdamW(_ClipsFullModel, torch.optim.AdamW):
    """AdamW that clips the norm of all gradients together."""


CLIPPED = {"SGD": ClippedSGD, "ADAMW": ClippedAdamW}


def build_optimizer(cfg, model) -> torch.optim.Optimizer:
    """Build SOLVER's optimizer with Detectron2's parameter groups (no weight decay for norms etc.).

    With SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" its `step` clips the norm of all gradients
    together, as GHM's recipe does; Detectron2's "norm" clips each parameter's gradient on its own.

    Raises:
        UsageError: an unknown SOLVER.OPTIMIZER.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UsageError(f"SOLVER.OPTIMIZER must be one of {known}, not {solver.OPTIMIZER!r}")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    kind, options = OPTIMIZERS[solver.OPTIMIZER], {}
    if solver.OPTIMIZER == "SGD":
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        kind = CLIPPED[solver.OPTIMIZER]
        options |= {"max_norm": clip.CLIP_VALUE, "norm_type": clip.NORM_TYPE}
    else:
        kind = maybe_add_gradient_clipping(cfg, kind)
    return kind(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)
