"""GHM losses from a configuration's MODEL.GHM."""

from ghm_d2.errors import UsageError
from ghm_d2.losses.ghm_c import GHMC, SoftmaxGHMC
from ghm_d2.losses.ghm_r import GHMR


def build_ghm_c(cfg, num_levels: int = 1) -> GHMC:
    """GHM-C over sigmoids, from MODEL.GHM.CLS."""
    return _build(GHMC, cfg, cfg.MODEL.GHM.CLS, num_levels)


def build_softmax_ghm_c(cfg) -> SoftmaxGHMC:
    """GHM-C over a softmax, from MODEL.GHM.CLS."""
    return _build(SoftmaxGHMC, cfg, cfg.MODEL.GHM.CLS, 1)


def build_ghm_r(cfg, num_levels: int = 1) -> GHMR:
    """GHM-R, from MODEL.GHM.REG."""
    return _build(GHMR, cfg, cfg.MODEL.GHM.REG, num_levels, mu=cfg.MODEL.GHM.REG.MU)


def check_loss_type(key: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`.

    Raises:
        UsageError: it is not; the key and the known ones are named.
    """
    if value not in known:
        raise UsageError(f"{key} is one of {', '.join(known)}, not {value!r}")
    return value


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
            num_levels=num_levels,
            **extra,
        )
    except ValueError as error:
        part = "REG" if kind is GHMR else "CLS"
        raise UsageError(f"MODEL.GHM.{part}: {error}") from None
