"""Weights of classes: in each detector's classification losses, and by the data."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_models import CLASSES, QUICK_TINY, ghm_retinanet, inputs, recorded_losses, step

from ghm_d2.config import get_cfg, load_config
from ghm_d2.data.class_weights import class_weights
from ghm_d2.errors import UsageError
from ghm_d2.losses import GHMC
from ghm_d2.modeling import build_losses
from ghm_d2.register import register_all

# a configuration, its group of keys and those of its losses that are of classes
DETECTORS = {
    "retinanet_focal": ("RETINANET", ("focal", "ce", "ohem", "qfl", "vfl", "ghm_c")),
    "fcos": ("FCOS", ("focal", "ce", "qfl", "vfl", "ghm_c")),
    "yolov3": ("YOLOV3", ("ce", "ghm_c")),
    "ssd": ("SSD", ("mining", "ce", "ghm_c")),
    "faster_rcnn_sl1": ("ROI_BOX_HEAD", ("ce", "ghm_c")),
}
CASES = [(name, loss) for name, (_, losses) in DETECTORS.items() for loss in losses]


def losses_of(name, loss, weights=None):
    """The losses of a step with objects of the classes 0, 1 and 2."""
    group = DETECTORS[name][0]
    keys = QUICK_TINY | {f"MODEL.{group}.CLS_LOSS_TYPE": loss}
    keys |= {f"MODEL.{g}.NUM_CLASSES": "4" for g in ("RETINANET", "FCOS", "YOLOV3", "SSD")}
    keys["MODEL.ROI_HEADS.NUM_CLASSES"] = "4"
    if weights:
        keys |= {"MODEL.CLASS_WEIGHTING": "given", "MODEL.CLASS_WEIGHTS": str(weights)}
    register_all()
    torch.manual_seed(0)
    words = [word for pair in keys.items() for word in pair]
    model = build_model(load_config(f"quick/{name}.yaml", words)).train()
    batch = inputs((4, 3, 0), seed=5)
    for item in batch:
        item["instances"].gt_classes %= 3
    torch.manual_seed(0)
    with EventStorage():
        return model(batch)


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_a_class_counts_by_its_weight_in_every_detector(name, loss):
    plain = losses_of(name, loss)
    same = losses_of(name, loss, (1.0, 1.0, 1.0, 5.0))  # no object is of the last class
    heavier = losses_of(name, loss, (1.0, 3.0, 1.0, 1.0))
    for key, value in plain.items():
        torch.testing.assert_close(same[key], value, rtol=1e-4, atol=1e-6)
        if key == "loss_cls":
            assert heavier[key] > value * 1.0001
        else:
            torch.testing.assert_close(heavier[key], value, rtol=1e-4, atol=1e-6)


def test_in_cross_entropy_it_is_a_factor_on_all_of_an_anchors_losses():
    weights = (0.5, 2.0, 1.0, 3.0)
    keys = {"MODEL.CLASS_WEIGHTING": "given", "MODEL.CLASS_WEIGHTS": str(weights)}
    model = ghm_retinanet("ce", "smooth_l1", keys)
    batch = inputs((4, 3), seed=1)
    (_, logits, labels, *_), losses = recorded_losses(model, batch, lambda b: step(model, b))
    x, y = torch.cat(logits, 1).flatten(0, 1), torch.stack(labels).flatten()
    x, y = x[y >= 0], y[y >= 0]
    one_hot = F.one_hot(y, CLASSES + 1)[:, :-1].to(x)
    each = F.binary_cross_entropy_with_logits(x, one_hot, reduction="none").sum(1)
    expected = (each * torch.tensor([*weights, 1.0])[y]).sum() / model.loss_normalizer
    torch.testing.assert_close(losses["loss_cls"], expected.float())


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}], ids=str)
def test_ghm_weighs_rows_of_levels_as_of_one_call(options):
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 3, generator=random), torch.arange(20) % 5 - 1
    weight = torch.rand(20, generator=random)
    loss = GHMC.robust(**options)(logits, labels, weight)
    parts = [x.split([12, 8]) for x in (logits, labels, weight)]
    counted = GHMC.robust(**options).begin(*parts)
    torch.testing.assert_close(counted.total(), loss)


def test_weights_by_the_number_of_annotations():
    assert class_weights([10, 40, 0], "inverse") == pytest.approx(
        [3 * w / (1 / 10 + 1 / 40 + 1) for w in (1 / 10, 1 / 40, 1)]
    )
    # arXiv 1901.05555, equation 2
    effective = [(1 - 0.999) / (1 - 0.999**n) for n in (10, 2000)]
    expected = [2 * w / sum(effective) for w in effective]
    assert class_weights([10, 2000], "effective") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL.CLASS_WEIGHTING": "given", "MODEL.CLASS_WEIGHTS": "(1.0, 2.0)"}, "2 numbers"),
        ({"MODEL.CLASS_WEIGHTING": "given", "MODEL.CLASS_WEIGHTS": "(1, 1, 0, 1)"}, "above 0"),
        ({"MODEL.CLASS_WEIGHTING": "inverse"}, "fill_class_weights"),
        (
            {
                "MODEL.CLASS_WEIGHTING": "given",
                "MODEL.CLASS_WEIGHTS": "(1, 1, 1, 1)",
                "MODEL.GHM.CLS.DENSITY": "exact",
            },
            "exact does not support",
        ),
        (
            {
                "MODEL.CLASS_WEIGHTING": "given",
                "MODEL.CLASS_WEIGHTS": "(1, 1, 1, 1)",
                "MODEL.GHM.KERNEL": "c",
            },
            "set KERNEL to auto",
        ),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        ghm_retinanet("ghm_c", "smooth_l1", keys)


@pytest.mark.parametrize(("bad", "named"), [(float("inf"), "inf"), (-2.0, "-2")])
def test_the_weight_that_is_out_of_range_is_named(bad, named):
    cfg = get_cfg()
    cfg.MODEL.CLASS_WEIGHTS = (1.0, bad, 0.5)
    with pytest.raises(UsageError, match=f"above 0, but one is {named}$"):
        build_losses.class_weights(cfg, 3, "focal")


def test_the_exact_density_excludes_weights_only_where_there_is_ghm_c():
    cfg = get_cfg()
    cfg.MODEL.CLASS_WEIGHTS, cfg.MODEL.GHM.CLS.DENSITY = (1.0, 2.0), "exact"
    assert build_losses.class_weights(cfg, 2, "focal") == (1.0, 2.0)
    with pytest.raises(UsageError, match="exact does not support"):
        build_losses.class_weights(cfg, 2, "ghm_c")
