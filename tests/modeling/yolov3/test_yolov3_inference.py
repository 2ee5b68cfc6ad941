"""The way from predictions to detections: decoding, scores, suppression and size."""

import math

import pytest
import torch
from detectron2.export import TracingAdapter
from tiny_yolov3 import ANCHORS, CLASSES, SIZE, picture, randomized, truth, yolov3
from torch import nn

BACKGROUND = -20.0  # a logit


class Planted(nn.Module):
    """A head whose predictions are background, but for some numbers.

    planted: (image, level, prior, row, column) to the 5 + K raw numbers there.
    """

    def __init__(self, planted):
        super().__init__()
        self.planted = planted

    def forward(self, features):
        size = 5 + CLASSES
        maps = []
        for level, x in enumerate(features):
            raw = x.new_zeros(len(x), 3, size, *x.shape[2:])
            raw[:, :, 4:] = BACKGROUND
            for (n, at, prior, row, column), numbers in self.planted.items():
                if at == level and n < len(x):
                    raw[n, prior, :, row, column] = torch.tensor(numbers)
            maps.append(raw.flatten(1, 2))
        return maps


def detect(planted, images, **keys):
    model = yolov3(keys).eval()
    model.head = Planted(planted)
    with torch.no_grad():
        return [result["instances"] for result in model(images)]


def images(*sizes):
    return [picture(truth([], size=size), seed) for seed, size in enumerate(sizes)]


def raw(x=0.0, y=0.0, w=0.0, h=0.0, obj=5.0, cls=1, sure=3.0):
    numbers = [x, y, w, h, obj] + [BACKGROUND] * CLASSES
    numbers[5 + cls] = sure
    return numbers


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_prediction_is_decoded_by_the_equations_of_the_paper():
    """Section 2.1: b_x = sigma(t_x) + c_x, b_w = p_w exp(t_w); the score is the product."""
    planted = {(0, 1, 2, 2, 3): raw(x=0.7, y=-0.4, w=0.2, h=-0.3, obj=1.5, cls=2, sure=0.6)}
    (found,) = detect(planted, images(SIZE))
    centre = (sigmoid(0.7) + 3) * 16, (sigmoid(-0.4) + 2) * 16
    half = [p * math.exp(t) / 2 for p, t in zip(ANCHORS[1][2], (0.2, -0.3), strict=True)]
    expected = [centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1]]
    assert len(found) == 1
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.scores.item() == pytest.approx(sigmoid(1.5) * sigmoid(0.6), rel=1e-5)
    assert found.pred_classes.tolist() == [2]


def test_boxes_are_scaled_and_cut_to_the_picture_that_is_asked_for():
    image = {**images(SIZE)[0], "height": 128, "width": 288}  # 2 and 3 times the input
    planted = {(0, 0, 0, 4, 5): raw(), (0, 2, 2, 0, 0): raw(w=3.0, h=3.0)}
    (found,) = detect(planted, [image])
    assert found.image_size == (128, 288)
    w, h = ANCHORS[0][0]
    small = found.pred_boxes.tensor[found.pred_boxes.area().argmin()].tolist()
    expected = [3 * (44 - w / 2), 2 * (36 - h / 2), 3 * (44 + w / 2), 2 * (36 + h / 2)]
    assert small == pytest.approx(expected)
    assert found.pred_boxes.tensor[found.pred_boxes.area().argmax()].tolist() == [0, 0, 288, 128]


def test_overlapping_boxes_of_one_class_are_suppressed_and_of_two_are_not():
    near = {(0, 0, 0, 4, 5): raw(x=8.0, obj=5.0), (0, 0, 0, 4, 6): raw(x=-8.0, obj=2.0)}
    (found,) = detect(near, images(SIZE))
    assert found.scores.tolist() == pytest.approx([sigmoid(5.0) * sigmoid(3.0)])
    two = {**near, (0, 0, 0, 4, 6): raw(x=-8.0, obj=2.0, cls=3)}
    (found,) = detect(two, images(SIZE))
    assert found.pred_classes.tolist() == [1, 3]


def test_the_threshold_of_overlap_is_the_configured_one():
    """Two boxes 6 px wide, one of them shifted by 1.6 px: their IoU is 4.4 / 7.6 = 0.58."""
    right = math.log(0.7 / 0.3)  # sigma(x) is 0.7, so 0.2 cells of 8 px beyond the other centre
    planted = {(0, 0, 0, 4, 5): raw(obj=5.0), (0, 0, 1, 4, 5): raw(x=right, obj=2.0)}
    width, height = (math.log(a / b) for a, b in zip(ANCHORS[0][0], ANCHORS[0][1], strict=True))
    planted[0, 0, 1, 4, 5][2:4] = [width, height]  # the second prior, of the first one's sides
    for threshold, left in ((0.45, 1), (0.57, 1), (0.59, 2)):
        (found,) = detect(planted, images(SIZE), **{"MODEL.YOLOV3.NMS_THRESH_TEST": str(threshold)})
        assert len(found) == left, threshold


