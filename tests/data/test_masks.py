"""Segmentations: what is decoded stands in the file, and nothing else gets to the C code."""

import random

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from ghm_d2.data.masks import decode, encode, mask_fault, moved

W, H = 64, 48
ALL = [W * H]


def blob(rng, height, width):
    """A mask of a few rectangles, with a hole now and then."""
    mask = np.zeros((height, width), bool)
    for value in (True, True, False):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = value
    mask[rng.integers(0, height), rng.integers(0, width)] = True
    return mask


def run_lengths(mask):
    """One pixel at a time, column by column."""
    runs, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@pytest.mark.parametrize("seed", range(30))
def test_a_mask_comes_back_and_has_no_fault(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 900 if seed < 3 else 60, 2))
    mask = rng.random((height, width)) < 0.5 if seed % 3 == 0 else blob(rng, height, width)
    mask[0, 0] = seed % 2 or not mask.any()
    rle, listed = encode(mask), {"size": [height, width], "counts": run_lengths(mask)}
    for segmentation in (rle, listed, rle | {"counts": rle["counts"].encode()}):
        assert mask_fault(segmentation, width, height) is None
        assert np.array_equal(decode(segmentation, height, width), mask)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_text_is_decoded_only_where_it_is_sound(seed):
    """pycocotools refuses some of the others, and decodes some to what stands in no file."""
    rng = np.random.default_rng(seed)
    sound = encode(blob(rng, H, W))
    for _ in range(200):
        text = list(sound["counts"])
        text[rng.integers(len(text))] = chr(rng.integers(48, 112))
        rle = {"size": [H, W], "counts": "".join(text)}
        if mask_fault(rle, W, H) is None:
            assert encode(coco_mask.decode(rle).astype(bool))["size"] == [H, W]
            assert coco_mask.area(rle) == coco_mask.decode(rle).sum() > 0


@pytest.mark.parametrize(
    ("rle", "words"),
    [
        ({"size": [H, W], "counts": [W * H]}, "covers no pixel"),
        ({"size": [H, W], "counts": [0, W * H + 1]}, "add up"),
        ({"size": [H, W], "counts": [0, W * H - 1]}, "add up"),
        ({"size": [H, W], "counts": [-5, W * H + 5]}, "add up"),
        ({"size": [H, W], "counts": [1.0, W * H - 1]}, "add up"),
        ({"size": [H, W], "counts": [10**400]}, "add up"),
        ({"size": [H, W], "counts": [[1], 2]}, "add up"),
        ({"size": [H, W], "counts": []}, "add up"),
        ({"size": [H, W], "counts": ""}, "add up"),
        ({"size": [H, W], "counts": "\u00e9\u00e9"}, "add up"),
        ({"size": [H, W], "counts": "oooooooooooooooo0"}, "add up"),
        ({"size": [H, W], "counts": "o"}, "add up"),
        ({"size": [H, W], "counts": None}, "add up"),
        ({"size": [H, W]}, "add up"),
        ({"size": [W, H], "counts": ALL}, "size"),
        ({"size": [10**9, 10**9], "counts": "PPYo0"}, "size"),
        ({"size": [float(H), float(W)], "counts": ALL}, "size"),
        ({"size": "large", "counts": ALL}, "size"),
        ({"counts": ALL}, "size"),
        ({}, "size"),
    ],
)
def test_an_rle_that_is_none(rle, words):
    assert words in mask_fault(rle, W, H)


def test_an_image_too_large_for_masks():
    side = 10**6
    assert "too large" in mask_fault({"size": [side, side], "counts": [0, side**2]}, side, side)
    assert "too large" in mask_fault([[0, 0, side, 0, side, side]], side, side)


