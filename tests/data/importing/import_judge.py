"""Sound folders of annotations, an imported folder read back, and the judgement of an import."""

import json
from pathlib import Path

from detectron2.data.datasets import load_coco_json
from PIL import Image

from ghm_d2.data.checking.check import check
from ghm_d2.data.checking.validate import validate_json
from ghm_d2.data.coco_json import SPLITS, is_plain
from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError, UsageError

# What is wrong with the pictures or in having no boxes, which no importer can mend.
OF_THE_DATA = {"leakage", "empty"}
PICTURES = {"coco": "images", "voc": "JPEGImages", "yolo": "images"}
SOUND = {
    "coco": {
        "train.json": """{"images": [
  {"id": 1, "file_name": "a.png", "width": 16, "height": 12},
  {"id": 2, "file_name": "b.png", "width": 16, "height": 12}],
 "annotations": [
  {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0,
   "segmentation": [[1, 2, 6, 2, 6, 8]]},
  {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0.5, 1e0, 9, 9], "iscrowd": 1,
   "segmentation": {"size": [12, 16], "counts": [20, 30, 142]}},
  {"id": 3, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4],
   "segmentation": {"size": [12, 16], "counts": "d0n0^4"}}],
 "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "pet"}]}""",
    },
    "voc": {
        "Annotations/a.xml": """<annotation><filename>a.png</filename>
<size><width>16</width><height>12</height><depth>3</depth></size>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8.5</ymax></bndbox></object>
</annotation>""",
        "Annotations/b.xml": """<?xml version="1.0" encoding="utf-8"?>
<annotation><object><name>dog</name>
<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>
</annotation>""",
        "ImageSets/Main/train.txt": "a\nb -1\n",
        "labels.txt": "cat\ndog\n",
    },
    "yolo": {
        "data.yaml": """path: .
train: images
val: [val.txt]
nc: 2
names: {0: cat, 1: "dog"}
""",
        "labels/a.txt": "0 0.5 0.5 0.25 0.5\n1 .5 .5 .25 .5 .9\n",
        "labels/b.txt": "1 0.1 0.1 0.6 0.1 0.6 0.7\n",
        "val.txt": "./images/a.png\nimages\\b.png\n",
    },
}
WORDS = (
    *("null", "true", "NaN", "-Infinity", "1e999", "-1", "0", "9" * 400, "[]", "{}", "[[[[", '""'),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[2J"', "../x", "/x", ".", "..\\", "\\n", "&amp;", "&#0;"),
    *("<!DOCTYPE a>", "<![CDATA[", "encoding='utf-16'", "<object>", "</object>", "!!python/none"),
    *("&a [*a, *a]", "<<: *a", "? ", "kpt_shape", "valid", "inf", "nan", "\0", "1_0", "\u0661"),
)


def make_folder(kind: str, folder: Path, contents: dict[str, bytes]) -> Path:
    """A folder with two pictures of 16 x 12 px, and files of these contents."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / PICTURES[kind]).mkdir()
    for name, shade in (("a", 60), ("b", 200)):
        Image.new("RGB", (16, 12), (shade, 0, 0)).save(folder / PICTURES[kind] / f"{name}.png")
    return folder


def judge_import(source: Path, kind: str) -> bool:
    """Import `source` into out/ beside it. Returns whether that went well.

    Raises: AssertionError, or what the importer let through, where neither a sound data set nor an
    error of ours in one line comes of it, or a file elsewhere.
    """
    before, output = files_below(source.parent), source.parent / "out"
    try:
        names = import_folder(source, output, kind=kind)["names"]
    except (DataError, UsageError) as error:
        judge_message(error)
        assert files_below(source.parent) == before, "a refused import left files"
        return False
    assert all(map(is_plain, names)), f"class names that are no plain text: {names}"
    written = {path for path in files_below(source.parent) if path.is_relative_to(output)}
    assert files_below(source.parent) - written == before, "a file outside the output"
    assert all(p.resolve().is_relative_to(source.parent) for p in written), "a link to elsewhere"
    images = output / "images"
    splits = {s: (output / f"{s}.json", images) for s in SPLITS if output / f"{s}.json" in written}
    assert splits, "no split"
    report = check(splits)
    errors = report.errors
    assert {e.kind for e in errors} <= OF_THE_DATA, f"errors in the output: {errors}"
    for split in splits.keys() - {p.split for p in report.problems if p.kind == "empty"}:
        validate_json(str(splits[split][0]), str(images))
        load_coco_json(str(splits[split][0]), str(images))
    return True


def files_below(folder: Path) -> set[Path]:
    """Return everything in a folder that is not a folder."""
    return {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def judge_message(error: Exception) -> None:
    """Check that a message is one line, free of commands to the terminal from the files."""
    assert str(error) and is_plain(str(error)), f"not one plain line: {str(error)!r}"


def load(folder, split):
    """Return an imported split's JSON, and its boxes: (image, category id, x, y, w, h), sorted."""
    coco = json.loads((folder / f"{split}.json").read_text())
    names = {i["id"]: i["file_name"] for i in coco["images"]}
    boxes = sorted(
        (names[a["image_id"]], a["category_id"], *a["bbox"]) for a in coco["annotations"]
    )
    return coco, boxes


def load_all(folder):
    """Return annotations and boxes of train and val, for tests that are not about the split."""
    splits = [s for s in ("train", "val") if (folder / f"{s}.json").exists()]
    found = [load(folder, split) for split in splits]
    annotations = [a for coco, _ in found for a in coco["annotations"]]
    return annotations, sorted(box for _, boxes in found for box in boxes)


def details(report):
    """Return a line "FILE: DETAIL" for each thing that an import dropped."""
    return [f"{d['file']}: {d['detail']}" for d in report["dropped"]]
