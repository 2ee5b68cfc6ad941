"""Quality focal and varifocal loss in RetinaNet and FCOS: their targets are IoUs."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from tiny_models import CLASSES, build, ghm_retinanet, inputs, recorded_losses, step

from ghm_d2.losses import quality_focal_loss, varifocal_loss

LOSSES = {"qfl": quality_focal_loss, "vfl": varifocal_loss}
FCOS = {"MODEL.META_ARCHITECTURE": "GHMFCOS", "MODEL.FCOS.NUM_CLASSES": str(CLASSES)}


def detector(name, loss):
    if name == "retinanet":
        return ghm_retinanet(loss)
    return build("RetinaNet", FCOS | {"MODEL.FCOS.CLS_LOSS_TYPE": loss})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_the_target_is_the_predicted_boxs_iou(name, loss):
    model, batch = detector(name, loss), inputs((4, 3, 0), seed=1)
    arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
    anchors, logits, labels, deltas, gt_boxes = arguments[:5]
    y = torch.stack(labels)
    quality = torch.zeros(y.shape)
    all_anchors, deltas = Boxes.cat(anchors).tensor, torch.cat(deltas, 1).detach()
    for image, index in ((y >= 0) & (y < CLASSES)).nonzero():
        one = slice(index, index + 1)
        box = model.box2box_transform.apply_deltas(deltas[image, one], all_anchors[one])
        matched = getattr(gt_boxes[image], "tensor", gt_boxes[image])[one]
        quality[image, index] = pairwise_iou(Boxes(box), Boxes(matched)).item()
    assert quality.max() > 0.1
    x = torch.cat(logits, 1).flatten(0, 1)
    total = LOSSES[loss](x, y.flatten(), quality.flatten(), reduction="sum")
    expected = total / model.loss_normalizer.float()
    torch.testing.assert_close(losses["loss_cls"], expected, rtol=1e-4, atol=1e-6)
    assert losses["loss_cls"].requires_grad
