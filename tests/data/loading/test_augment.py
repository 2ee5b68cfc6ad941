"""Augmented pictures: sizes are those configured, and boxes, masks and pixels stay together."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from pictures import noise, seed
from PIL import Image
from pycocotools import mask as rle

from ghm_d2.analysis.loss_inputs import read_batches, training_items
from ghm_d2.config import get_cfg, load_config
from ghm_d2.data.catalog import apply_to_config
from ghm_d2.data.loading.augment import build_augmentations, centred
from ghm_d2.data.loading.loaders import GHMDatasetMapper
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
            "INPUT.AUGMENTATION must be one of '', 'ssd', 'yolo', not",
        ),
        ({"RESIZE": "squares"}, "INPUT.RESIZE must be one of 'shortest_edge', 'square'"),
        ({"AUGMENTATION": "ssd", "FORMAT": "YUV-BT.601"}, "INPUT.FORMAT RGB, BGR, L"),
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
