"""A small folder in COCO's exact layout: its files, fields, category ids and known oddities."""

import contextlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

ZERO_HEIGHT = {  # as in train2017; pictures are small but for this one's
    "segmentation": [[296.65, 388.33, 296.65, 388.33, 297.68, 388.33, 297.68, 388.33]],
    "area": 0.0,
    "iscrowd": 0,
    "image_id": 200365,
    "bbox": [296.65, 388.33, 1.03, 0.0],
    "category_id": 58,
    "id": 918,
}
# split -> (its JSON, its folder of images, image id -> (width, height))
SPLITS = {
    "train": (
        "instances_train2017.json",
        "train2017",
        {
            200365: (640, 480),
            550395: (96, 128),
            9: (160, 120),
            25: (120, 160),
            30: (128, 96),
            34: (100, 75),
        },
    ),
    "val": (
        "instances_val2017.json",
        "val2017",
        {139: (160, 107), 285: (147, 160), 632: (128, 97), 724: (75, 100)},
    ),
    "test": (
        "image_info_test2017.json",
        "test2017",
        {1: (160, 120), 16: (160, 96), 19: (120, 160), 57: (160, 117)},
    ),
    "test-dev": ("image_info_test-dev2017.json", "test2017", {16: (160, 96), 57: (160, 117)}),
}
WITHOUT_ANNOTATIONS = (34, 724)  # of train2017, of val2017


def write_coco(root: Path) -> Path:
    """Write coco/ below `root`, which is then what DETECTRON2_DATASETS names; returns `root`.

    80 categories with ids 1 to 90, each with objects in train2017 and val2017; polygons, some of
    several parts; a crowd in each split, whose mask is an uncompressed RLE; an image without
    annotations; and two boxes without height. The JSON files of the test sets have no annotations.
    """
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    categories = [
        {"supercategory": _supercategory(c["name"]), "id": c["id"], "name": c["name"]}
        for c in COCO_CATEGORIES
        if c["isthing"]
    ]
    rng = np.random.default_rng(0)
    (root / "coco" / "annotations").mkdir(parents=True)
    for file, folder, sizes in SPLITS.values():
        (root / "coco" / folder).mkdir(exist_ok=True)
        images = [_image(root / "coco" / folder, i, size, rng) for i, size in sizes.items()]
        coco = {"info": _INFO, "images": images, "licenses": _LICENSES, "categories": categories}
        if file.startswith("instances"):
            coco["annotations"] = _annotations(images, [c["id"] for c in categories], rng)
        (root / "coco" / "annotations" / file).write_text(json.dumps(coco))
    return root


@contextlib.contextmanager
def registered_at(root: Path):
    """Detectron2's names of COCO and LVIS stand for the files below `root`.

    Detectron2 reads DETECTRON2_DATASETS once, when it is imported.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import builtin

    def register(folder):
        theirs = ("coco", "keypoints_coco", "lvis")
        for name in [n for n in DatasetCatalog.list() if n.startswith(theirs)]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        builtin.register_all_coco(str(folder))
        builtin.register_all_lvis(str(folder))

    register(root)
    try:
        yield root
    finally:
        register(builtin._root)


def _image(folder: Path, image_id: int, size: tuple[int, int], rng) -> dict:
    width, height = size
    name = f"{image_id:012d}.jpg"
    pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(folder / name)
    return {
        "license": 1,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{folder.name}/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm7.staticflickr.com/6116/{image_id}_z.jpg",
        "id": image_id,
    }


def _annotations(images: list[dict], categories: list[int], rng) -> list[dict]:
    annotated = [image for image in images if image["id"] not in WITHOUT_ANNOTATIONS]
    found = [
        _annotation(annotated[i % len(annotated)], category, 100_000 + i, rng)
        for i, category in enumerate(categories)
    ]
    found.append(_crowd(annotated[-1], 900_100_000_001))
    for image in annotated:
        if image["id"] == 200365:
            found.append(ZERO_HEIGHT)
        if image["id"] == 550395:
            flat = {"bbox": [9.98, 88.56, 15.52, 0.0], "category_id": 1, "id": 2_206_849}
            line = [[9.98, 88.56, 9.98, 88.56, 25.5, 88.56, 25.5, 88.56]]
            found.append(ZERO_HEIGHT | flat | {"image_id": 550395, "segmentation": line})
    return found


def _annotation(image: dict, category: int, annotation_id: int, rng) -> dict:
    """An octagon, every third time in two parts, with COCO's two decimals."""
    width, height = image["width"], image["height"]
    w, h = (rng.uniform(0.15, 0.6, 2) * (width, height)).round(2)
    x, y = (rng.uniform(0, 1, 2) * (width - w, height - h)).round(2)
    turns = np.arange(8) * np.pi / 4
    parts = 2 if annotation_id % 3 == 0 else 1
    polygons = []
    for part in range(parts):  # side by side
        corners = np.stack([np.cos(turns) + 1 + 2 * part, np.sin(turns) + 1], 1)
        polygon = corners * (w / (2 * parts), h / 2) + (x, y)
        polygons.append(polygon.round(2).flatten().tolist())
    return {
        "segmentation": polygons,
        "area": round(float(w * h) * 0.7, 4),
        "iscrowd": 0,
        "image_id": image["id"],
        "bbox": [float(x), float(y), float(w), float(h)],
        "category_id": category,
        "id": annotation_id,
    }


def _crowd(image: dict, annotation_id: int) -> dict:
    """A crowd of persons: columns 10 to 49, rows 20 to 39, in runs down the columns."""
    height, width = image["height"], image["width"]
    counts = [10 * height + 20, *[20, height - 20] * 39, 20]
    counts.append(height * width - sum(counts))
    return {
        "segmentation": {"counts": counts, "size": [height, width]},
        "area": 800,
        "iscrowd": 1,
        "image_id": image["id"],
        "bbox": [10, 20, 40, 20],
        "category_id": 1,
        "id": annotation_id,
    }


def _supercategory(name: str) -> str:
    return {"person": "person", "car": "vehicle", "dog": "animal"}.get(name, "other")


_INFO = {
    "description": "COCO 2017 Dataset",
    "url": "http://cocodataset.org",
    "version": "1.0",
    "year": 2017,
    "contributor": "COCO Consortium",
    "date_created": "2017/09/01",
}
_LICENSES = [
    {
        "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
        "id": 1,
        "name": "Attribution-NonCommercial-ShareAlike License",
    }
]
