"""Build losses from a configuration: GHM losses, and a detector's choice of losses."""

import math
from typing import Any

import torch

from ghm_d2 import kernels
from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError
from ghm_d2.losses.exact import ExactGHMC
from ghm_d2.losses.ghm_c import GHMC, SoftmaxGHMC
from ghm_d2.losses.ghm_r import GHMR
from ghm_d2.modeling.loss_choice import check_loss_type

DENSITIES = ("unit_regions", "exact")


def loss_arguments(cfg, keys, num_levels: int, *, softmax: bool = False) -> dict[str, Any]:
    """Return a detector's arguments for its losses: fields of `LossChoice`, `ghm_c` and `ghm_r`.

    The detector reads smooth L1's beta itself, because that key has two names.

    Args:
        keys: the detector's section of `cfg`, such as MODEL.RETINANET.
        num_levels: number of feature levels.
        softmax: the classes share a softmax, for which only GHM losses have kernels.
    """
    ghm, mu = ghm_keys(cfg, "MODEL.GHM"), ghm_keys(cfg, "MODEL.GHM.REG").MU
    return {
        "cls_loss_type": keys.CLS_LOSS_TYPE,
        "box_reg_loss_type": keys.BBOX_REG_LOSS_TYPE,
        "box_reg_loss_weight": keys.BBOX_REG_LOSS_WEIGHT,
        "asl1_mu": mu,
        "kernel": ghm.KERNEL if softmax else check_kernel(cfg),
        "sync": ghm.SYNC,
        "class_weights": class_weights(cfg, keys.NUM_CLASSES, keys.CLS_LOSS_TYPE),
        **ghm_modules(cfg, keys, num_levels, softmax=softmax),
    }


def class_weights(cfg, num_classes: int, cls_loss_type: str) -> tuple[float, ...]:
    """Return MODEL.CLASS_WEIGHTS if they fit the classes.

    Raises:
        UsageError: their number is not that of the classes, one is not above 0 or not finite, or
            the density of GHM-C is exact or the kernel compiled, which do not support class
            weights.
    """
    model, ghm = ghm_keys(cfg, "MODEL"), ghm_keys(cfg, "MODEL.GHM")
    weights = tuple(map(float, model.CLASS_WEIGHTS))
    if model.CLASS_WEIGHTING and not weights:
        raise UsageError(
            "MODEL.CLASS_WEIGHTING is set, but MODEL.CLASS_WEIGHTS is empty; outside `ghm train`, "
            "call ghm_d2.data.class_weights.fill_class_weights(cfg)"
        )
    if weights and len(weights) != num_classes:
        raise UsageError(
            f"MODEL.CLASS_WEIGHTS has {len(weights)} numbers, but there are {num_classes} classes"
        )
    for weight in weights:
        if not 0 < weight < math.inf:
            raise UsageError(
                f"MODEL.CLASS_WEIGHTS must be finite numbers above 0, but one is {weight:g}"
            )
    density = ghm_keys(cfg, "MODEL.GHM.CLS").DENSITY
    if weights and cls_loss_type == "ghm_c" and density == "exact":
        raise UsageError(
            "MODEL.GHM.CLS.DENSITY exact does not support MODEL.CLASS_WEIGHTS; set DENSITY to "
            "unit_regions"
        )
    if weights and ghm.KERNEL not in ("auto", "torch"):
        raise UsageError(
            f"MODEL.GHM.KERNEL {ghm.KERNEL} does not support MODEL.CLASS_WEIGHTS; set "
            "KERNEL to auto"
        )
    return weights


def ghm_modules(cfg, keys, num_levels: int = 1, *, softmax: bool = False) -> dict[str, Any]:
    """Build `ghm_c` and `ghm_r`, each None if another loss is chosen; see `loss_arguments`."""
    ghm_c = None
    if keys.CLS_LOSS_TYPE == "ghm_c" and softmax:
        ghm_c = build_softmax_ghm_c(cfg, num_levels)
    elif keys.CLS_LOSS_TYPE == "ghm_c":
        ghm_c = build_ghm_c(cfg, num_levels, keys.NUM_CLASSES)
    return {
        "ghm_c": ghm_c,
        "ghm_r": build_ghm_r(cfg, num_levels) if keys.BBOX_REG_LOSS_TYPE == "ghm_r" else None,
    }


