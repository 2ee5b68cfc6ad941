"""Freezing parts of a network: batch norm, and the layers behind the first feature maps."""

from collections.abc import Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Detectron2's frozen batch norm, with the activation that timm keeps in the same module.

    `FrozenBatchNorm2d.convert_frozen_batchnorm` would lose the activation, because it treats
    timm's `BatchNormAct2d` as a plain `BatchNorm2d`.
    """

    def __init__(self, num_features: int, eps: float, drop: nn.Module, act: nn.Module):
        super().__init__(num_features, eps)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the normalised x, (N, C, H, W)."""
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d by a frozen layer with fixed statistics and no parameters.

    Names in the state dict stay, except that `num_batches_tracked` is removed.

    Returns:
        `module`, changed in place, or a new module if it is a batch norm itself.
    """
    if not isinstance(module, _BATCH_NORMS):
        for name, child in module.named_children():
            setattr(module, name, freeze_batch_norm(child))
        return module
    size = module.num_features
    if hasattr(module, "act"):
        frozen = FrozenBatchNormAct2d(size, module.eps, module.drop, module.act)
    else:
        frozen = FrozenBatchNorm2d(size, module.eps)
    return _filled(frozen, module.state_dict()).train(module.training)


def freeze_parameters_of(model: nn.Module, outputs: Sequence[int], sample: Tensor) -> None:
    """Freeze every parameter that the given outputs of `model` depend on, and the batch norm there.

    Autograd finds these parameters, because each timm model arranges its stages differently.

    Args:
        model: returns a list of tensors; changed in place.
        outputs: indices into that list; if there are none, the model is not changed.
        sample: an input; its values do not matter.
    """
    if not outputs:
        return
    was_training = model.training
    maps = model.eval()(sample)  # in training mode the sample would change the statistics
    named = dict(model.named_parameters())
    total = torch.stack([maps[i].sum() for i in outputs]).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        parameter.requires_grad_(gradient is None)
    for name, child in list(model.named_modules()):
        if isinstance(child, _BATCH_NORMS) and child.affine and not child.weight.requires_grad:
            model.set_submodule(name, freeze_batch_norm(child))
    model.train(was_training)


def _filled(frozen: FrozenBatchNorm2d, state: dict[str, Tensor]) -> FrozenBatchNorm2d:
    # `state` has no weight and bias if the layer is not affine; of timm's layers it also has the
    # parameters of the activation, which is the same module in `frozen`
    for name, buffer in frozen.named_buffers(recurse=False):
        if name in state:
            buffer.copy_(state[name])
    return frozen
