"""COCO JSON files: what an import keeps, drops by name, and refuses."""

import json

import pytest
from import_judge import details, load, load_all
from pycocotools import mask as coco_mask

from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError


def test_coco_ids_and_crowds_are_kept(build, tmp_path):
    found = build.coco(categories=[{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}])
    found["annotations"][0] |= {"category_id": 90, "iscrowd": 1, "area": 55.5, "id": 0}
    found["annotations"][1] |= {"category_id": 7}
    found["annotations"][1]["segmentation"] = [[1, 2, 3], [3, 4, 23, 4, 23, 14]]
    build.data(tmp_path / "coco", train=found, val=found)
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    result, boxes = load(tmp_path / "out", "train")
    assert report["names"] == ["cat", "dog"]
    assert result["categories"] == [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]
    assert boxes == [("a.png", 90, 3, 4, 20, 10), ("b.png", 7, 3, 4, 20, 10)]
    crowd, outlined = result["annotations"]
    assert (crowd["id"], crowd["iscrowd"], crowd["area"]) == (1, 1, 55.5)
    assert outlined["segmentation"] == [[3, 4, 23, 4, 23, 14]]
    assert [i["id"] for i in result["images"]] == [1, 2]
    told = [(d["split"], d["what"], d["detail"]) for d in report["dropped"]]
    assert [t[:2] for t in told] == [("train", "mask"), ("val", "mask")]
    assert told[0][2].startswith("annotation 2: segmentation has a polygon")


def test_coco_masks_stay_as_they_are(build, tmp_path):
    """Polygons of several parts, a list of counts, the text that stands for one, and none."""
    square = [[3, 4, 23, 4, 23, 14, 3, 14], [3.5, 4, 9, 4.25, 9, 8]]
    listed = {"size": [48, 64], "counts": [244, 10, 134, 8, 48 * 64 - 396]}
    packed = {"size": [48, 64], "counts": coco_mask.frPyObjects(listed, 48, 64)["counts"].decode()}
    found = build.coco(("a.png", "b.png", "c.png", "d.png"))
    for annotation, mask in zip(found["annotations"], (square, listed, packed, []), strict=True):
        annotation["segmentation"] = mask
    build.data(tmp_path / "coco", train=found, val=build.coco(("v.png",)))
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    assert report["dropped"] == []
    kept = [a.get("segmentation") for a in load(tmp_path / "out", "train")[0]["annotations"]]
    assert kept == [square, listed, packed, None]


@pytest.mark.parametrize(
    "mask",
    [
        [[3, 4, float("nan"), 4, 23, 14]],
        [[3, 4, 1e300, 4, 23, 14]],
        [3, 4, 23, 4, 23, 14],
        {"size": [48000, 64000], "counts": "PPYo0"},
        {"size": [48, 64], "counts": "~~~~"},
        {"size": [48, 64], "counts": [48 * 64 + 5]},
        {"counts": []},
        "polygon",
    ],
)
def test_a_mask_that_is_none_is_dropped_and_its_box_kept(build, tmp_path, mask):
    found = build.coco()
    found["annotations"][1]["segmentation"] = mask
    build.data(tmp_path / "coco", train=found, val=build.coco(("v.png",)))
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    assert [(d["what"], d["file"]) for d in report["dropped"]] == [("mask", "train.json")]
    boxes = load(tmp_path / "out", "train")[0]["annotations"]
    assert len(boxes) == 2 and not any("segmentation" in box for box in boxes)
    with pytest.raises(DataError, match="annotation 2: segmentation"):
        import_folder(tmp_path / "coco", tmp_path / "strict", strict=True)


def test_coco_in_its_own_layout_is_found(build, tmp_path):
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        found = build.coco((f"{split}.jpg",))
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
        (folder / "annotations" / f"captions_{split}.json").write_text("{}")
        build.picture(folder / split / f"{split}.jpg")
    report = import_folder(folder, tmp_path / "out")
    assert {s: c["images"] for s, c in report["splits"].items()} == {"train": 1, "val": 1}


