"""The results files that COCO's server takes."""

import json

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from ghm_d2.inference.evaluation.results_file import (
    keep_detections,
    submission_hint,
    write_results,
)


def rle() -> dict:
    pixels = np.zeros((96, 160), np.uint8, order="F")
    pixels[5:20, 10:40] = 1
    encoded = coco_mask.encode(pixels)
    return encoded | {"counts": encoded["counts"].decode()}


def test_boxes_and_masks_go_into_files_of_their_own(coco_names, tmp_path):
    found = {"image_id": 16, "category_id": 90, "score": 0.5, "bbox": [10.0, 5.0, 30.0, 15.0]}
    name = "coco_2017_test-dev"
    files = write_results(tmp_path, name, "mask_rcnn R-50", [found | {"segmentation": rle()}])
    assert [file.name for file in files] == [
        "detections_test-dev2017_mask-rcnn-R-50_results.json",
        "detections_test-dev2017_mask-rcnn-R-50-masks_results.json",
    ]
    boxes, masks = (json.loads(file.read_text()) for file in files)
    assert boxes == [found]
    assert masks[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    assert isinstance(masks[0]["segmentation"]["counts"], str)
    dev = COCO(MetadataCatalog.get(name).json_file)
    assert dev.loadRes(str(files[0])).anns[1]["area"] == 30 * 15
    assert dev.loadRes(str(files[1])).anns[1]["area"] == 30 * 15
    hint = submission_hint(name, files)
    assert all(str(file) in hint for file in files) and "\n" not in hint


def test_nothing_found_is_an_empty_list(coco_names, tmp_path):
    (file,) = write_results(tmp_path, "coco_2017_test-dev", "x", [])
    assert json.loads(file.read_text()) == []


def test_kept_detections_are_rounded_and_have_masks_if_asked(tmp_path):
    found = {"image_id": 16, "category_id": 90, "score": 0.1234567, "bbox": [10.006, 5.0, 3.0, 1.0]}
    for masks in (False, True):
        keep_detections(tmp_path, [found | {"segmentation": rle()}, found], masks=masks)
        text = (tmp_path / "detections.json").read_text()
        first, second = json.loads(text)
        assert second == found | {"score": 0.12346, "bbox": [10.01, 5.0, 3.0, 1.0]}
        assert first == second | ({"segmentation": rle()} if masks else {})
        assert ": " not in text and text.count("\n") == 1
