"""AP on resamples of the images is the AP that pycocotools gives of these images."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ghm_d2.inference.evaluation.bootstrap import weighted_ap

CLASSES, IMAGES = 3, 12


def boxes_of(rng, image: int) -> list[dict]:
    """Return up to five boxes; class 3 is in the last images alone, a crowd in each third."""
    found = []
    for k in range(int(rng.integers(0, 6))):
        x, y, w, h = rng.uniform(5, 60, 4)
        kind = int(rng.integers(1, 3)) if image < 9 else 3
        crowd = int(k == 0 and image % 3 == 0)
        found.append(
            {"image_id": image, "category_id": kind, "bbox": [x, y, w, h], "area": w * h}
            | {"iscrowd": crowd}
        )
    return found


@pytest.fixture(scope="module")
def judged() -> tuple[dict, list[dict]]:
    """A data set of `IMAGES` images, and detections: shifted boxes, some twice, some nowhere."""
    rng = np.random.default_rng(3)
    ids = [100 - 7 * i for i in range(IMAGES)]  # not in order
    annotations, detections = [], []
    for i, image in enumerate(ids):
        for box in boxes_of(rng, i):
            annotations.append(box | {"image_id": image, "id": len(annotations) + 1})
            for _ in range(int(rng.integers(0, 3))):
                x, y, w, h = box["bbox"]
                moved = [x + rng.normal() * w / 8, y + rng.normal() * h / 8, w, h]
                row = {"image_id": image, "category_id": box["category_id"], "bbox": moved}
                detections.append(row | {"score": rng.random()})
        wrong = {"image_id": image, "category_id": 1 + i % CLASSES, "bbox": [0, 0, 20, 20]}
        detections.append(wrong | {"score": rng.random()})
    images = [{"id": i, "width": 130, "height": 130} for i in ids]
    categories = [{"id": k + 1, "name": str(k)} for k in range(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def coco(dataset: dict) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
    return truth


def reference_ap(dataset: dict, detections: list[dict]) -> float:
    """Return the AP that pycocotools computes."""
    truth = coco(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    return 100 * found.stats[0]


def repeated(judged: tuple[dict, list[dict]], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """The data with each image as often in them as its weight says, under ids of their own."""
    dataset, detections = judged
    images, annotations, found = [], [], []
    for weight, image in zip(weights, sorted(i["id"] for i in dataset["images"]), strict=True):
        for copied in range(weight):
            own = {"image_id": 1000 * copied + image}
            images.append({"id": own["image_id"], "width": 130, "height": 130})
            there = [a for a in dataset["annotations"] if a["image_id"] == image]
            annotations += [a | own | {"id": 1000 * copied + a["id"]} for a in there]
            found += [d | own for d in detections if d["image_id"] == image]
    return dataset | {"images": images, "annotations": annotations}, found


def test_each_image_once_is_pycocotools(judged):
    (ap,) = weighted_ap(coco(judged[0]), judged[1], np.ones((1, IMAGES), int))
    assert 5 < ap < 80
    assert ap == pytest.approx(reference_ap(*judged), abs=1e-9)


def test_a_resample_is_pycocotools_on_the_images_repeated(judged):
    """One of them has none of the last images, and so no box of class 3."""
    rng = np.random.default_rng(0)
    weights = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 5)
    ids = sorted(image["id"] for image in judged[0]["images"])
    weights[0, [ids.index(100 - 7 * i) for i in (9, 10, 11)]] = 0
    found = weighted_ap(coco(judged[0]), judged[1], weights)
    expected = [reference_ap(*repeated(judged, row)) for row in weights]
    assert found == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) == 5


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined(judged):
    weights = np.array([np.ones(IMAGES, int), np.zeros(IMAGES, int)])
    for detections in (judged[1], []):
        found = weighted_ap(coco(judged[0]), detections, weights)
        assert (found[0] > 0) == bool(detections) and np.isnan(found[1])
