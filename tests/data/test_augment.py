"""Augmented pictures: what is drawn at random stays within what SSD and YOLOv3 publish, and boxes,
masks and pixels stay together."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image
from pycocotools import mask as rle

from ghm_d2.analysis.samples import read_batches, training_items
from ghm_d2.config import get_cfg, load_config
from ghm_d2.data.augment import (
    Expand,
    IoUCrop,
    Place,
    SSDColour,
    YOLOColour,
    adjust_hsv,
    build_augmentations,
    centred,
)
from ghm_d2.data.catalog import apply_to_config
from ghm_d2.data.loaders import GHMDatasetMapper
from ghm_d2.errors import UsageError

KINDS = ("ssd", "yolo")


def config(**keys):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
    cfg.INPUT.FORMAT = "RGB"
    for name, value in keys.items():
        group = cfg.MODEL if name in cfg.MODEL else cfg.INPUT
        setattr(group, name, value)
    return cfg


def annotation(box, category=0, **more):
    """Return an annotation of `box`: x, y, width, height in px."""
    box = [float(v) for v in box]
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": category, **more}


def item(file, pixels, *annotations):
    Image.fromarray(pixels).save(file)
    height, width = pixels.shape[:2]
    return {
        "file_name": str(file),
        "height": height,
        "width": width,
        "annotations": list(annotations),
    }


def noise(height, width, channels=3):
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(height + width).integers(0, 256, shape, np.uint8)


def seed(value):
    np.random.seed(value)
    torch.manual_seed(value)


def mapped(mapper, picture, value):
    seed(value)
    result = mapper(picture)
    assert "error" not in result, result
    return result


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("is_train", [False, True])
def test_without_a_key_it_is_detectron2s_own(tmp_path, is_train, crop):
    cfg = config(MIN_SIZE_TRAIN=(64, 96, 128))
    cfg.INPUT.CROP.ENABLED = crop
    picture = item(tmp_path / "a.png", noise(50, 90), annotation((5, 6, 30, 20)))
    ours, theirs = GHMDatasetMapper(cfg, is_train), DatasetMapper(cfg, is_train)
    sizes = set()
    for value in range(8):
        mine, expected = (mapped(m, picture, value) for m in (ours, theirs))
        assert torch.equal(mine["image"], expected["image"])
        sizes.add(mine["image"].shape)
        if is_train:
            boxes = mine["instances"].gt_boxes, expected["instances"].gt_boxes
            assert torch.equal(*(b.tensor for b in boxes))
    assert (len(sizes) > 1) == is_train
    kinds = [type(a) for a in build_augmentations(config(), is_train)]
    assert kinds == [type(a) for a in build_augmentation(config(), is_train)]


@pytest.mark.parametrize("kind", KINDS)
def test_augmentations_are_for_training_alone(kind):
    (resize,) = build_augmentations(config(AUGMENTATION=kind), False)
    assert isinstance(resize, T.ResizeShortestEdge)
    assert len(build_augmentations(config(AUGMENTATION=kind, RANDOM_FLIP="none"), True)) > 2


@pytest.mark.parametrize("is_train", [False, True])
def test_a_square_is_one_of_the_sizes(tmp_path, is_train):
    cfg = config(RESIZE="square", MIN_SIZE_TRAIN=(32, 64), MIN_SIZE_TEST=48)
    mapper = GHMDatasetMapper(cfg, is_train)
    picture = item(tmp_path / "a.png", noise(20, 70), annotation((7, 2, 14, 4)))
    results = [mapped(mapper, picture, value) for value in range(12)]
    shapes = {tuple(r["image"].shape) for r in results}
    assert shapes == ({(3, 32, 32), (3, 64, 64)} if is_train else {(3, 48, 48)})
    for result in results if is_train else []:
        size = result["image"].shape[-1]
        left, right = (7, 21) if result["instances"].gt_boxes.tensor[0, 0] < size / 2 else (0, 0)
        if right:  # not flipped
            expected = torch.tensor([left / 70, 2 / 20, right / 70, 6 / 20]) * size
            assert torch.allclose(result["instances"].gt_boxes.tensor[0], expected)


def test_a_square_of_a_range_of_sizes():
    cfg = config(RESIZE="square", MIN_SIZE_TRAIN=(32, 40), RANDOM_FLIP="none")
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    (resize,) = build_augmentations(cfg, True)
    seed(0)
    sizes = {resize.get_transform(noise(9, 7)).new_w for _ in range(100)}
    assert sizes == set(range(32, 41))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"AUGMENTATION": "yolov3"},
            "INPUT.AUGMENTATION is one of '', 'ssd', 'yolo', not",
        ),
        ({"RESIZE": "squares"}, "INPUT.RESIZE is one of 'shortest_edge', 'square'"),
        ({"AUGMENTATION": "ssd", "FORMAT": "YUV-BT.601"}, "INPUT.FORMAT of RGB, BGR, L"),
    ],
)
def test_what_is_not_known_is_refused(keys, words):
    with pytest.raises(UsageError, match=words):
        GHMDatasetMapper(config(**keys), True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["RGB", "L"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (3, 5), (47, 64)])
def test_pictures_and_boxes_of_every_size(tmp_path, kind, form, height, width):
    mean = [123.7, 116.3, 103.5] if form == "RGB" else [110.0]
    cfg = config(AUGMENTATION=kind, RESIZE="square", FORMAT=form, PIXEL_MEAN=mean)
    mapper = GHMDatasetMapper(cfg, True)
    corner = annotation((width - 1, height - 1, 1, 1), 1)
    whole = annotation((0, 0, width, height), 0)
    crowd = annotation((0, 0, width, height), 2, iscrowd=1)
    pixels = noise(height, width, 1)  # a grey file, whatever it is read as
    kept = set()
    for objects in ((), (whole, corner, crowd), (corner,)):
        picture = item(tmp_path / "a.png", pixels, *objects)
        for value in range(12):
            result = mapped(mapper, picture, value)
            assert result["image"].shape == (3 if form == "RGB" else 1, 96, 96)
            assert result["image"].dtype == torch.uint8
            boxes = result["instances"].gt_boxes.tensor
            assert boxes.isfinite().all()
            assert (boxes >= 0).all() and (boxes <= 96).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert len(boxes) <= sum(a is not crowd for a in objects)
            kept |= set(result["instances"].gt_classes.tolist())
    assert kept == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_them_and_another_changes_them(tmp_path, kind):
    mapper = GHMDatasetMapper(config(AUGMENTATION=kind), True)
    picture = item(tmp_path / "a.png", noise(60, 80), annotation((20, 10, 30, 40)))
    first, again, other = (mapped(mapper, picture, value) for value in (3, 3, 4))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["instances"].gt_boxes.tensor, again["instances"].gt_boxes.tensor)
    assert first["image"].shape != other["image"].shape or (first["image"] != other["image"]).any()


SHAPE = (60, 80)
FIELDS = ("gt_boxes", "gt_masks")
RECTANGLE = (30, 14, 24, 30)  # x, y, width, height


def drawn(file, segmentation):
    """A red rectangle on black, and its annotation with a mask of that kind."""
    x, y, w, h = RECTANGLE
    mask = np.zeros(SHAPE, np.uint8)
    mask[y : y + h, x : x + w] = 1
    pixels = np.stack([255 * mask, 0 * mask, 0 * mask], axis=2)
    shapes = {
        "polygon": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        "rle": rle.encode(np.asfortranarray(mask)),
        "none": None,
    }
    shape = shapes[segmentation]
    more = {} if shape is None else {"segmentation": shape}
    return item(file, pixels, annotation(RECTANGLE, **more))


def extent(mask):
    """Return x0, y0, x1, y1 of the true pixels."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("kind", [*KINDS, "", "crop"])
