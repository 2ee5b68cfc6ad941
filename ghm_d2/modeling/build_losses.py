"""GHM losses from a configuration's MODEL.GHM."""

import torch
from torch import nn

from ghm_d2 import kernels
from ghm_d2.errors import UsageError
from ghm_d2.losses.ghm_c import GHMC, ExactGHMC, SoftmaxGHMC
from ghm_d2.losses.ghm_r import GHMR

DENSITIES = ("unit_regions", "exact")
GHM_LOSSES = ("ghm_c", "ghm_r")


def build_ghm_c(cfg, num_levels: int = 1) -> GHMC | ExactGHMC:
    """GHM-C over sigmoids, from MODEL.GHM.CLS.

    Raises:
        UsageError: a value out of range; SCOPE "level_ema" with the exact density, which has no
            moving average.
    """
    keys = cfg.MODEL.GHM.CLS
    if check_loss_type("MODEL.GHM.CLS.DENSITY", keys.DENSITY, DENSITIES) == "exact":
        return _build_exact(keys, cfg.MODEL.GHM.SCOPE)
    return _build(GHMC, cfg, cfg.MODEL.GHM.CLS, num_levels)


def build_softmax_ghm_c(cfg, num_levels: int = 1) -> SoftmaxGHMC:
    """GHM-C over a softmax, from MODEL.GHM.CLS.

    Raises:
        UsageError: a value out of range; the exact density, which is for sigmoids alone.
    """
    density = cfg.MODEL.GHM.CLS.DENSITY
    if check_loss_type("MODEL.GHM.CLS.DENSITY", density, DENSITIES) == "exact":
        raise UsageError(
            "MODEL.GHM.CLS.DENSITY exact is for sigmoids (RetinaNet, FCOS, YOLOv3, RPN), and these "
            "classes are a softmax; set it to unit_regions"
        )
    return _build(SoftmaxGHMC, cfg, cfg.MODEL.GHM.CLS, num_levels)


def build_ghm_r(cfg, num_levels: int = 1) -> GHMR:
    """GHM-R, from MODEL.GHM.REG."""
    return _build(GHMR, cfg, cfg.MODEL.GHM.REG, num_levels, mu=cfg.MODEL.GHM.REG.MU)


def check_kernel(cfg) -> str:
    """MODEL.GHM.KERNEL, if there is such a kernel for MODEL.DEVICE.

    Raises:
        UsageError: there is not.
    """
    try:
        kernels.backend_for(cfg.MODEL.GHM.KERNEL, torch.device(cfg.MODEL.DEVICE))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"MODEL.GHM.KERNEL: {error}") from None
    return cfg.MODEL.GHM.KERNEL


def check_loss_type(key: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`.

    Raises:
        UsageError: it is not; the key and the known ones are named.
    """
    if value not in known:
        raise UsageError(f"{key} is one of {', '.join(known)}, not {value!r}")
    return value


def check_ghm(loss_type: str, module: nn.Module | None, key: str) -> None:
    """Make sure that a GHM loss, which has a state, has its module.

    Raises:
        UsageError: `loss_type`, the value of `key`, is one of `GHM_LOSSES`, and `module` is None.
    """
    if loss_type in GHM_LOSSES and module is None:
        raise UsageError(
            f"{key} {loss_type} is computed by a module, and none is given: pass one of "
            "ghm_d2.losses, as building from a configuration does"
        )


def _build_exact(keys, scope: str) -> ExactGHMC:
    if scope not in ("level", "batch"):
        raise UsageError(
            "MODEL.GHM.SCOPE level_ema is of moving averages, which MODEL.GHM.CLS.DENSITY exact "
            "has none of; choose level or batch"
        )
    try:
        return ExactGHMC(1 / keys.BINS, loss_weight=keys.LOSS_WEIGHT, scope=scope)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"MODEL.GHM.CLS: {error}") from None


def _build(kind, cfg, keys, num_levels: int, **extra):
    try:
        return kind(
            bins=keys.BINS,
            momentum=keys.MOMENTUM,
            loss_weight=keys.LOSS_WEIGHT,
            scope=cfg.MODEL.GHM.SCOPE,
            normalizer=cfg.MODEL.GHM.NORMALIZER,
            ema_init=cfg.MODEL.GHM.EMA_INIT,
            sync=cfg.MODEL.GHM.SYNC,
            kernel=check_kernel(cfg),
            num_levels=num_levels,
            **extra,
        )
    except ValueError as error:
        part = "REG" if kind is GHMR else "CLS"
        raise UsageError(f"MODEL.GHM.{part}: {error}") from None