def build_ghm_c(cfg, num_levels: int = 1, num_classes: int = 1) -> GHMC | ExactGHMC:
    """Build GHM-C over `num_classes` sigmoids from MODEL.GHM.CLS.

    Raises:
        UsageError: a value is out of range, or the exact density is used with SCOPE "level_ema"
            (it has no moving average) or with PRIOR or PER_CLASS (it has no unit regions).
    """
    keys = ghm_keys(cfg, "MODEL.GHM.CLS")
    if check_loss_type("MODEL.GHM.CLS.DENSITY", keys.DENSITY, DENSITIES) == "exact":
        return _build_exact(keys, ghm_keys(cfg, "MODEL.GHM").SCOPE)
    return _build(GHMC, cfg, keys, num_levels, num_classes=num_classes if keys.PER_CLASS else 1)


def build_softmax_ghm_c(cfg, num_levels: int = 1) -> SoftmaxGHMC:
    """Build GHM-C over a softmax from MODEL.GHM.CLS.

    Raises:
        UsageError: a value is out of range, or the density is exact, which is for sigmoids only.
    """
    keys = ghm_keys(cfg, "MODEL.GHM.CLS")
    if check_loss_type("MODEL.GHM.CLS.DENSITY", keys.DENSITY, DENSITIES) == "exact":
        raise UsageError(
            "MODEL.GHM.CLS.DENSITY exact needs sigmoids (RetinaNet, FCOS, YOLOv3, RPN), but this "
            "detector classifies with a softmax; set it to unit_regions"
        )
    return _build(SoftmaxGHMC, cfg, keys, num_levels)


def build_ghm_r(cfg, num_levels: int = 1) -> GHMR:
    """Build GHM-R from MODEL.GHM.REG."""
    keys = ghm_keys(cfg, "MODEL.GHM.REG")
    return _build(GHMR, cfg, keys, num_levels, mu=keys.MU, mu_quantile=keys.MU_QUANTILE)


def check_kernel(cfg) -> str:
    """Return MODEL.GHM.KERNEL if there is such a kernel for MODEL.DEVICE.

    Raises:
        UsageError: there is no such kernel.
    """
    kernel = ghm_keys(cfg, "MODEL.GHM").KERNEL
    try:
        kernels.compiled(kernel, torch.device(cfg.MODEL.DEVICE))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"MODEL.GHM.KERNEL: {error}") from None
    return kernel


def _build_exact(keys, scope: str) -> ExactGHMC:
    if keys.PRIOR or keys.PER_CLASS:
        raise UsageError(
            "MODEL.GHM.CLS.DENSITY exact does not support MODEL.GHM.CLS.PRIOR and PER_CLASS; set "
            "PRIOR 0.0 and PER_CLASS False, or DENSITY unit_regions"
        )
    if scope not in ("level", "batch"):
        raise UsageError(
            f"MODEL.GHM.CLS.DENSITY exact does not support MODEL.GHM.SCOPE {scope}; set SCOPE to "
            "level or batch"
        )
    if keys.BINS < 1:
        raise UsageError(f"MODEL.GHM.CLS.BINS must be at least 1, not {keys.BINS}")
    try:
        return ExactGHMC(1 / keys.BINS, loss_weight=keys.LOSS_WEIGHT, scope=scope)
    except ValueError as error:
        raise UsageError(f"MODEL.GHM.CLS: {error}") from None


def _build(kind, cfg, keys, num_levels: int, **extra):
    ghm = ghm_keys(cfg, "MODEL.GHM")
    try:
        return kind(
            bins=keys.BINS,
            momentum=keys.MOMENTUM,
            prior=keys.PRIOR,
            loss_weight=keys.LOSS_WEIGHT,
            scope=ghm.SCOPE,
            normalizer=ghm.NORMALIZER,
            ema_init=ghm.EMA_INIT,
            sync=ghm.SYNC,
            kernel=check_kernel(cfg),
            num_levels=num_levels,
            **extra,
        )
    except ValueError as error:
        part = "REG" if kind is GHMR else "CLS"
        raise UsageError(f"MODEL.GHM.{part}: {error}") from None
