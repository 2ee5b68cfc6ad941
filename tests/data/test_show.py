"""The contact sheet: masks are tinted, and a mask that is none harms nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from ghm_d2.data.masks import encode
from ghm_d2.data.show import contact_sheet, pick

GREY = 100


@pytest.fixture
def sheet(tmp_path):
    """The drawn part of the sheet of one grey image of 160 x 80 px, twice as large."""
    path = tmp_path / "a.png"
    Image.fromarray(np.full((80, 160, 3), GREY, np.uint8)).save(path)

    def draw(segmentation):
        box = {"bbox": [0, 0, 160, 80], "category_id": 1, "segmentation": segmentation}
        drawn = np.asarray(contact_sheet([(path, "", [box])], {1: "a"}, columns=1, cell=320))
        return drawn[8 : 8 + 160, 8 : 8 + 320].astype(int)

    return draw


def mask():
    """A frame around a hole."""
    ink = np.zeros((80, 160), bool)
    ink[30:70, 40:120] = True
    ink[45:55, 60:100] = False
    return ink


def test_a_mask_is_tinted_and_its_hole_is_not(sheet):
    tinted = (sheet(encode(mask())) != GREY).any(2)
    inside = np.kron(mask(), np.ones((2, 2), bool))
    part = slice(50, 150), slice(10, 310)  # off the frame and the label
    assert np.array_equal(tinted[part], inside[part])


def test_polygons_are_tinted_too(sheet):
    tinted = (sheet([[40, 30, 120, 30, 120, 70, 40, 70]]) != GREY).any(2)
    assert tinted[62:138, 82:238].all() and not tinted[62:138, 10:78].any()


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        "mask",
        [[1, 2, 3]],
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        {"size": [160, 80], "counts": [12800]},
        {"size": [80, 160], "counts": "~~~"},
    ],
)
def test_what_is_no_mask_is_left_out(sheet, segmentation):
    assert np.array_equal(sheet(segmentation), sheet(None))


def test_images_of_lvis_are_found_by_their_addresses(tmp_path):
    image = {"id": 1, "coco_url": "http://images.org/val2017/1.jpg", "width": 9, "height": 9}
    coco = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "val.json").write_text(json.dumps(coco))
    ((file, caption, _),), _ = pick(str(tmp_path / "val.json"), "root", 1)
    assert (file.as_posix(), caption) == ("root/val2017/1.jpg", "val2017/1.jpg")
