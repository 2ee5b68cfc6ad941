"""Random crops, canvases and colours stay within what SSD and YOLOv3 publish."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from pictures import noise, seed
from PIL import Image

from ghm_d2.data.loading.augment import Expand, IoUCrop, Place, SSDColour, YOLOColour, adjust_hsv


def test_ssd_expands_every_other_picture_up_to_four_times():
    """SSD, section 3.6: on a canvas of the mean colour, of 16 times the size at most."""
    seed(0)
    expand, image = Expand((10.0, 20.4, 30.6)), noise(30, 50)
    ratios, offsets = [], []
    for _ in range(400):
        transform = expand.get_transform(image)
        canvas = transform.apply_image(image)
        ratios.append(canvas.shape[1] / 50)
        assert abs(canvas.shape[0] / 30 - ratios[-1]) < 0.04
        x, y = transform.apply_coords(np.zeros((1, 2)))[0].astype(int) if ratios[-1] > 1 else (0, 0)
        assert (canvas[y : y + 30, x : x + 50] == image).all()
        rest = np.ones(canvas.shape[:2], bool)
        rest[y : y + 30, x : x + 50] = False
        assert (canvas[rest] == (10, 20, 31)).all()
        offsets += [x / max(canvas.shape[1] - 50, 1)] if ratios[-1] > 2 else []
    assert 0.4 < np.mean(np.array(ratios) == 1) < 0.6
    assert 3.9 < max(ratios) <= 4
    assert min(offsets) < 0.05 and max(offsets) > 0.95


def test_a_large_picture_is_shrunk_before_it_is_expanded():
    seed(1)
    expand, image = Expand((0.0,) * 3, longest=100), noise(40, 60)
    shapes = [expand.get_transform(image).apply_image(image).shape for _ in range(50)]
    assert max(map(max, shapes)) <= 100
    assert any(shape[1] > 90 for shape in shapes)


def iou(a, b):
    """Return the IoU of two boxes x0, y0, x1, y1."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    overlap = max(sides[0], 0) * max(sides[1], 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return overlap / (sum(areas) - overlap)


def test_ssd_crops():
    """SSD, section 2.2: a side of 0.3 to 1, an aspect of 0.5 to 2, some object's centre inside."""
    seed(0)
    crop, image = IoUCrop(), noise(100, 120)
    boxes = np.array([[10, 10, 60, 70], [80, 50, 110, 95]], np.float32)
    whole, best = 0, []
    for _ in range(200):
        transform = crop.get_transform(image, boxes)
        if isinstance(transform, T.NoOpTransform):
            whole += 1
            continue
        x, y, w, h = transform.x0, transform.y0, transform.w, transform.h
        assert 0 <= x <= x + w <= 120 and 0 <= y <= y + h <= 100
        assert w >= 0.3 * 120 - 1 and h >= 0.3 * 100 - 1
        assert 0.5 <= w / h <= 2
        centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
        assert any(x < cx < x + w and y < cy < y + h for cx, cy in centres)
        best.append(max(iou(b, (x, y, x + w, y + h)) for b in boxes))
    assert 0.1 < whole / 200 < 0.3  # a seventh, and more where no crop fits
    assert min(best) < 0.2 and max(best) > 0.7  # which crops drawn at will hardly reach


def test_ssd_does_not_look_for_a_crop_without_objects():
    """Nothing is drawn, where torchvision would draw until it gives up."""
    seed(0)
    before = torch.get_rng_state()
    for _ in range(10):
        transform = IoUCrop().get_transform(noise(40, 60), np.zeros((0, 4), np.float32))
        assert isinstance(transform, T.NoOpTransform)
    assert torch.equal(torch.get_rng_state(), before)


def test_ssd_changes_contrast_before_or_after_the_other_colours():
    """Like weiliu89/caffe's ApplyDistort: second or last, each in every other picture."""
    seed(0)
    colour, second = SSDColour(), []
    for _ in range(400):
        brightness, *rest = (type(t) for t in colour.get_transform(noise(4, 4)).transforms)
        assert brightness is T.BlendTransform
        assert sorted(t.__name__ for t in rest) == ["BlendTransform", "ColorTransform"]
        second.append(rest[0] is T.BlendTransform)
    assert 0.4 < np.mean(second) < 0.6