def test_windows_separators_and_absolute_lists_are_understood(build, yolo, tmp_path, monkeypatch):
    found = build.coco(("sub/a.png", "sub/b.png"))
    folder = build.data(tmp_path / "coco", train=found)
    for image in found["images"]:
        image["file_name"] = image["file_name"].replace("/", "\\")
    (folder / "train.json").write_text(json.dumps(found))
    import_folder(folder, tmp_path / "out")
    assert [b[0] for b in load_all(tmp_path / "out")[1]] == ["sub/a.png", "sub/b.png"]
    (yolo / "list.txt").write_text(f"{yolo}/images/train/a.png\n")
    (yolo / "data.yaml").write_text("names: [a, b]\ntrain: list.txt\nval: images/val")
    monkeypatch.chdir(tmp_path)
    assert import_folder("yolo", "out2")["splits"]["train"]["boxes"] == 1


def test_coco_images_elsewhere_need_to_be_told(build, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train.json").write_text(json.dumps(build.coco()))
    build.picture(tmp_path / "pictures" / "a.png")
    build.picture(tmp_path / "pictures" / "b.png")
    with pytest.raises(DataError, match=r"such as a\.png\) is in .*--images"):
        import_folder(tmp_path / "coco", tmp_path / "out")
    pictures = tmp_path / "pictures"
    report = import_folder(tmp_path / "coco", tmp_path / "out", image_folder=pictures, split=0.5)
    assert report["splits"]["train"]["images"] == 1


def test_coco_faults_are_dropped_and_named(build, tmp_path):
    found = build.coco(("a.png", "b.png", "gone.png", "cut.jpg", "wide.png"))
    found["annotations"][0]["bbox"] = [3, 4, float("nan"), 10]
    found["annotations"][1]["category_id"] = 5
    found["annotations"] += [{"id": 9, "image_id": 77, "category_id": 1, "bbox": [1, 1, 2, 2]}]
    found["images"][4]["width"] = 65
    folder = build.data(tmp_path / "coco", train=found, val=build.coco(("v.png",)))
    (folder / "images" / "gone.png").unlink()
    cut = folder / "images" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    report = import_folder(folder, tmp_path / "out")
    text = "\n".join(details(report))
    for words in (
        "annotation 1: box [3, 4, nan, 10] has values that are not finite",
        "annotation 2: unknown category 5",
        "annotation 9: no image has the id 77",
        "gone.png: no such image",
        "cut.jpg: cannot be decoded",
        "wide.png is 64 x 48 px, but its annotations say 65 x 48",
    ):
        assert words in text
    assert len(report["dropped"]) == 6
    assert report["splits"]["train"] == {"images": 2, "boxes": 0, "background": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "same id"),
        ({"categories": [{"name": "a"}]}, "integer id"),
        ({"images": [{"id": 1, "file_name": "../b.png"}]}, "points outside the image folder"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}]}, "points outside the image folder"),
        ({"images": [{"id": 1, "file_name": "a\0.png"}]}, "not a valid name of an image"),
        ({"images": []}, "no images"),
    ],
)
def test_coco_that_cannot_be_understood_is_refused(build, tmp_path, change, words):
    (tmp_path / "coco").mkdir()
    build.picture(tmp_path / "coco" / "a.png")
    (tmp_path / "coco" / "train.json").write_text(json.dumps(build.coco() | change))
    with pytest.raises(DataError, match=words):
        import_folder(tmp_path / "coco", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ('{\n"images": [,', r"train\.json:2: not valid"),
        ("[" * 99999, "not valid"),
    ],
)
def test_malformed_json_is_refused_with_its_name(tmp_path, text, words):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train.json").write_text(text)
    with pytest.raises(DataError, match=rf"train\.json.*{words}|{words}"):
        import_folder(tmp_path / "coco", tmp_path / "out")
