"""YOLOv3's box loss: a weighted sum over positive anchors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def half_squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Of each number: its gradient is prediction minus truth, as arXiv 1804.02767, 2.1, has it.

    darknet hands that gradient past the sigmoid of the centre, to the raw prediction; here it
    goes through the sigmoid, as the derivative of a sum of squared errors does.
    """
    return 0.5 * (pred - target) ** 2


def box_loss(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    boxes: Sequence[Tensor],
    positive: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The sum over positive anchors, each weighed by `box_weights`, over the number of images.

    Args:
        pred, target: `box_values` and `encode_boxes`, (N, R_l, 4) a level; the targets of other
            anchors than positive ones may be anything, NaN included.
        boxes: (N, R_l, 4) matched boxes in px, a level each.
        positive: (N, R_l) bool a level.
        image_sizes: height and width of each image in px.
        loss: of each number.
    """
    sizes = torch.tensor(image_sizes, device=boxes[0].device)
    total = pred[0].new_zeros(())
    for p, t, b, mask in zip(pred, target, boxes, positive, strict=True):
        mask = mask[..., None]
        numbers = loss(torch.where(mask, p, 0), torch.where(mask, t, 0))
        total = total + (numbers * torch.where(mask, box_weights(b, sizes), 0)).sum()
    return total / len(image_sizes)


def box_weights(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """(N, R, 1), in [1, 2]: darknet's 2 - w * h, sides in parts of the image.

    Args:
        boxes: (N, R, 4) in px, within their image.
        image_sizes: (N, 2) height and width of each image in px.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return (2 - area / image_sizes.prod(1)[:, None])[..., None]
