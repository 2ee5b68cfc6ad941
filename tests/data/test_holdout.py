"""The training split divided for a search, and the name of a data set's content."""

import json
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ghm_d2.data.catalog import classes_of, resolve, validate
from ghm_d2.data.fingerprint import file_fingerprint, fingerprint, shared_images
from ghm_d2.data.holdout import write_fold, write_holdout
from ghm_d2.errors import DataError, UsageError


def images(file: Path) -> dict[int, str]:
    return {i["id"]: i["file_name"] for i in json.loads(file.read_text())["images"]}


def test_held_out_images_are_training_images(digits_folder, tmp_path):
    folder = tmp_path / "divided"
    write_holdout(resolve(digits_folder, "train"), folder)
    train, val = images(folder / "train.json"), images(folder / "val.json")
    assert len(val) == 1 and not train.keys() & val.keys()
    assert train | val == images(Path(digits_folder) / "train.json")
    for split, ids in ("train", train), ("val", val):
        coco = json.loads((folder / f"{split}.json").read_text())
        assert coco["annotations"] and {a["image_id"] for a in coco["annotations"]} <= set(ids)
        name = resolve(str(folder), split)
        validate(name)
        assert classes_of(name) == classes_of(resolve(digits_folder, "train"))


def test_the_division_is_the_same_twice_and_kept(digits_folder, tmp_path, monkeypatch):
    name = resolve(digits_folder, "train")
    for folder in ("a", "b"):
        write_holdout(name, tmp_path / folder)
    kept = (tmp_path / "a" / "val.json").read_bytes()
    assert (tmp_path / "b" / "val.json").read_bytes() == kept
    monkeypatch.setattr("ghm_d2.data.holdout.SEED", 5)
    write_holdout(name, tmp_path / "a")
    assert (tmp_path / "a" / "val.json").read_bytes() == kept
    write_holdout(name, tmp_path / "c")
    assert (tmp_path / "c" / "val.json").read_bytes() != kept


def test_each_image_is_held_out_in_one_fold(digits_folder, tmp_path):
    name = resolve(digits_folder, "train")
    whole, held_out = images(Path(digits_folder) / "train.json"), []
    for fold in range(4):
        write_fold(name, tmp_path / f"{fold}", fold, 4)
        train, val = (images(tmp_path / f"{fold}" / f"{s}.json") for s in ("train", "val"))
        assert train | val == whole and not train.keys() & val.keys()
        held_out += val
    assert sorted(held_out) == sorted(whole)
    with pytest.raises(DataError, match="6 images are too few"):
        write_fold(name, tmp_path / "many", 0, 7)


def test_an_image_that_is_listed_twice_is_in_one_fold(digits_folder, tmp_path):
    coco = json.loads((Path(digits_folder) / "train.json").read_text())
    coco["images"] += [image | {"id": image["id"] + 1000} for image in coco["images"]]
    shutil.copytree(digits_folder, tmp_path / "twice")
    (tmp_path / "twice" / "train.json").write_text(json.dumps(coco))
    write_fold(resolve(str(tmp_path / "twice"), "train"), tmp_path / "fold", 0, 2)
    train, val = (images(tmp_path / "fold" / f"{split}.json") for split in ("train", "val"))
    assert not {*train.values()} & {*val.values()} and len(train) == len(val) == 6


def test_lvis_is_not_divided_because_a_folder_is_judged_by_cocos_ap(tmp_path):
    for write, *fold in (write_holdout,), (write_fold, 0, 2):
        with pytest.raises(UsageError, match=r"lvis_v1_train cannot be divided .* --search-on"):
            write("lvis_v1_train", tmp_path / "divided", *fold)
    assert not list(tmp_path.iterdir())


def test_one_image_cannot_be_divided(digits_folder, tmp_path):
    coco = json.loads((Path(digits_folder) / "train.json").read_text())
    first = coco["images"][0]["id"]
    coco["images"] = coco["images"][:1]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] == first]
    (tmp_path / "train.json").write_text(json.dumps(coco))
    (tmp_path / "images").symlink_to(Path(digits_folder) / "images")
    with pytest.raises(DataError, match="too few"):
        write_holdout(resolve(str(tmp_path), "train"), tmp_path / "divided")


def test_the_fingerprint_follows_the_content_and_not_the_place(digits_folder, tmp_path):
    def train_of(name, change=lambda folder, coco: None):
        shutil.copytree(digits_folder, tmp_path / name)
        file = tmp_path / name / "train.json"
        coco = json.loads(file.read_text())
        change(tmp_path / name / "images", coco)
        file.write_text(json.dumps(coco, separators=(",", ":")) + "\n")
        return fingerprint(resolve(str(tmp_path / name), "train"))

    def larger_image(folder, coco):
        with open(folder / coco["images"][0]["file_name"], "ab") as image:
            image.write(b"\0")

    def moved_box(folder, coco):
        coco["annotations"][0]["bbox"][0] += 1

    before = fingerprint(resolve(digits_folder, "train"))
    assert train_of("copy") == before != fingerprint(resolve(digits_folder, "val"))
    assert len({before, train_of("image", larger_image), train_of("box", moved_box)}) == 3
    # the same file with another content, in one process
    assert train_of("again") == before
    (tmp_path / "again" / "train.json").write_text('{"images": []}')
    assert fingerprint(resolve(digits_folder, "train")) == before


def test_a_file_is_known_by_its_content(tmp_path):
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    a.write_bytes(b"weights")
    b.write_bytes(b"weights")
    assert file_fingerprint(str(a)) == file_fingerprint(str(b)) != str(a)
    b.write_bytes(b"others, longer")
    assert file_fingerprint(str(a)) != file_fingerprint(str(b))
    for name in ("", "pypi", "detectron2://x.pkl"):
        assert file_fingerprint(name) == name


def test_a_link_to_images_that_have_moved_is_mended(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "old")
    write_holdout(resolve(str(tmp_path / "old"), "train"), tmp_path / "divided")
    (tmp_path / "old").rename(tmp_path / "new")
    write_holdout(resolve(str(tmp_path / "new"), "train"), tmp_path / "divided")
    validate(resolve(str(tmp_path / "divided"), "train"))


def test_images_are_shared_by_content_and_unknown_data_with_themselves(digits_folder, tmp_path):
    copied, changed = (shutil.copytree(digits_folder, tmp_path / name) for name in ("a", "b"))
    train, val = (resolve(digits_folder, split) for split in ("train", "val"))
    same = resolve(str(copied), "val")
    assert (shared_images(val, same), shared_images(train, same)) == (3, 0)
    next(changed.glob("images/val/*")).write_bytes(b"another picture")
    assert shared_images(val, resolve(str(changed), "val")) == 2
    for name in ("without_json", "neither"):
        DatasetCatalog.register(name, list)
    try:
        assert shared_images("without_json", "without_json") == 1
        assert shared_images("without_json", "neither") == shared_images("neither", val) == 0
    finally:
        for name in ("without_json", "neither"):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
