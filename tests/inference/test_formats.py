"""The files that `ghm predict` writes for other tools, read back as they read them."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from detectron2.data.datasets import load_coco_json

from ghm_d2.inference.formats import FORMATS, Found, distinct_stems

NAMES = ["cat", '=1+1 "& <b>']


@pytest.fixture
def images(tmp_path) -> list[Found]:
    found = [
        {"image_id": 0, "category_id": 1, "bbox": [10.0, 20.0, 30.0, 40.0], "score": 0.9},
        {"image_id": 0, "category_id": 0, "bbox": [-5.0, 0.0, 25.0, 100.0], "score": 0.5},
    ]
    return [
        Found(tmp_path / "a" / "my photo&.jpg", (200, 100), found),
        Found(tmp_path / "b" / "photo.jpg", (50, 50), []),
    ]


def test_coco_is_a_data_set_with_scores(images, tmp_path):
    FORMATS["coco"](images, NAMES, tmp_path)
    items = load_coco_json(str(tmp_path / "predictions.json"), "", "predicted")
    assert [(i["width"], i["height"]) for i in items] == [(200, 100), (50, 50)]
    assert [a["category_id"] for a in items[0]["annotations"]] == [1, 0] and len(items) == 2
    data = json.loads((tmp_path / "predictions.json").read_text())
    assert [a["score"] for a in data["annotations"]] == [0.9, 0.5]
    assert data["annotations"][0]["area"] == 1200


def test_yolo_has_shares_of_the_image_within_it(images, tmp_path):
    FORMATS["yolo"](images, NAMES, tmp_path)
    lines = (tmp_path / "labels" / "my photo&.txt").read_text().splitlines()
    values = [[float(v) for v in line.split()] for line in lines]
    assert values[0] == [1, 0.125, 0.4, 0.15, 0.4, 0.9]
    assert values[1] == [0, 0.05, 0.5, 0.1, 1.0, 0.5]  # cut at the border
    assert (tmp_path / "labels" / "photo.txt").read_text() == ""
    assert (tmp_path / "classes.txt").read_text().splitlines() == NAMES


def test_csv_has_a_row_a_detection_and_no_formula(images, tmp_path):
    FORMATS["csv"](images, NAMES, tmp_path)
    with open(tmp_path / "predictions.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["class"] == "'" + NAMES[1] and second["class"] == "cat"
    assert [first[k] for k in ("x", "y", "width", "height")] == ["10.00", "20.00", "30.00", "40.00"]
    assert Path(first["file"]) == images[0].file


def test_label_studio_has_boxes_to_correct(images, tmp_path):
    FORMATS["label-studio"](images, NAMES, tmp_path)
    first, second = json.loads((tmp_path / "label_studio.json").read_text())
    assert first["data"]["image"].startswith("/data/local-files/?d=")
    assert first["data"]["image"].endswith("a/my%20photo%26.jpg")
    (prediction,) = first["predictions"]
    box = prediction["result"][0]
    assert box["type"] == "rectanglelabels" and box["original_width"] == 200
    shown = [box["value"][k] for k in ("x", "y", "width", "height")]
    assert shown == pytest.approx([5, 20, 15, 40])
    assert box["value"]["rectanglelabels"] == [NAMES[1]]
    assert second["predictions"][0]["result"] == []
    view = ElementTree.parse(tmp_path / "label_config.xml").getroot()
    assert [label.get("value") for label in view.iter("Label")] == NAMES
    names = {view.find("RectangleLabels").get("name"), view.find("Image").get("name")}
    assert names == {box["from_name"], box["to_name"]}


def test_fiftyone_finds_each_image(images, tmp_path):
    FORMATS["fiftyone"](images, NAMES, tmp_path)
    labels = json.loads((tmp_path / "labels.json").read_text())["labels"]
    files = json.loads((tmp_path / "data.json").read_text())
    assert labels.keys() == files.keys() == {"my photo&", "photo"}
    assert labels["my photo&"][0]["bounding_box"] == pytest.approx([0.05, 0.2, 0.15, 0.4])
    assert (
        labels["my photo&"][0]["label"] == NAMES[1] and Path(files["my photo&"]) == images[0].file
    )


def test_no_name_is_given_twice():
    files = [Path(name) for name in ("a/x.png", "b/x.png", "x_2.png", "c/x.jpg")]
    stems = distinct_stems(files)
    assert len(set(stems)) == 4 and stems[0] == "x"
