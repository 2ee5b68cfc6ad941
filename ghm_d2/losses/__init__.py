"""GHM-C, GHM-R and the losses they are compared with; usable outside Detectron2."""

from ghm_d2.losses.asl1 import ASL1, asl1_loss
from ghm_d2.losses.baselines import (
    BCE,
    OHEM,
    Focal,
    SmoothL1,
    SoftmaxCE,
    bce_loss,
    focal_loss,
    ohem_loss,
    softmax_ce_loss,
)
from ghm_d2.losses.density.gradient_density import GradientDensity, recomputing
from ghm_d2.losses.density.sync import alone, sum_up
from ghm_d2.losses.exact import ExactGHMC, exact_ghm_c_loss, exact_gradient_density
from ghm_d2.losses.ghm_c import GHMC, SoftmaxGHMC, ghm_c_loss
from ghm_d2.losses.ghm_r import GHMR, ghm_r_loss
from ghm_d2.losses.quality import quality_focal_loss, varifocal_loss

__all__ = [
    "ASL1",
    "BCE",
    "GHMC",
    "GHMR",
    "OHEM",
    "ExactGHMC",
    "Focal",
    "GradientDensity",
    "SmoothL1",
    "SoftmaxCE",
    "SoftmaxGHMC",
    "alone",
    "asl1_loss",
    "bce_loss",
    "exact_ghm_c_loss",
    "exact_gradient_density",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "ohem_loss",
    "quality_focal_loss",
    "recomputing",
    "softmax_ce_loss",
    "sum_up",
    "varifocal_loss",
]
