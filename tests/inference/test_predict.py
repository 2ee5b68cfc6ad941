"""Pictures of detections beside the truth."""

import numpy as np
from detectron2.data import DatasetCatalog

from ghm_d2.data.catalog import resolve
from ghm_d2.inference.predict import sheet_beside_truth


def test_true_masks_are_drawn_where_the_detections_have_some(digits_folder):
    name = resolve(digits_folder, "val")
    items = DatasetCatalog.get(name)[:1]
    mask = items[0]["annotations"][0]["segmentation"]
    bare = [{k: v for k, v in a.items() if k != "segmentation"} for a in items[0]["annotations"]]
    found = {"image_id": items[0]["image_id"], "category_id": 1, "score": 0.5}
    found["bbox"] = [2.0, 2.0, 9.0, 9.0]

    def truth(items, *detections):
        sheet = np.asarray(sheet_beside_truth(name, items, detections, ["found"]))
        return sheet[:, : sheet.shape[1] // 2]

    boxes = truth([items[0] | {"annotations": bare}], found)
    assert np.array_equal(truth(items, found), boxes)
    assert not np.array_equal(truth(items, found | {"segmentation": mask}), boxes)
    assert items[0]["annotations"][0]["segmentation"] == mask
