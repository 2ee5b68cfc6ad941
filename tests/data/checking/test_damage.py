"""Annotation files damaged at random: every command works or says one line, and never fails."""

import copy
import json
import random

import pytest
from json_places import places

from ghm_d2.data.checking.check import check
from ghm_d2.data.checking.validate import _check as judge_content
from ghm_d2.data.checking.validate import validate_json
from ghm_d2.data.importing.folders import import_folder
from ghm_d2.data.show import contact_sheet, pick
from ghm_d2.errors import GHMError

ODD_VALUES = [
    None, True, -1, 0, 1.5, 1e30, float("inf"), float("nan"), 10**400, "", "x", "a" * 400, "../x",
    [], {}, [1, 2], [[1, 2, 3, 4, 5, 6]], {"size": [1, 1], "counts": "x"}, [1e308] * 4,
]  # fmt: skip
ODD_BYTES = [b"", b"{", b"]", b"null", b"-1", b"1e400", b"NaN", b"\0", b"\xff", b"<a>", b"../"]
ODD_BYTES += [b"9" * 5000, b"\n"]


def survives(call):
    try:
        return call()
    except GHMError as error:
        assert len(str(error).splitlines()) == 1
        return None


@pytest.mark.parametrize("seed", range(40))
def test_a_coco_json_with_odd_values(build, tmp_path, seed):
    rng = random.Random(seed)
    coco = build.coco()
    coco["annotations"][0]["segmentation"] = [[3, 4, 23, 4, 23, 14], [3, 4, 9, 4, 9, 8]]
    coco["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": [500, 20, 48 * 64 - 520]}
    folder = build.data(tmp_path / "d", train=coco, val=build.coco(("v.png",)))
    for _ in range(2):
        *path, last = rng.choice(list(places(coco)))
        inner = coco
        for key in path:
            inner = inner[key]
        inner[last] = copy.deepcopy(rng.choice(ODD_VALUES))
    file, images = folder / "train.json", folder / "images"
    file.write_text(json.dumps(coco))
    survives(lambda: import_folder(folder, tmp_path / "out"))
    survives(lambda: check({"train": (file, images)}))
    survives(lambda: validate_json(str(file), str(images)))
    survives(lambda: contact_sheet(*pick(str(file), str(images), 2)))


@pytest.mark.parametrize("key", ["id", "bbox", "segmentation", "image_id"])
def test_values_nested_about_as_deep_as_the_parser_goes(build, key):
    """A value that the parser still takes may be too deep for the checks after it."""
    coco = build.coco()
    coco["annotations"][0][key] = "deep"
    text = json.dumps(coco)
    for depth in range(700, 1000, 2):
        nested = text.replace('"deep"', "[" * depth + "]" * depth).encode()
        survives(lambda nested=nested: judge_content(nested, "train.json"))


@pytest.mark.parametrize("seed", range(40))
def test_files_with_odd_bytes(build, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "d"
    if seed % 2:
        build.yolo(
            folder, {"train/a": "0 .5 .5 .2 .5\n1 .2 .2 .3 .3 .4 .4", "val/c": "1 .1 .1 .1 .1"}
        )
    else:
        build.voc_image(folder, "a", build.voc_object("dog"))
        build.voc_image(folder, "b", build.voc_object())
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + rng.choice([0, 1, 10, 1000])] = rng.choice(ODD_BYTES)
    file.write_bytes(bytes(data))
    survives(lambda: import_folder(folder, tmp_path / "out"))
