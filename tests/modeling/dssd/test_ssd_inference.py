"""The detections, against loops written from SSD, section 3.7."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from test_ssd_matching import iou
from tiny_ssd import CLASSES, picture, tiny_ssd


def varied(**keys):
    """Return a model in inference mode whose scores differ."""
    model = tiny_ssd(**keys).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in (*model.head.cls_score, *model.head.bbox_pred):
        layer.bias.data = torch.randn(layer.bias.shape, generator=generator)
    return model


def decode(box, delta):
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    cx, cy = (x0 + x1) / 2 + 0.1 * delta[0] * w, (y0 + y1) / 2 + 0.1 * delta[1] * h
    w, h = w * math.exp(0.2 * delta[2]), h * math.exp(0.2 * delta[3])
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def naive(boxes, scores, deltas, threshold, top, nms, most):
    found = []
    for k in range(scores.shape[1]):
        order = sorted(range(len(boxes)), key=lambda r: -scores[r][k])[:top]
        kept = []
        for r in (r for r in order if scores[r][k] > threshold):
            box = decode(boxes[r].tolist(), deltas[r].tolist())
            if all(iou(box, other) <= nms for other in kept):
                kept.append(box)
                found.append((float(scores[r][k]), k, box))
    return sorted(found, reverse=True)[:most]


@pytest.mark.parametrize(
    ("threshold", "top", "most"), [(0.3, 25, 100), (0.0, 8, 100), (0.1, 400, 12), (1.1, 25, 100)]
)
def test_against_the_paper(threshold, top, most):
    model = tiny_ssd(SCORE_THRESH_TEST=threshold, TOPK_CANDIDATES_TEST=top)
    model.max_detections_per_image = most
    generator = torch.Generator().manual_seed(0)
    corner = 40 * torch.rand(60, 2, generator=generator)
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(60, 2, generator=generator)], dim=1)
    scores = (2 * torch.randn(60, CLASSES + 1, generator=generator)).softmax(1)[:, :-1]
    deltas = 0.7 * torch.randn(60, 4, generator=generator)
    result = model._infer_image(boxes, scores, deltas, (64, 96))
    expected = naive(boxes, scores, deltas, threshold, top, 0.45, most)
    assert result.scores.tolist() == pytest.approx([score for score, _, _ in expected])
    assert result.pred_classes.tolist() == [k for _, k, _ in expected]
    for box, (_, _, other) in zip(result.pred_boxes.tensor, expected, strict=True):
        assert box.tolist() == pytest.approx(other, abs=1e-3)


def test_scores_are_a_softmax_with_background():
    model = tiny_ssd().eval()
    logits = [0.0, 1.0, 3.0, -1.0, 2.0]  # background last
    for layer in model.head.cls_score:
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits).repeat(8)
    (result,) = model([{"image": picture()}])
    found, total = result["instances"], sum(math.exp(x) for x in logits)
    assert found.scores.tolist() == pytest.approx([math.exp(3) / total] * len(found))
    assert set(found.pred_classes.tolist()) == {2}


def test_no_object():
    model = varied(SCORE_THRESH_TEST=1.0)
    (result,) = model([{"image": picture(), "height": 128, "width": 192}])
    found = result["instances"]
    assert len(found) == 0 and found.image_size == (128, 192)
    assert found.pred_boxes.tensor.shape == (0, 4)
    assert found.pred_classes.dtype == torch.int64


def test_boxes_are_in_the_asked_for_size():
    model = varied()
    (small,), (large,) = (
        model([{"image": picture(), "height": 64 * s, "width": 96 * s}]) for s in (1, 2)
    )
    assert len(small["instances"]) == len(large["instances"]) == 20
    a, b = (x["instances"].pred_boxes.tensor for x in (small, large))
    torch.testing.assert_close(2 * a, b)
    assert (a >= 0).all() and (a <= torch.tensor([96, 64, 96, 64])).all()


def test_a_batch_gives_what_its_pictures_give_alone():
    model = varied()
    batch = [{"image": picture(seed=i)} for i in range(4)]
    together = model(batch)
    for inputs, expected in zip(batch, together, strict=True):
        (alone,) = model([inputs])
        alone, expected = alone["instances"], expected["instances"]
        assert len(alone) == len(expected) > 0
        torch.testing.assert_close(alone.scores, expected.scores)
        assert (alone.pred_boxes.tensor - expected.pred_boxes.tensor).abs().max() < 0.01  # px
        assert torch.equal(alone.pred_classes, expected.pred_classes)


def test_pictures_of_different_sizes():
    sizes = [(64, 96), (40, 33), (70, 20)]
    results = varied()([{"image": picture(size)} for size in sizes])
    for size, result in zip(sizes, results, strict=True):
        found = result["instances"]
        assert found.image_size == size and len(found) > 0
        assert found.pred_boxes.tensor[:, 2].max() <= size[1]
        assert found.pred_boxes.tensor[:, 3].max() <= size[0]


def test_extreme_deltas_stay_finite():
    model = varied()
    for layer in model.head.bbox_pred:
        layer.bias.data.fill_(1e4)
    (result,) = model([{"image": picture()}])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_deltas_are_detectron2s_with_ssds_variances():
    model = tiny_ssd()
    assert model.box2box_transform.weights == Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).weights
