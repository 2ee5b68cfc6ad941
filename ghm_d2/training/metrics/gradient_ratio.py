"""The balance of classification and boxes: their gradients at the features that both read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ghm_d2.modeling.shared_features import reader_of_shared_features

GRADIENT_RATIO = "grad_ratio_cls_box"
PERIOD = 20  # iterations between two measurements, approximately
_TERMS = (("loss_cls", "loss_obj"), ("loss_box_reg",))  # YOLOv3's objectness is classification


@contextmanager
def shared_features(detector: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that a forward pass fills with the shared features, if the detector is known.

    The list holds aliases, which the heads read in place of the features. A gradient at them passes
    through the heads only, even if one feature map is computed from another.
    """
    reader, found = reader_of_shared_features(detector), []
    if reader is None:
        yield found
        return

    def alias(_module, arguments):
        first, *others = arguments
        if isinstance(first, Tensor):
            found.append(first.view_as(first))
            return (found[-1], *others)
        found.extend(x.view_as(x) for x in first)
        return (list(found), *others)

    handle = reader.register_forward_pre_hook(alias)
    try:
        yield found
    finally:
        handle.remove()


def squared_norms(losses: dict[str, Tensor], features: list[Tensor]) -> Tensor | None:
    """Return squared L2 norms, (2,), of the gradients of classification and boxes at `features`.

    The graph is kept for the training's own backward pass, whose result does not change.

    Returns:
        the norms; None if there are no features, none is trained, or the losses have other names.
    """
    trained = [x for x in features if x.requires_grad]
    terms = [[losses[name] for name in names if name in losses] for names in _TERMS]
    if not trained or not all(terms):
        return None
    norms = []
    for losses_of_term in terms:
        gradients = torch.autograd.grad(
            sum(losses_of_term), trained, retain_graph=True, allow_unused=True
        )
        there = [g.float() for g in gradients if g is not None]
        norms.append(torch.nn.utils.get_total_norm(there).float().to(trained[0].device))
    return torch.stack(norms).square()
