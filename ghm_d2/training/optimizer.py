"""The optimizer of a configuration: Detectron2's SGD, or AdamW, and clipping over the model."""

import torch
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from ghm_d2.errors import UsageError

OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}


def build_optimizer(cfg, model) -> torch.optim.Optimizer:
    """By SOLVER, with Detectron2's parameter groups (no weight decay for norms, and so on).

    Raises:
        UsageError: an unknown SOLVER.OPTIMIZER.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UsageError(f"SOLVER.OPTIMIZER is one of {known}, not {solver.OPTIMIZER!r}")
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
    if not clips_full_model(cfg):  # which the trainer does
        kind = maybe_add_gradient_clipping(cfg, kind)
    return kind(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)


def clips_full_model(cfg) -> bool:
    """Whether the norm of all gradients together is clipped, as GHM's recipe does (at 35).

    Detectron2's "norm" clips the gradient of each parameter on its own.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.ENABLED and clip.CLIP_TYPE == "full_model"
