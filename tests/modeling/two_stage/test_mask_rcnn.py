"""Mask R-CNN with GHM on its boxes: the mask head is Detectron2's, and so are its numbers."""

import pytest
import torch
from detectron2.structures import BitMasks
from tiny_models import assert_same_training, assert_sound_step, faster_rcnn, inputs, step
from tiny_models import ghm_faster_rcnn as ghm_rcnn

MASKS = {
    "MODEL.MASK_ON": "True",
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "1",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": "14",
}
NAMES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_mask"}


def with_masks(batch):
    """An ellipse in each box."""
    for item in batch:
        height, width = item["image"].shape[1:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        masks = torch.zeros(len(item["instances"]), height, width, dtype=torch.bool)
        for mask, box in zip(masks, item["instances"].gt_boxes.tensor, strict=True):
            cx, cy, rx, ry = *(box[:2] + box[2:]) / 2, *(box[2:] - box[:2]) / 2
            mask[:] = ((x + 0.5 - cx) / rx) ** 2 + ((y + 0.5 - cy) / ry) ** 2 <= 1
        item["instances"].gt_masks = BitMasks(masks)
    return batch


def test_without_ghm_it_is_detectron2s_mask_rcnn():
    batches = [with_masks(inputs(seed=1)), with_masks(inputs((0, 4), seed=2))]
    assert_same_training(ghm_rcnn(keys=MASKS), faster_rcnn(MASKS), batches)


@pytest.mark.parametrize("reg", ["smooth_l1", "ghm_r"])
def test_it_trains_on_images_with_and_without_objects(reg):
    model = ghm_rcnn(reg=reg, keys=MASKS)
    heads = [model.roi_heads, model.proposal_generator]
    assert assert_sound_step(model, with_masks(inputs((4, 3))), heads).keys() == NAMES
    assert_sound_step(model, with_masks(inputs((0, 3))), heads)
    empty = inputs((0, 0))  # as Detectron2's mapper leaves them: without masks
    assert assert_sound_step(model, empty, heads, reaching=False)["loss_mask"] == 0


def test_ghm_r_changes_the_box_loss_alone():
    plain, ghm = (ghm_rcnn(reg=reg, keys=MASKS) for reg in ("smooth_l1", "ghm_r"))
    ghm.load_state_dict(plain.state_dict(), strict=False)
    losses = [step(model, with_masks(inputs(seed=3))) for model in (plain, ghm)]
    different = {name for name in NAMES if not torch.equal(losses[0][name], losses[1][name])}
    assert different == {"loss_box_reg"}


def test_a_detection_has_a_mask_of_the_image():
    model = ghm_rcnn(keys=MASKS).eval()
    with torch.no_grad():
        found = model(inputs())[0]["instances"]
    assert len(found) > 0
    assert found.pred_masks.shape == (len(found), *found.image_size)
    assert found.pred_masks.dtype == torch.bool
