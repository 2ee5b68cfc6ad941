"""COCO as it is: a small folder of its exact layout, and what is started on it by its names."""

import json

from detectron2.data import DatasetCatalog, MetadataCatalog


def test_the_folder_has_what_is_odd_about_coco(coco_names):
    train = DatasetCatalog.get("coco_2017_train")
    ids = MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id
    assert (len(ids), max(ids)) == (80, 90)
    boxes = [a for image in train for a in image["annotations"]]
    assert {a["category_id"] for a in boxes} == set(range(80))
    assert sum(a["bbox"][3] == 0 for a in boxes) == 2
    assert sum(a["iscrowd"] for a in boxes) == 1
    assert any(len(a["segmentation"]) == 2 for a in boxes if not a["iscrowd"])
    assert any(not image["annotations"] for image in train)
    dev = coco_names / "coco" / "annotations" / "image_info_test-dev2017.json"
    assert "annotations" not in json.loads(dev.read_text())
    assert len(DatasetCatalog.get("coco_2017_test-dev")) == 2
