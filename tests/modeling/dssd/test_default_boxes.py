"""Default boxes against loops written from SSD, section 2.2, and DSSD, "Training"."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from tiny_ssd import RATIOS, SIZES, STRIDES, tiny_ssd

from ghm_d2.config import load_config
from ghm_d2.modeling.dssd.default_boxes import GHMDefaultBoxes


def naive(sides, strides, sizes, ratios):
    """Return (centre x, centre y, width, height) of each box, level by level and row by row."""
    boxes = []
    for (height, width), stride, (scale, after) in zip(sides, strides, sizes, strict=True):
        for i in range(height):
            for j in range(width):
                cx, cy = (j + 0.5) * stride, (i + 0.5) * stride
                boxes.append((cx, cy, scale, scale))
                boxes.append((cx, cy, math.sqrt(scale * after), math.sqrt(scale * after)))
                for a in ratios:
                    for ratio in (a, 1 / a):
                        wide, high = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
                        boxes.append((cx, cy, wide, high))
    return torch.tensor(boxes, dtype=torch.float64)


def centred(boxes):
    boxes = torch.cat([b.tensor for b in boxes]).double()
    corner, end = boxes[:, :2], boxes[:, 2:]
    return torch.cat([(corner + end) / 2, end - corner], dim=1)


def test_against_the_papers():
    sides = [(8, 12), (4, 6), (2, 3), (1, 2)]
    generator = tiny_ssd().anchor_generator
    boxes = generator([torch.zeros(1, 1, *side) for side in sides])
    assert isinstance(generator, GHMDefaultBoxes) and generator.num_anchors == [8] * 4
    torch.testing.assert_close(
        centred(boxes), naive(sides, STRIDES, SIZES, RATIOS), atol=1e-4, rtol=0
    )


def test_the_recipe_has_the_scales_of_the_authors_code():
    """min_ratio 10 and max_ratio 95 in equal steps for all levels but the first, which has 4 %."""
    step = (95 - 10) // (7 - 2)
    percent = [4, *range(10, 95 + 1, step), 95 + step]
    keys = load_config("configs/coco/dssd513_R_101.yaml").MODEL.ANCHOR_GENERATOR
    expected = [[513 * p / 100 for p in percent[i : i + 2]] for i in range(7)]
    assert [pytest.approx(pair) for pair in expected] == keys.SIZES
    assert list(keys.ASPECT_RATIOS[0]) == [1.6, 2.0, 3.0]


def test_other_numbers_of_ratios():
    shapes = [ShapeSpec(channels=1, stride=8), ShapeSpec(channels=1, stride=16)]
    boxes = GHMDefaultBoxes(
        sizes=[[10, 20], [20, 40]],
        aspect_ratios=[[2.0], [2.0, 3.0]],
        strides=[s.stride for s in shapes],
    )
    assert boxes.num_anchors == [4, 6]  # as SSD300 has them on its first and second map
