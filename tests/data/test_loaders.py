"""What training gets to see of an annotation."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from ghm_d2.config import get_cfg
from ghm_d2.data.loaders import GHMDatasetMapper


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