@pytest.mark.parametrize(
    ("segmentation", "form"),
    [("none", "polygon"), ("polygon", "polygon"), ("polygon", "bitmask"), ("rle", "bitmask")],
)
def test_box_mask_and_pixels_stay_together(tmp_path, kind, segmentation, form):
    """Nothing but the rectangle is coloured: canvases are black or grey."""
    cfg = config(PIXEL_MEAN=[0.0, 0.0, 0.0], RESIZE="square", MASK_FORMAT=form)
    cfg.INPUT.AUGMENTATION = kind if kind in KINDS else ""
    cfg.INPUT.CROP.ENABLED = kind == "crop"
    cfg.MODEL.MASK_ON = segmentation != "none"
    mapper = GHMDatasetMapper(cfg, True)
    picture = drawn(tmp_path / "a.png", segmentation)
    places = set()
    for value in range(40):
        result = mapped(mapper, picture, value)
        image, instances = result["image"].int(), result["instances"]
        coloured = (image.amax(0) - image.amin(0) > 40).numpy()
        if not len(instances):  # its centre was cut off, or all of it by Detectron2's crop
            assert kind == "crop" or not cfg.INPUT.AUGMENTATION
            continue
        (box,) = instances.gt_boxes.tensor.tolist()
        np.testing.assert_allclose(box, extent(coloured), atol=2)
        places.add(tuple(round(v) for v in box))
        if segmentation != "none":
            masks = instances.gt_masks
            assert isinstance(masks, PolygonMasks if form == "polygon" else BitMasks)
            if form == "polygon":
                masks = BitMasks.from_polygon_masks(masks, *image.shape[1:])
            (mask,) = masks.tensor.numpy()
            assert (mask != coloured).sum() <= 2 * sum(image.shape[1:])
            np.testing.assert_allclose(extent(mask), extent(coloured), atol=2)
    assert len(places) > (1 if kind == "" else 15)


