"""Imports of BCCD and COCO128, and a second opinion: supervision's loaders."""

import pytest
from import_judge import details, load, load_all

from ghm_d2.data.importing.folders import import_folder


def test_bccd_imports_and_its_two_bad_boxes_are_named(real_data, tmp_path):
    report = import_folder(real_data("bccd"), tmp_path / "out")
    assert report["names"] == ["Platelets", "RBC", "WBC"]
    assert {s: c["images"] for s, c in report["splits"].items()} == {
        "train": 205,
        "val": 87,
        "test": 72,
    }
    assert [d["file"] for d in report["dropped"]] == [
        "Annotations/BloodImage_00343.xml",
        "Annotations/BloodImage_00338.xml",
    ]
    assert all("inverted or empty" in detail for detail in details(report))


def test_coco128_imports_whole(real_data, tmp_path):
    report = import_folder(real_data("coco128"), tmp_path / "out")
    assert len(report["names"]) == 80 and report["names"][:2] == ["person", "bicycle"]
    assert [s["images"] for s in report["splits"].values()] == [128, 128]
    assert [s["boxes"] for s in report["splits"].values()] == [929, 898]
    assert report["dropped"] == []


@pytest.mark.filterwarnings("ignore")
def test_clean_folders_are_read_as_supervision_reads_them(voc, yolo, coco, build, tmp_path):
    supervision = pytest.importorskip("supervision")
    read = supervision.DetectionDataset
    theirs = {
        "voc": read.from_pascal_voc(str(voc / "JPEGImages"), str(voc / "Annotations")),
        "yolo": read.from_yolo(
            str(yolo / "images/train"), str(yolo / "labels/train"), str(yolo / "data.yaml")
        ),
        "coco": read.from_coco(str(coco / "images"), str(coco / "train.json")),
    }
    for name, folder in (("voc", voc), ("yolo", yolo), ("coco", coco)):
        import_folder(folder, tmp_path / f"out_{name}")
        # VOC has no split; of the others, train was read.
        out = tmp_path / f"out_{name}"
        ours = load_all(out)[1] if name == "voc" else load(out, "train")[1]
        boxes = [
            (path.split("/")[-1], theirs[name].classes[k], *xyxy)
            for path, found in theirs[name].annotations.items()
            for xyxy, k in zip(found.xyxy.tolist(), found.class_id, strict=True)
        ]
        names = ["cat", "dog"]
        corners = [
            (file.split("/")[-1], names[k - 1], x, y, x + w, y + h) for file, k, x, y, w, h in ours
        ]
        assert [b[:2] for b in sorted(boxes)] == [c[:2] for c in sorted(corners)]
        for b, c in zip(sorted(boxes), sorted(corners), strict=True):
            assert b[2:] == pytest.approx(c[2:], abs=1e-3)
