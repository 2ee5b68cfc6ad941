"""Annotations as the training loader hands them to a model."""

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask

from ghm_d2.config import get_cfg
from ghm_d2.data.loading.loaders import GHMDatasetMapper


@pytest.mark.parametrize("kind", [int, float])
def test_boxes_are_scaled_exactly(tmp_path, kind):
    file = tmp_path / "image.png"
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(file)
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (95,), "none"
    annotation = {
        "bbox": [kind(v) for v in (10, 10, 9, 9)],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
    }
    item = {"file_name": str(file), "height": 100, "width": 100, "annotations": [annotation]}
    boxes = GHMDatasetMapper(cfg, True)(item)["instances"].gt_boxes.tensor
    np.testing.assert_allclose(boxes.numpy(), [[9.5, 9.5, 18.05, 18.05]], rtol=1e-6)
    assert type(annotation["bbox"][0]) is kind, "the data set itself was changed"


@pytest.mark.parametrize("kind", [int, float])
def test_polygons_are_scaled_exactly(tmp_path, kind):
    file = tmp_path / "image.png"
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(file)
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (95,), "none"
    triangle = [kind(v) for v in (10, 10, 19, 10, 19, 21)]
    annotation = {
        "bbox": [10, 10, 9, 11],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": [triangle],
    }
    item = {"file_name": str(file), "height": 100, "width": 100, "annotations": [annotation]}
    ((polygon,),) = GHMDatasetMapper(cfg, True)(item)["instances"].gt_masks.polygons
    np.testing.assert_allclose(polygon, [9.5, 9.5, 18.05, 9.5, 18.05, 19.95], rtol=1e-12)
    assert type(annotation["segmentation"][0][0]) is kind, "the data set itself was changed"


@pytest.mark.parametrize("augmentation", ["", "ssd"])
@pytest.mark.parametrize("crop", [False, True])
def test_a_detector_without_masks_needs_none(tmp_path, crop, augmentation):
    """Whatever MODEL.MASK_ON says: of these objects one has a mask, and two have not."""
    file = tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(file)
    boxes = {"bbox": [4, 10, 26, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    masked = boxes | {"segmentation": [[4, 10, 30, 10, 30, 20]]}
    item = {"file_name": str(file), "height": 40, "width": 40}
    item["annotations"] = [masked, boxes, boxes | {"segmentation": []}]
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "GHMRetinaNet", True
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.AUGMENTATION = crop, augmentation
    cfg.INPUT.CROP.SIZE = [1.0, 1.0]
    np.random.seed(0)
    torch.manual_seed(0)
    result = GHMDatasetMapper(cfg, True)(item)
    assert "error" not in result, result
    assert len(result["instances"]) == 3 and not result["instances"].has("gt_masks")


def test_polygons_and_rles_become_masks_that_follow_the_image(tmp_path):
    """The same square as both, in one image of 40 px that becomes 80; an image without objects."""
    file = tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(file)
    square = np.zeros((40, 40), np.uint8)
    square[10:20, 4:30] = 1
    rle = coco_mask.encode(np.asfortranarray(square))
    polygon = [[4, 10, 30, 10, 30, 20, 4, 20]]
    annotations = [
        {"bbox": [4, 10, 26, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        | {"segmentation": mask}
        for mask in (polygon, rle, rle | {"counts": rle["counts"].decode()})
    ]
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (80,), "none"
    item = {"file_name": str(file), "height": 40, "width": 40, "annotations": annotations}
    instances = GHMDatasetMapper(cfg, True)(item)["instances"]
    expected = np.kron(square, np.ones((2, 2)))
    assert len(instances) == 3
    for mask in instances.gt_masks.tensor.numpy():
        assert (mask != expected).mean() < 0.01  # a row or a column, by where a pixel's middle is
    assert len(GHMDatasetMapper(cfg, True)(item | {"annotations": []})["instances"]) == 0


@pytest.mark.parametrize("augmentation", ["", "ssd", "yolo"])
@pytest.mark.parametrize("masks", [False, True])
def test_boxes_without_area_or_outside_are_left_out(tmp_path, augmentation, masks):
    """Detectron2's mapper leaves out the same: boxes without height, outside, of a crowd."""
    file = tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(file)
    flat = [6.65, 8.33, 7.68, 8.33, 7.68, 8.33, 6.65, 8.33]
    outside = [50, 50, 60, 50, 60, 60]
    boxes = {(6.65, 8.33, 1.03, 0.0): flat, (6.0, 8.0, 0, 9): flat, (50, 50, 10, 10): outside}
    boxes[4, 10, 26, 10] = [4, 10, 30, 10, 30, 20, 4, 20]
    common = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    annotations = [common | {"bbox": [*b], "segmentation": [p]} for b, p in boxes.items()]
    item = {"file_name": str(file), "height": 40, "width": 40}
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.AUGMENTATION = masks, augmentation
    cfg.INPUT.MIN_SIZE_TRAIN = (80,)
    mapper = GHMDatasetMapper(cfg, True)
    for seed in range(5):
        np.random.seed(seed)
        torch.manual_seed(seed)
        left = mapper(item | {"annotations": annotations})["instances"]
        assert len(left) == 1 and left.gt_boxes.area().min() > 0
        assert len(mapper(item | {"annotations": annotations[:3]})["instances"]) == 0
