"""Builders of tiny data sets with real image files, and fixtures that many tests of data share."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ghm_d2.data import catalog
from ghm_d2.data.digits.dataset import DigitsSpec


def picture(path: Path, width: int = 64, height: int = 48, seed: int | None = None) -> Path:
    """An image file whose content differs by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode()) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def voc_object(name="cat", box=(5, 6, 20, 30), more="") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def voc_image(folder: Path, stem: str, *objects: str, size=(64, 48), image=True) -> Path:
    """Write one image of a VOC folder with its XML, and return the XML's path."""
    if image:
        picture(folder / "JPEGImages" / f"{stem}.jpg")
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    name = f"<filename>{stem}.jpg</filename>"
    path = folder / "Annotations" / f"{stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{name}{sides}{''.join(objects)}</annotation>")
    return path


def yolo_folder(folder: Path, labels: dict[str, str | None], names=("cat", "dog"), yaml="") -> Path:
    """Build a YOLO folder. labels: "train/a" -> the text of its label file, or None for no file."""
    for name, text in labels.items():
        picture(folder / "images" / f"{name}.png")
        if text is not None:
            path = folder / "labels" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    splits = sorted({name.split("/")[0] for name in labels})
    lines = [f"names: {list(names)}", *(f"{split}: images/{split}" for split in splits)]
    (folder / "data.yaml").write_text(yaml or "\n".join(lines))
    return folder


def coco_dict(images=("a.png", "b.png"), **changes) -> dict:
    """A sound COCO JSON: one box an image, two categories."""
    sound = {
        "images": [
            {"id": i, "file_name": name, "width": 64, "height": 48}
            for i, name in enumerate(images, 1)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + (i % 2), "bbox": [3, 4, 20, 10]}
            | {"area": 200, "iscrowd": 0}
            for i in range(1, len(images) + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return sound | changes


def data_folder(folder: Path, **splits: dict) -> Path:
    """A folder as `ghm data import` leaves it: SPLIT.json files and their images."""
    for split, coco in (splits or {"train": coco_dict(), "val": coco_dict(("c.png",))}).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps(coco))
        for image in coco["images"]:
            picture(folder / "images" / image["file_name"])
    return folder


class Build:
    """The builders above, for tests to reach through one fixture."""

    picture = staticmethod(picture)
    voc_object = staticmethod(voc_object)
    voc_image = staticmethod(voc_image)
    yolo = staticmethod(yolo_folder)
    coco = staticmethod(coco_dict)
    data = staticmethod(data_folder)


@pytest.fixture
def build() -> type[Build]:
    return Build


@pytest.fixture
def real_data():
    """A folder of the real data kept beside a checkout, not in it; the test skips without it."""

    def find(name: str) -> Path:
        path = Path(__file__).parents[2].parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"real data {name} is not beside this checkout")
        return path

    return find


@pytest.fixture
def voc(tmp_path, build):
    folder = tmp_path / "voc"
    build.voc_image(folder, "a", build.voc_object("dog", (1, 1, 10, 20)))
    build.voc_image(folder, "b", build.voc_object("cat", (5, 6, 64, 48)))
    build.voc_image(folder, "c")
    return folder


@pytest.fixture
def yolo(tmp_path, build):
    labels = {"train/a": "0 0.5 0.5 0.25 0.5\n", "train/b": "", "val/c": "1 0.1 0.1 0.1 0.1"}
    return build.yolo(tmp_path / "yolo", labels)


@pytest.fixture
def coco(tmp_path, build):
    return build.data(tmp_path / "coco")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Tiny generated data in a cache of the test's own, and a clean catalog afterwards."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    tiny = DigitsSpec(train=3, val=2, image_size=(64, 64), side=(8, 20))
    monkeypatch.setattr(catalog.digits, "DigitsSpec", lambda: tiny)
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
