"""Mosaic and mixup: what boxes and masks say is what is to be seen, and the stream stays exact."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from test_stream import assert_same, cfg, numbers, take  # noqa: F401

from ghm_d2.data.loading.mixing import Mixing

FILL = (7.0, 8.0, 9.0)
COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [200, 200, 0]], dtype=torch.uint8)


def picture(seed: int, masks: str = "", size=(60, 80)) -> dict:
    """Rectangles on black, each in the colour of its class, none over another."""
    random = np.random.default_rng(seed)
    height, width = size
    image, boxes = torch.zeros(3, height, width, dtype=torch.uint8), []
    for i in range(3):
        left, right = i * width // 3 + 2, (i + 1) * width // 3 - 2
        x0, x1 = left + random.integers(0, 4), right - random.integers(0, 4)
        y0, y1 = random.integers(2, 20), random.integers(30, height - 2)
        boxes.append([x0, y0, x1, y1])
    classes = torch.from_numpy(random.integers(0, len(COLOURS), 3))
    for (x0, y0, x1, y1), k in zip(boxes, classes, strict=True):
        image[:, y0:y1, x0:x1] = COLOURS[k][:, None, None]
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.gt_classes = classes
    outlines = [[np.array([a, b, c, b, c, d, a, d], float)] for a, b, c, d in boxes]
    if masks == "polygon":
        instances.gt_masks = PolygonMasks(outlines)
    elif masks == "bitmask":
        instances.gt_masks = BitMasks.from_polygon_masks(outlines, *size)
    return {"image": image, "instances": instances, "file_name": f"{seed}.png"}


def mixed(mosaic, mixup, masks="", seed=0):
    np.random.seed(seed)
    others = iter(range(100 + 10 * seed, 1000))
    draw = lambda: picture(next(others), masks, size=(50, 70))  # noqa: E731
    return Mixing(mosaic, mixup, FILL)(picture(seed, masks), draw)


@pytest.mark.parametrize("masks", ["", "polygon", "bitmask"])
@pytest.mark.parametrize("seed", range(4))
def test_the_objects_of_a_mosaic_are_where_it_says(seed, masks):
    item = mixed(1.0, 0.0, masks, seed)
    image, instances = item["image"], item["instances"]
    assert image.shape == (3, 60, 80) and image.dtype == torch.uint8
    assert instances.image_size == (60, 80) and len(instances) >= 3
    covered = torch.zeros(60, 80, dtype=torch.bool)
    for i in range(len(instances)):
        x0, y0, x1, y1 = instances.gt_boxes.tensor[i].round().int().tolist()
        inside = image[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].flatten(1).float()
        colour = COLOURS[instances.gt_classes[i]].float()
        assert (inside.mean(1) - colour).abs().max() < 12
        covered[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = True
        if masks:
            mask = instances.gt_masks.tensor[i]
            seen = (image.float() - colour[:, None, None]).abs().amax(0) < 60
            around = F.max_pool2d((~mask)[None].float(), 3, stride=1, padding=1)[0] > 0
            assert mask.sum() > 4 and seen[mask & ~around].float().mean() > 0.97
            assert instances.gt_masks.get_bounding_boxes().tensor[i].tolist() == [
                *instances.gt_boxes.tensor[i].tolist()
            ]
    coloured = image.amax(0) > 120  # what is not covered is objects of which little is left
    assert (coloured & ~covered).float().mean() < 0.06


def test_what_no_image_covers_has_the_fill():
    fill = torch.tensor(FILL).to(torch.uint8)[:, None, None]
    shares = [
        (mixed(1.0, 0.0, seed=seed)["image"] == fill).all(0).float().mean() for seed in range(8)
    ]
    assert 0.02 < max(shares) < 0.8


@pytest.mark.parametrize("masks", ["", "polygon"])
def test_mixup_has_the_objects_of_both(masks):
    item = mixed(0.0, 1.0, masks)
    own, other = picture(0), picture(100, size=(50, 70))
    scale = min(60 / 50, 80 / 70)
    expected = other["instances"].gt_boxes.tensor * torch.tensor(scale)
    boxes = item["instances"].gt_boxes.tensor
    assert len(boxes) == 6
    torch.testing.assert_close(boxes[:3], own["instances"].gt_boxes.tensor, atol=1.1, rtol=0)
    torch.testing.assert_close(boxes[3:], expected, atol=1.1, rtol=0)
    alone = own["image"].float()
    assert (item["image"].float() - alone).abs().max() > 40
    x0, y0, x1, y1 = own["instances"].gt_boxes.tensor[0].int().tolist()
    inside = item["image"][:, y0:y1, x0:x1].float().flatten(1).mean(1)
    assert inside.max() > 60  # its own object shines through


@pytest.mark.parametrize("first", [True, False])
def test_images_without_objects_have_no_masks_and_go_with_others_that_do(first):
    """Instances as Detectron2's mapper makes them: without an annotation they have no masks."""
    empty, full = picture(0), picture(1, "polygon")
    instances = Instances((60, 80))
    instances.gt_boxes = Boxes(torch.zeros(0, 4))
    instances.gt_classes = torch.zeros(0, dtype=torch.int64)
    empty["instances"] = instances
    item, other = (empty, full) if first else (full, empty)
    for mosaic, mixup in ((1.0, 0.0), (0.0, 1.0)):
        found = Mixing(mosaic, mixup, FILL)(item, lambda: other)["instances"]
        assert len(found) > 0 and len(found.gt_masks) == len(found)
    alone = Mixing(1.0, 1.0, FILL)(empty, lambda: empty)["instances"]
    assert len(alone) == 0


def test_an_image_that_cannot_be_read_is_told():
    mixing = Mixing(1.0, 0.0, FILL)
    assert mixing(picture(0), lambda: {"error": "x.png: cannot be read"})["error"].startswith("x")
    replaced = lambda: picture(1) | {"faults": {"y.png": "cut off"}}  # noqa: E731
    assert mixing(picture(0), replaced)["faults"] == {"y.png": "cut off"}


def test_the_stream_with_mixing_is_a_function_of_the_iteration(cfg):  # noqa: F811
    cfg.INPUT.MOSAIC, cfg.INPUT.MIXUP, cfg.SOLVER.MAX_ITER = 0.5, 0.5, 100
    alone = take(cfg, 6)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert_same(take(cfg, 6), alone)
    assert_same(take(cfg, 3, start=3), alone[3:])


def test_the_last_tenth_of_a_training_sees_whole_images(cfg):  # noqa: F811
    plain = take(cfg, 20)
    cfg.INPUT.MOSAIC, cfg.SOLVER.MAX_ITER = 1.0, 20
    mosaics = take(cfg, 20)
    assert numbers(mosaics) == numbers(plain)
    assert_same(mosaics[18:], plain[18:])
    same = [
        torch.equal(a["image"], b["image"]) for a, b in zip(mosaics[17], plain[17], strict=True)
    ]
    assert not any(same)