def test_threshold_and_number_of_detections():
    planted = {(0, 0, 0, 1, c): raw(obj=float(c) - 6) for c in range(12)}
    scores = sorted((sigmoid(c - 6.0) * sigmoid(3.0) for c in range(12)), reverse=True)
    (found,) = detect(planted, images(SIZE), **{"MODEL.YOLOV3.SCORE_THRESH_TEST": "0.1"})
    assert found.scores.tolist() == pytest.approx([s for s in scores if s > 0.1])
    (found,) = detect(planted, images(SIZE), **{"TEST.DETECTIONS_PER_IMAGE": "3"})
    assert found.scores.tolist() == pytest.approx(scores[:3])
    (found,) = detect(planted, images(SIZE), **{"MODEL.YOLOV3.TOPK_CANDIDATES_TEST": "2"})
    assert found.scores.tolist() == pytest.approx(scores[:2])


def test_a_picture_without_an_object():
    (found,) = detect({}, images(SIZE))
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)


def test_a_batch_of_different_sizes():
    planted = {(n, 0, 0, 4, 5): raw() for n in range(3)}
    found = detect(planted, images(SIZE, (50, 70), (90, 130)))
    assert [f.image_size for f in found] == [SIZE, (50, 70), (90, 130)]
    for one in found:  # padding is to the right and below
        assert one.pred_boxes.tensor.tolist() == found[0].pred_boxes.tensor.tolist()


def test_far_predictions_are_finite():
    planted = {(0, 2, 2, 0, 1): raw(x=1e4, y=-1e4, w=1e4, h=1e4), (0, 0, 0, 1, 1): raw(w=-1e4)}
    (found,) = detect(planted, images(SIZE))
    assert len(found) >= 1 and found.pred_boxes.tensor.isfinite().all()


def trained(keys=()):
    """Random weights that find many things; in evaluation mode."""
    model = randomized(yolov3({"MODEL.YOLOV3.SCORE_THRESH_TEST": "0.01", **dict(keys)}))
    for level in model.head.levels:
        nn.init.normal_(level.pred.weight, std=0.2)
    return model.eval()


def test_one_picture_alone_or_in_a_batch():
    model, batch = trained(), images(SIZE, SIZE, SIZE, SIZE)
    with torch.no_grad():
        together = model(batch)
        alone = [model([image])[0] for image in batch]
    for a, b in zip(together, alone, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 10
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_serves_other_sizes_too():
    model = trained()
    first, other = ({"image": i["image"]} for i in images(SIZE, (90, 150)))
    adapter = TracingAdapter(model, [first])
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        (expected,), got = model([other]), traced(other["image"])
    expected = expected["instances"]
    boxes = next(g for g in got if g.dim() == 2 and g.shape[1] == 4)
    assert len(expected) > 10
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_half_precision_is_decoded_in_full():
    """bfloat16 predictions give the same, to the bit, as the same numbers in float32."""
    planted = {(0, 0, 0, 4, c): raw(0.3, -0.7, 0.11, -0.13, c / 3, 1, 0.37) for c in range(9)}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = yolov3().eval()
        model.head = Planted(planted)
        model.head.register_forward_hook(
            lambda head, given, maps, dtype=dtype: [x.bfloat16().to(dtype) for x in maps]
        )
        with torch.no_grad():
            found += model(images(SIZE))
    full, half = (result["instances"] for result in found)
    assert len(full) >= 5 and half.pred_boxes.tensor.dtype == half.scores.dtype == torch.float32
    assert torch.equal(half.pred_boxes.tensor, full.pred_boxes.tensor)
    assert torch.equal(half.scores, full.scores)


def test_a_network_in_half_precision_finds_the_same():
    """With autocast, as of SOLVER.AMP: what is found best differs by rounding alone."""
    model, batch = trained(), images(SIZE, (50, 70))
    with torch.no_grad():
        expected = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(batch)
    for half, full in zip(found, expected, strict=True):
        half, full = half["instances"], full["instances"]
        assert len(half) > 10 and half.pred_boxes.tensor.isfinite().all()
        torch.testing.assert_close(half.scores[:5], full.scores[:5], rtol=0, atol=0.01)
        assert half.pred_classes[0] == full.pred_classes[0]
        apart = (half.pred_boxes.tensor[0] - full.pred_boxes.tensor[0]).abs().max()
        assert apart < 0.05 * SIZE[1]
