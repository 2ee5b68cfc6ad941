"""The losses that a detector trains with: their names and settings, and their GHM modules."""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ghm_d2.errors import UsageError

GHM_LOSSES = ("ghm_c", "ghm_r")
# box losses of RetinaNet, FCOS and the box head; SSD and YOLOv3 have others
IOU_LOSSES = ("giou", "diou", "ciou")
DETECTRON2_REG_LOSSES = ("smooth_l1", *IOU_LOSSES)
REG_LOSSES = (*DETECTRON2_REG_LOSSES, "asl1", "ghm_r")


@dataclass(frozen=True)
class LossChoice:
    """The losses of a detector by name, with their settings.

    Args:
        cls_loss_type, box_reg_loss_type: names; each detector says which ones it has.
        box_reg_loss_weight: factor on `loss_box_reg`.
        smooth_l1_beta: where smooth L1 turns linear, in the unit of the detector's deltas.
        asl1_mu: mu of ASL1, in the same unit.
        kernel: the kernel of focal loss and binary cross entropy, one of `kernels.KERNELS`.
        sync: divide sums by counts over all processes; GHM losses have a `sync` of their own.
        class_weights: K factors, each on the classification losses of one class's anchors or rows.
            Background has the factor 1; if empty, all have it.
    """

    cls_loss_type: str
    box_reg_loss_type: str
    box_reg_loss_weight: float = 1.0
    smooth_l1_beta: float = 0.0
    asl1_mu: float = 0.02
    kernel: str = "auto"
    sync: bool = True
    class_weights: tuple[float, ...] = ()

    def weight_of(self, labels: Tensor) -> Tensor | None:
        """Return the factor on each row's loss, in the shape of `labels`; None if all are 1.

        Args:
            labels: int64: 0..K-1 a class, K background, negative ignored.
        """
        if not self.class_weights:
            return None
        return self.class_and_background_weights(labels.device)[labels]  # -1: background's

    def class_and_background_weights(self, device: torch.device) -> Tensor:
        """Return `class_weights` with 1 for the background at the end, (K + 1,) float32."""
        return _weight_table(self.class_weights, device)

    def take(self, arguments: dict[str, Any]) -> "LossChoice":
        """Return a copy with the fields found in `arguments`, and remove them from `arguments`."""
        names = [field.name for field in fields(self) if field.name in arguments]
        return replace(self, **{name: arguments.pop(name) for name in names})

    def used_modules(
        self,
        group: str,
        cls_losses: tuple[str, ...],
        reg_losses: tuple[str, ...],
        ghm_c: nn.Module | None,
        ghm_r: nn.Module | None,
    ) -> tuple[nn.Module | None, nn.Module | None]:
        """Return `ghm_c` and `ghm_r`, each None if another loss is chosen; see `used_module`.

        Args:
            group: the configuration section with the loss types, such as "MODEL.SSD".
            cls_losses, reg_losses: the loss types that the detector has.
        """
        cls_key, reg_key = f"{group}.CLS_LOSS_TYPE", f"{group}.BBOX_REG_LOSS_TYPE"
        return (
            used_module(cls_key, self.cls_loss_type, cls_losses, ghm_c),
            used_module(reg_key, self.box_reg_loss_type, reg_losses, ghm_r),
        )


@functools.lru_cache(maxsize=16)  # copying to a device waits for it; copy once
def _weight_table(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor([*weights, 1.0], device=device)


def used_module(
    key: str, loss_type: str, known: tuple[str, ...], module: nn.Module | None
) -> nn.Module | None:
    """Return `module`, which holds a GHM loss's state, if `loss_type` is one; otherwise None.

    Raises:
        UsageError: `loss_type`, the value of `key`, is not in `known`; or it is a GHM loss and
            `module` is None.
    """
    if check_loss_type(key, loss_type, known) not in GHM_LOSSES:
        return None
    if module is None:
        raise UsageError(
            f"{key} {loss_type} needs a loss module, but none is given; pass one from "
            "ghm_d2.losses, or build the detector from a configuration"
        )
    return module


def check_loss_type(key: str, value: str, known: tuple[str, ...]) -> str:
    """Return `value` if it is one of `known`.

    Raises:
        UsageError: it is not; the message lists the key and the known values.
    """
    if value not in known:
        raise UsageError(f"{key} must be one of {', '.join(known)}, not {value!r}")
    return value
