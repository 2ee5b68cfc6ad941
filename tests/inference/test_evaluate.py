"""AP through faster-coco-eval is the AP of pycocotools, of boxes and of masks."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ghm_d2.config import load_config
from ghm_d2.data.catalog import apply_to_config
from ghm_d2.inference.evaluation.evaluate import evaluate
from ghm_d2.progress import Progress
from ghm_d2.records import AP_COLUMNS


class Guesser(torch.nn.Module):
    """Finds most of the true boxes, shifted, some of another class, and some that are not there.

    Its masks are the true ones rolled by a pixel or two, whatever the box; or it has none.
    """

    def __init__(self, truth: dict, misses: float, masks: bool):
        super().__init__()
        self._rng = np.random.default_rng(0)
        self._misses, self._masks = misses, masks
        self._boxes = {image["id"]: [] for image in truth["images"]}
        for a in truth["annotations"]:
            self._boxes[a["image_id"]].append((*a["bbox"], a["category_id"], a["segmentation"]))

    def forward(self, batch):
        (item,) = batch
        size = (item["height"], item["width"])
        boxes, classes, masks = [], [], []
        for x, y, w, h, category, rle in self._boxes[item["image_id"]] * 2:
            if self._rng.random() < self._misses:
                continue
            x, y = x + self._rng.normal() * w / 6, y + self._rng.normal() * h / 6
            boxes.append([x, y, x + w, y + h])
            classes.append((category - 1 + (self._rng.random() < 0.2)) % 10)
            masks.append(np.roll(coco_mask.decode(rle), self._rng.integers(0, 3), axis=(0, 1)))
        found = Instances(size)
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.tensor(self._rng.random(len(boxes)), dtype=torch.float32)
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        if self._masks:
            found.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *size))
        return [{"instances": found}]


@pytest.fixture(scope="module")
def many_digits(tmp_path_factory) -> str:
    from ghm_d2.data.digits.dataset import DigitsSpec, write

    folder = tmp_path_factory.mktemp("many")
    write(DigitsSpec(train=1, val=25, image_size=(240, 320), objects=(1, 6)), folder)
    return str(folder)


def evaluation(folder: str, misses: float, masks: bool = False):
    name = "mask_rcnn" if masks else "retinanet_focal"
    cfg = load_config(f"configs/quick/{name}.yaml", ["MODEL.DEVICE", "cpu"])
    apply_to_config(cfg, folder)
    with open(f"{folder}/val.json") as file:
        truth = json.load(file)
    return evaluate(Guesser(truth, misses, masks), cfg, cfg.DATASETS.TEST[0], Progress())


def reference_for(folder: str, detections: list[dict], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(f"{folder}/val.json")
        reference = COCOeval(truth, truth.loadRes(detections), kind)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    return reference


def assert_equal(metrics: dict, reference: COCOeval):
    expected = dict(zip(AP_COLUMNS, 100 * reference.stats[:6], strict=True))
    # neither nothing nor everything: a comparison that means something
    assert 5 < expected["AP"] < 80
    for name, value in expected.items():
        assert metrics[name] == (None if value < 0 else pytest.approx(value, abs=1e-6)), name


def test_equals_pycocotools(many_digits):
    result = evaluation(many_digits, misses=0.2)
    assert {*result.detections[0]} == {"image_id", "category_id", "bbox", "score"}
    assert result.mask_metrics == {}
    reference = reference_for(many_digits, copy.deepcopy(result.detections), "bbox")
    assert_equal(result.metrics, reference)
    precision = reference.eval["precision"][:, :, :, 0, -1]  # (iou, recall, class)
    for i in range(10):
        of_class = precision[:, :, i]
        of_class = of_class[of_class > -1]
        expected_ap = pytest.approx(100 * of_class.mean(), abs=1e-6) if of_class.size else None
        assert result.per_class[str(i)] == expected_ap


def test_equals_pycocotools_where_the_data_have_faults_that_coco_has(many_digits, tmp_path):
    """Boxes without height, outside and of no image; a crowd; an image without annotations."""
    with open(f"{many_digits}/val.json") as file:
        truth = json.load(file)
    found = truth["annotations"]
    found[0]["bbox"][3] = 0.0
    found[1]["bbox"][2] = 0.0
    found[2]["bbox"][:2] = [900, 900]
    found[3]["iscrowd"] = 1
    found[:] = [a for a in found if a["image_id"] != truth["images"][7]["id"]]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    for name in ("train.json", "images"):
        (tmp_path / name).symlink_to(f"{many_digits}/{name}")
    result = evaluation(str(tmp_path), misses=0.2)
    assert_equal(result.metrics, reference_for(str(tmp_path), result.detections, "bbox"))
    sound = evaluation(many_digits, misses=0.2)
    assert result.metrics["AP"] < sound.metrics["AP"]


def test_objects_are_counted_by_size(many_digits, tmp_path):
    """The counts are those of pycocotools, which judges no crowd and counts limits twice."""
    with open(f"{many_digits}/val.json") as file:
        truth = json.load(file)
    for annotation, area in zip(truth["annotations"], (32**2, 96**2, 100**2, 96**2), strict=False):
        annotation["area"] = area
    truth["annotations"][3]["iscrowd"] = 1
    (tmp_path / "val.json").write_text(json.dumps(truth))
    for name in ("train.json", "images"):
        (tmp_path / name).symlink_to(f"{many_digits}/{name}")
    result = evaluation(str(tmp_path), misses=0.2)
    judged = reference_for(str(tmp_path), result.detections, "bbox").evalImgs
    sizes = {(0, 1024): "APs", (1024, 9216): "APm", (9216, 1e10): "APl"}
    expected = dict.fromkeys(sizes.values(), 0)
    for of_image in filter(None, judged):
        if (name := sizes.get(tuple(of_image["aRng"]))) is not None:
            expected[name] += int((~np.array(of_image["gtIgnore"], bool)).sum())
    assert result.objects == expected
    assert expected["APm"] > 2 and expected["APl"] == 2


def test_detections_have_the_category_ids_of_the_data(many_digits, tmp_path):
    """They are neither 0, 1, 2 ... nor 1, 2, 3 ... here."""
    with open(f"{many_digits}/val.json") as file:
        truth = json.load(file)
    for category in truth["categories"]:
        category["id"] = 7 * category["id"] + 20
    for annotation in truth["annotations"]:
        annotation["category_id"] = 7 * annotation["category_id"] + 20
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(truth))
    (tmp_path / "images").symlink_to(f"{many_digits}/images")
    cfg = load_config("configs/quick/retinanet_focal.yaml", ["MODEL.DEVICE", "cpu"])
    apply_to_config(cfg, str(tmp_path))
    with open(f"{many_digits}/val.json") as file:
        guesser = Guesser(json.load(file), 0.2, False)
    result = evaluate(guesser, cfg, cfg.DATASETS.TEST[0], Progress())
    assert {d["category_id"] for d in result.detections} == {c["id"] for c in truth["categories"]}
    assert_equal(result.metrics, reference_for(str(tmp_path), result.detections, "bbox"))
    assert result.metrics == evaluation(many_digits, misses=0.2).metrics


def test_masks_equal_pycocotools(many_digits):
    result = evaluation(many_digits, misses=0.2, masks=True)
    assert {*result.detections[0]} == {"image_id", "category_id", "bbox", "score", "segmentation"}
    json.dumps(result.detections)
    of_boxes, of_masks = (
        [{k: v for k, v in d.items() if k != other} for d in result.detections]
        for other in ("segmentation", "bbox")
    )
    assert_equal(result.metrics, reference_for(many_digits, of_boxes, "bbox"))
    assert_equal(result.mask_metrics, reference_for(many_digits, of_masks, "segm"))
    assert result.mask_metrics["AP"] > result.metrics["AP"] + 5  # they are not the same numbers


def test_a_mask_detector_that_finds_nothing_has_a_mask_ap_of_zero(many_digits):
    result = evaluation(many_digits, misses=1.0, masks=True)
    assert result.metrics["AP"] == result.mask_metrics["AP"] == 0


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(many_digits):
    result = evaluation(many_digits, misses=1.0)
    assert result.metrics["AP"] == 0 and result.metrics["AP50"] == 0
    assert result.detections == []