def test_polygons_are_filled_together():
    """A rectangle has the pixels between its sides; two make one mask."""
    mask = decode([[2, 3, 12, 3, 12, 9, 2, 9], [20, 3, 25, 3, 25, 9, 20, 9]], H, W)
    expected = np.zeros((H, W), bool)
    expected[3:9, 2:12] = expected[3:9, 20:25] = True
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("polygons", "words"),
    [
        ([[1, 2, 3, 4]], "three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three points"),
        ([1, 2, 3, 4, 5, 6], "three points"),
        ([[1, 2, 3, 4, 5, 6], None], "three points"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite"),
        ([[1, 2, 3, 4, 5, float("inf")]], "finite"),
        ([[1, 2, 3, 4, 5, 10**400]], "finite"),
        ([[1, 2, 3, 4, 5, "6"]], "finite"),
        ([[1, 2, 3, 4, 5, 8e8]], "far outside"),
        ([[-70, 2, 3, 4, 5, 6]], "far outside"),
        ([[0, 0, 60, 40] * 1000], "times the perimeter"),
        ([], "neither"),
        ("polygon", "neither"),
        (7, "neither"),
    ],
)
def test_polygons_that_are_none(polygons, words):
    assert words in mask_fault(polygons, W, H)


def verdict(polygon):
    """Return the word that `mask_fault` is to say of a polygon, number by number; "" for none."""
    for value in polygon:
        if not isinstance(value, (int, float)) or not abs(value) < 1e9:  # no NaN is
            return "finite"
    for i, value in enumerate(polygon):
        side = (W, H)[i % 2]
        if not -side <= value <= 2 * side:
            return "far outside"
    length = 0.0
    for i in range(2, len(polygon)):
        length += abs(polygon[i] - polygon[i - 2])
    return "times the perimeter" if length > 100 * 2 * (W + H) else ""


ODD = [float("nan"), float("inf"), -float("inf"), 1e9, -(10**9), 10**400, 10**30, 1e308]
ODD += ["6", None, [1], {}, 2 * W + 1, -W - 1, 2 * H + 1, -H - 1]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("error")
def test_polygons_are_judged_number_by_number(seed):
    rng = random.Random(seed)
    seen = set()
    for _ in range(100):
        points = rng.choice([3, 4, 40, 400])
        polygon = [
            rng.choice([int, float])(rng.uniform(-side, 2 * side))
            for _ in range(points)
            for side in (W, H)
        ]
        if rng.random() < 0.5:
            polygon[rng.randrange(len(polygon))] = rng.choice(ODD)
        expected, fault = verdict(polygon), mask_fault([polygon], W, H)
        assert expected in fault if expected else fault is None, (expected, fault)
        seen.add(expected)
    assert seen == {"", "finite", "far outside", "times the perimeter"}


def test_polygons_may_leave_the_image_a_little():
    assert mask_fault([[-3, -3, 70, -3, 70, 50, -3, 50]], W, H) is None


def tight(mask):
    ys, xs = np.nonzero(mask)
    return [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]


@pytest.mark.parametrize("seed", range(30))
def test_a_mask_moves_with_its_box(seed):
    rng = np.random.default_rng(seed)
    mask = blob(rng, H, W)
    box = tight(mask)
    w, h = (int(rng.integers(max(1, side * 0.6), side + 1)) for side in box[2:])
    to = [int(rng.integers(0, W - w + 1)), int(rng.integers(0, H - h + 1)), w, h]
    assert tight(decode(moved(encode(mask), box, to), H, W)) == to
    assert moved(encode(mask), box, box) == encode(mask)


def test_a_mask_of_twice_the_size_has_four_pixels_for_one():
    ink = np.array([[0, 1, 0], [1, 0, 1], [1, 1, 0]], bool)
    mask = np.zeros((H, W), bool)
    mask[5:8, 4:7] = ink
    large = decode(moved(encode(mask), [4, 5, 3, 3], [20, 10, 6, 6]), H, W)
    assert np.array_equal(large[10:16, 20:26], np.kron(ink, np.ones((2, 2), bool)))
    assert large.sum() == 4 * ink.sum()