def test_ssd_distorts_colours_as_published():
    """Brightness by 32 at most, contrast by 0.5 to 1.5, each in every other picture."""
    seed(0)
    colour, grey = SSDColour(), np.full((1, 1, 3), 100, np.uint8)  # neither hue nor saturation
    values = [int(colour.get_transform(grey).apply_image(grey)[0, 0, 0]) for _ in range(1000)]
    assert (100 - 32) * 0.5 - 2 <= min(values) < 40 and 180 < max(values) <= (100 + 32) * 1.5
    assert 0.2 < np.mean(np.array(values) == 100) < 0.3
    red = np.array([[[200, 60, 60]]], np.uint8)
    changed = [colour.get_transform(red).apply_image(red)[0, 0] for _ in range(300)]
    assert any(b > g for _, g, b in changed) and any(g > b for _, g, b in changed)


def test_yolo_distorts_colours_as_published():
    """darknet's yolov3.cfg: hue by a tenth of a turn, saturation and exposure by 1.5 or 1/1.5."""
    seed(0)
    colour, red = YOLOColour(), np.array([[[100, 50, 50]]], np.uint8)
    hsv = []
    for _ in range(500):
        pixel = Image.fromarray(colour.get_transform(red).apply_image(red)).convert("HSV")
        hsv.append(np.asarray(pixel)[0, 0] / 255)
    hue, saturation, value = np.array(hsv).T
    hue = np.where(hue > 0.5, hue - 1, hue)
    assert -0.12 < hue.min() < -0.08 and 0.08 < hue.max() < 0.12
    assert 0.5 / 1.5 - 0.03 < saturation.min() < 0.36 and 0.7 < saturation.max() < 0.75 + 0.03
    assert 100 / 1.5 - 1 <= 255 * value.min() < 69 and 147 < 255 * value.max() <= 151
    assert 0.4 < np.mean(255 * value > 100) < 0.6


def test_colours_by_hand():
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert adjust_hsv(red, 1 / 3, 1, 1).tolist() == pytest.approx(np.array([[[0, 200, 0]]]), abs=2)
    assert adjust_hsv(red, 0, 0, 1).tolist() == [[[200, 200, 200]]]
    assert adjust_hsv(red, 0, 1, 0.5).tolist() == [[[100, 0, 0]]]
    assert adjust_hsv(red, 0, 1, 9).tolist() == [[[255, 0, 0]]]
    grey = np.array([[[100], [200]]], np.uint8)
    assert adjust_hsv(grey, 0.3, 0.1, 1.5).tolist() == [[[150], [255]]]
    picture = noise(8, 8)
    np.testing.assert_allclose(adjust_hsv(picture, 0, 1, 1), picture, atol=6)  # in 8 bits
    turned = adjust_hsv(picture[..., ::-1], 0.1, 1.2, 0.9)[..., ::-1].astype(int)
    np.testing.assert_allclose(turned, adjust_hsv(picture, -0.1, 1.2, 0.9), atol=15)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 20)])
def test_yolo_places_pictures_on_a_grey_square(height, width):
    """darknet's jitter .3: both sides by 0.7 to 1.3, the longer one filling the square."""
    seed(0)
    place, image = Place(longest=1000), np.full((height, width, 3), 200, np.uint8)
    side, aspects, places = max(height, width), [], set()
    for _ in range(300):
        transform = place.get_transform(image)
        square = transform.apply_image(image)
        assert square.shape == (side, side, 3)
        corners = transform.apply_coords(np.array([[0.0, 0.0], [width, height]]))
        (x0, y0), (x1, y1) = corners.round().astype(int).tolist()
        assert 0 <= x0 < x1 <= side and 0 <= y0 < y1 <= side and side in (x1 - x0, y1 - y0)
        assert (square[y0:y1, x0:x1] == 200).all() and (square == 127).sum() == 3 * (
            side**2 - (x1 - x0) * (y1 - y0)
        )
        aspects.append((x1 - x0) / (y1 - y0) / (width / height))
        places.add((x0, y0))
    assert 0.7 / 1.3 - 0.05 < min(aspects) < 0.65 and 1.55 < max(aspects) < 1.3 / 0.7 + 0.05
    assert len(places) > 20


def test_yolo_does_not_take_a_square_of_the_longer_side_of_a_panorama():
    place = Place(longest=64)
    assert place.get_transform(noise(10, 5000)).apply_image(noise(10, 5000)).shape == (64, 64, 3)
