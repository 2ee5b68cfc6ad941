"""The training split divided for a search, and the name of a data set's content."""

import json
import shutil
from pathlib import Path

import pytest

from ghm_d2.data.catalog import classes_of, resolve, validate
from ghm_d2.data.fingerprint import fingerprint
from ghm_d2.data.holdout import write_holdout
from ghm_d2.errors import DataError


def images(file: Path) -> dict[int, str]:
    return {i["id"]: i["file_name"] for i in json.loads(file.read_text())["images"]}


def test_held_out_images_are_training_images(digits_folder, tmp_path):
    folder = tmp_path / "divided"
    write_holdout(resolve(digits_folder, "train"), folder, share=0.3)
    train, val = images(folder / "train.json"), images(folder / "val.json")
    assert len(val) == 2 and not train.keys() & val.keys()
    assert train | val == images(Path(digits_folder) / "train.json")
    for split, ids in ("train", train), ("val", val):
        coco = json.loads((folder / f"{split}.json").read_text())
        assert coco["annotations"] and {a["image_id"] for a in coco["annotations"]} <= set(ids)
        name = resolve(str(folder), split)
        validate(name)
        assert classes_of(name) == classes_of(resolve(digits_folder, "train"))


def test_the_division_is_the_same_twice_and_kept(digits_folder, tmp_path):
    name = resolve(digits_folder, "train")
    for folder in ("a", "b"):
        write_holdout(name, tmp_path / folder)
    kept = (tmp_path / "a" / "val.json").read_bytes()
    assert (tmp_path / "b" / "val.json").read_bytes() == kept
    write_holdout(name, tmp_path / "a", seed=5)
    assert (tmp_path / "a" / "val.json").read_bytes() == kept
    write_holdout(name, tmp_path / "c", seed=5)
    assert (tmp_path / "c" / "val.json").read_bytes() != kept


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
    copy = tmp_path / "copy"
    shutil.copytree(digits_folder, copy)
    before = fingerprint(resolve(digits_folder, "train"))
    assert fingerprint(resolve(str(copy), "train")) == before
    assert fingerprint(resolve(str(copy), "val")) != before
    coco = json.loads((copy / "train.json").read_text())
    with open(copy / "images" / coco["images"][0]["file_name"], "ab") as image:
        image.write(b"\0")
    changed = fingerprint(resolve(str(copy), "train"))
    assert changed != before
    coco["annotations"][0]["bbox"][0] += 1
    (copy / "train.json").write_text(json.dumps(coco))
    assert fingerprint(resolve(str(copy), "train")) not in (before, changed)
