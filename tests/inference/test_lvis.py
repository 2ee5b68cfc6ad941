"""LVIS is evaluated as Detectron2 does it, with the package lvis."""

import json
import sys

import numpy as np
import pytest
import torch
from coco_folder import SPLITS, registered_at
from detectron2.structures import Boxes, Instances

from ghm_d2.config import load_config
from ghm_d2.data.catalog import validate
from ghm_d2.errors import DataError, UsageError
from ghm_d2.inference.evaluation.evaluate import evaluate
from ghm_d2.progress import Progress
from ghm_d2.records import AP_COLUMNS, LVIS_COLUMNS

CATEGORIES = {1: "r", 2: "c", 5: "f", 1203: "f"}  # LVIS's own ids and how frequent they are
IMAGES = SPLITS["val"][2]


class Finder(torch.nn.Module):
    """Finds the true boxes, one in three shifted, and one of each category that is not there."""

    def __init__(self, truth: dict):
        super().__init__()
        self._truth = truth["annotations"]

    def forward(self, batch):
        (item,) = batch
        boxes, classes = [], []
        for a in self._truth:
            if a["image_id"] == item["image_id"]:
                x, y, w, h = a["bbox"]
                shift = 3.0 if a["id"] % 3 == 0 else 0.0
                boxes.append([x + shift, y, x + shift + w, y + h])
                classes.append(a["category_id"] - 1)
        for category in CATEGORIES:
            boxes.append([1.0, 1.0, 30.0 + category % 7, 40.0])
            classes.append(category - 1)
        found = Instances((item["height"], item["width"]))
        found.pred_boxes = Boxes(torch.tensor(boxes))
        found.scores = torch.linspace(0.9, 0.1, len(boxes))
        found.pred_classes = torch.tensor(classes)
        return [{"instances": found}]


@pytest.fixture(scope="session")
def truth(coco_root) -> dict:
    """lvis_v1_val in LVIS's layout: what is not in an image, and what is not annotated in full."""
    rng = np.random.default_rng(0)
    ids = list(CATEGORIES)
    images = [
        {
            "id": image_id,
            "width": size[0],
            "height": size[1],
            "coco_url": f"http://images.cocodataset.org/val2017/{image_id:012d}.jpg",
            "neg_category_ids": ids[number % 3 : number % 3 + 2],
            "not_exhaustive_category_ids": ids[3:] if number % 2 else [],
        }
        for number, (image_id, size) in enumerate(IMAGES.items())
    ]
    annotations = []
    for number in range(12):
        x, y, w, h = (*rng.uniform(0, 20, 2).round(2), *rng.uniform(10, 50, 2).round(2))
        annotations.append(
            {
                "id": number + 1,
                "image_id": list(IMAGES)[number % 3],
                "category_id": ids[number % 4],
                "bbox": [x, y, w, h],
                "area": w * h,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    categories = [{"id": i, "name": f"name {i}", "frequency": f} for i, f in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (coco_root / "lvis").mkdir()
    (coco_root / "lvis" / "lvis_v1_val.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def names(coco_root, truth):
    with registered_at(coco_root):
        yield


def config():
    words = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TEST", "64"]
    return load_config("coco/retinanet_R_50_FPN_1x.yaml", words)


def test_equals_detectron2s_evaluation(names, truth, monkeypatch):
    pytest.importorskip("lvis")
    from detectron2.evaluation.lvis_evaluation import _evaluate_predictions_on_lvis
    from lvis import LVIS

    validate("lvis_v1_val", "evaluation")
    result = evaluate(Finder(truth), config(), "lvis_v1_val", Progress())
    assert {d["category_id"] for d in result.detections} == set(CATEGORIES)
    monkeypatch.setattr(np, "float", float, raising=False)  # what lvis 0.5.3 was written for
    from detectron2.data import MetadataCatalog

    lvis = LVIS(MetadataCatalog.get("lvis_v1_val").json_file)
    detections = [dict(d) for d in result.detections]
    expected = _evaluate_predictions_on_lvis(lvis, detections, "bbox")
    assert 5 < expected["AP"] < 95
    assert list(result.metrics) == [*AP_COLUMNS, *LVIS_COLUMNS]
    for name, value in result.metrics.items():
        assert value == (None if expected[name] < 0 else pytest.approx(expected[name])), name
    named = {k: v for k, v in result.per_class.items() if v is not None}
    assert len(result.per_class) == 1203 and len(named) == len(CATEGORIES)
    assert np.mean(list(named.values())) == pytest.approx(expected["AP"])


def test_one_line_where_the_package_is_missing(names, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)
    with pytest.raises(UsageError, match=r"lvis_v1_val needs .* pip install 'ghm_d2\[lvis\]'"):
        validate("lvis_v1_val", "evaluation")
    with pytest.raises(UsageError, match="pip install"):
        evaluate(torch.nn.Identity(), config(), "lvis_v1_val", Progress())


def test_one_line_where_the_annotations_are_missing(names):
    pytest.importorskip("lvis")
    with pytest.raises(DataError, match=r"lvis_v1_train\.json"):
        validate("lvis_v1_train")