@pytest.mark.parametrize("kind", ["ssd", "crop"])
def test_the_box_of_a_cut_object_is_that_of_its_mask(tmp_path, kind):
    cfg = config(RESIZE="square", MASK_FORMAT="bitmask", MASK_ON=True)
    cfg.INPUT.AUGMENTATION = kind if kind in KINDS else ""
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = kind == "crop", [0.6, 0.6]
    mapper = GHMDatasetMapper(cfg, True)
    triangle = annotation((20, 10, 50, 45), segmentation=[[20, 10, 70, 10, 20, 55]])
    for value in range(30):
        result = mapped(mapper, item(tmp_path / "a.png", noise(*SHAPE), triangle), value)
        for box, mask in zip(*(result["instances"].get(k) for k in FIELDS), strict=True):
            np.testing.assert_allclose(box, extent(mask.numpy()), atol=1.5)
    empty = mapped(mapper, item(tmp_path / "a.png", noise(*SHAPE)), 0)
    assert len(empty["instances"]) == 0


def test_an_object_stays_where_its_centre_does(tmp_path):
    """Beside each object there is a tiny one with the same centre."""
    pairs = []
    for i, (x, y) in enumerate([(20, 20), (70, 22), (22, 60), (75, 65)]):
        pairs += [annotation((x - 15, y - 15, 30, 30), 2 * i), annotation((x - 1, y - 1, 2, 2))]
        pairs[-1]["category_id"] = 2 * i + 1
    picture = item(tmp_path / "a.png", noise(90, 100), *pairs)
    mapper = GHMDatasetMapper(config(AUGMENTATION="ssd"), True)
    numbers = []
    for value in range(40):
        classes = set(mapped(mapper, picture, value)["instances"].gt_classes.tolist())
        assert classes == {c for i in range(4) if 2 * i in classes for c in (2 * i, 2 * i + 1)}
        numbers.append(len(classes) // 2)
    assert min(numbers) == 1 and max(numbers) == 4


def test_centred_by_hand():
    transforms = T.TransformList([T.CropTransform(10, 0, 20, 20), T.HFlipTransform(20)])
    inside, outside = annotation((0, 0, 22, 8)), annotation((0, 0, 20, 8))  # centres at x 11, 10
    assert centred([inside, outside], transforms, (20, 20)) == [inside]
    assert centred([], transforms, (20, 20)) == []


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
    """As weiliu89/caffe's ApplyDistort: second, or last, each in every other picture."""
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


@pytest.mark.parametrize("resize", ["square", "shortest_edge"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_for_analysis_are_not_augmented(tiny, digits_folder, kind, resize):
    words = ["INPUT.AUGMENTATION", kind, "INPUT.RESIZE", resize, "MODEL.DEVICE", "cpu"]
    cfg = load_config("quick/retinanet_focal.yaml", [*tiny, *words])
    apply_to_config(cfg, digits_folder)
    items = training_items(cfg, 2)
    (batch,) = read_batches(cfg, items)
    assert len(batch) == len(items) == 2
    for result, source in zip(batch, items, strict=True):
        _, height, width = result["image"].shape
        assert (height == width == 64) if resize == "square" else min(height, width) == 64
        scale = torch.tensor([width / source["width"], height / source["height"]] * 2)
        boxes = torch.tensor([a["bbox"] for a in source["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        assert torch.allclose(result["instances"].gt_boxes.tensor, boxes * scale, atol=1e-3)
