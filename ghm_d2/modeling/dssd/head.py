"""SSD's predictions from each map, directly or through DSSD's prediction module."""

import math
from collections.abc import Sequence

from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from ghm_d2.modeling.dssd.backbone import ProjectedBlock


class SSDHead(nn.Module):
    """Predicts class scores and box deltas for each default box, with separate layers per level.

    Each prediction is a 3x3 convolution (SSD, section 2.1), after DSSD's prediction module (c)
    (figure 2 there) if `channels` is not 0.
    """

    def __init__(
        self,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: Sequence[int],
        *,
        channels: int = 1024,
        norm: str = "BN",
        prior_prob: float = 0.0,
    ):
        """
        Args:
            input_shape: the shape of each level's map.
            num_classes: K.
            num_anchors: A, the number of default boxes per cell, of each level.
            channels: channels of the prediction modules, 1024 in the paper; 0 omits them.
            norm: the norm in the prediction modules.
            prior_prob: initial probability of an object, in [0, 1); 0 starts from equal scores.
        """
        super().__init__()
        self.prediction, self.cls_score, self.bbox_pred = (nn.ModuleList() for _ in range(3))
        for shape, anchors in zip(input_shape, num_anchors, strict=True):
            inside = channels or shape.channels
            block = ProjectedBlock(shape.channels, inside, norm=norm) if channels else None
            self.prediction.append(block or nn.Identity())
            self.cls_score.append(_predictor(inside, anchors * (num_classes + 1)))
            self.bbox_pred.append(_predictor(inside, anchors * 4))
        if prior_prob:
            for layer in self.cls_score:
                background = layer.bias.data.view(-1, num_classes + 1)[:, -1]
                background.fill_(math.log(num_classes * (1 - prior_prob) / prior_prob))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return scores (N, A (K + 1), H, W), background last, and deltas (N, A 4, H, W)."""
        logits, deltas = [], []
        levels = zip(features, self.prediction, self.cls_score, self.bbox_pred, strict=True)
        for x, prediction, cls_score, bbox_pred in levels:
            x = prediction(x)
            logits.append(cls_score(x))
            deltas.append(bbox_pred(x))
        return logits, deltas


def _predictor(in_channels: int, out_channels: int) -> Conv2d:
    layer = Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.xavier_uniform_(layer.weight)  # SSD, section 3
    nn.init.zeros_(layer.bias)
    return layer
