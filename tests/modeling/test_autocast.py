"""Mixed precision: predictions are half precision, and losses are float32 all the same."""

import copy
from importlib.resources import files

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from tiny_models import QUICK_TINY, inputs

from ghm_d2.config import load_config
from ghm_d2.register import register_all

QUICK = sorted(
    file.name
    for file in files("ghm_d2.configs").joinpath("quick").iterdir()
    if file.name.endswith(".yaml") and not file.name.startswith("Base-")
)
TWO_STAGE_GHM = {"MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE": "ghm_c", "MODEL.RPN.CLS_LOSS_TYPE": "ghm_c"}
CASES = {
    **{name: (name, {}) for name in QUICK},
    **{
        f"{name} {key} {value}": (f"{name}.yaml", {f"MODEL.{key}": value})
        for name, key, value in (
            ("retinanet_focal", "GHM.KERNEL", "torch"),
            ("retinanet_ce", "GHM.KERNEL", "torch"),
            ("retinanet_ghm", "GHM.KERNEL", "torch"),
            ("retinanet_ghm", "RETINANET.CLS_LOSS_TYPE", "ohem"),
            *(("retinanet_ce", "RETINANET.BBOX_REG_LOSS_TYPE", k) for k in ("giou", "asl1")),
            ("fcos", "GHM.KERNEL", "torch"),
            *(("fcos", "FCOS.BBOX_REG_LOSS_TYPE", k) for k in ("smooth_l1", "asl1", "ghm_r")),
            *(("yolov3", "YOLOV3.BBOX_REG_LOSS_TYPE", k) for k in ("smooth_l1", "asl1")),
            ("ssd", "SSD.CLS_LOSS_TYPE", "ce"),
            ("ssd", "SSD.BBOX_REG_LOSS_TYPE", "asl1"),
            ("faster_rcnn_sl1", "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "asl1"),
            ("faster_rcnn_sl1", "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"),
        )
    },
    "faster_rcnn GHM": ("faster_rcnn_ghm_r.yaml", TWO_STAGE_GHM),
}


def build(case):
    register_all()
    name, keys = CASES[case]
    words = [word for pair in {**QUICK_TINY, **keys}.items() for word in pair]
    torch.manual_seed(0)
    return build_model(load_config(f"quick/{name}", words)).train()


def batch_with_masks():
    batch = inputs((3, 2, 0))
    for item in batch:
        instances = item["instances"]
        shape = len(instances), *instances.image_size
        instances.gt_masks = BitMasks(torch.ones(shape, dtype=torch.bool))
    return batch


def heads(model) -> dict:
    """The modules whose method `losses` computes them."""
    if hasattr(model, "losses"):
        return {"model": model}
    return {"rpn": model.proposal_generator, "box head": model.roi_heads.box_predictor}


def as_float(x):
    """Predictions in half precision to float32, in lists of them and tuples."""
    if isinstance(x, list | tuple):
        return type(x)(map(as_float, x))
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x


def is_half(x) -> bool:
    if isinstance(x, list | tuple):
        return any(map(is_half, x))
    return isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_losses_of_half_precision_are_those_of_its_numbers_in_float32(case):
    model = build(case)
    fresh, calls = copy.deepcopy(model), {}
    for name, head in heads(model).items():
        head.losses = lambda *arguments, name=name, f=head.losses: calls.setdefault(
            name, (arguments, f(*arguments))
        )[1]
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model(batch_with_masks())
    assert losses and all(loss.dtype == torch.float32 for loss in losses.values())
    for name, head in heads(fresh).items():
        arguments, given = calls[name]
        assert is_half(arguments)
        with EventStorage():
            expected = head.losses(*as_float(arguments))
        assert expected
        for key, loss in expected.items():
            assert loss > 0
            torch.testing.assert_close(given[key], loss, rtol=1e-6, atol=0)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
