"""The robust form of configs/quick, in every detector: keys reach each loss, its state is saved."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_models import QUICK_TINY, inputs

from ghm_d2.config import load_config
from ghm_d2.losses.harmonized import HarmonizedLoss
from ghm_d2.register import register_all

KEYS = {
    **QUICK_TINY,
    "MODEL.GHM.CLS.PRIOR": "3.0",
    "MODEL.GHM.REG.PRIOR": "0.5",
}
ONE_STAGE = "num_pos_anchors"
# a loss, and the number of foreground anchors that its detector logs, a mean over images
DETECTORS = {
    "retinanet_ce": ("RETINANET", {"ghm_c": ONE_STAGE, "ghm_r": ONE_STAGE}),
    "fcos": ("FCOS", {"ghm_c": ONE_STAGE, "ghm_r": ONE_STAGE}),
    "yolov3": ("YOLOV3", {"ghm_obj": ONE_STAGE, "ghm_c": ONE_STAGE, "ghm_r": ONE_STAGE}),
    "ssd": ("SSD", {"ghm_c": ONE_STAGE, "ghm_r": ONE_STAGE}),
    "dssd": ("SSD", {"ghm_c": ONE_STAGE, "ghm_r": ONE_STAGE}),
    "faster_rcnn_sl1": (
        "ROI_BOX_HEAD",
        {
            "proposal_generator.ghm_c": "rpn/num_pos_anchors",
            "roi_heads.box_predictor.ghm_c": "roi_head/num_fg_samples",
            "roi_heads.box_predictor.ghm_r": "roi_head/num_fg_samples",
        },
    ),
}


def build(name):
    group, _ = DETECTORS[name]
    types = {f"MODEL.{group}.CLS_LOSS_TYPE": "ghm_c", f"MODEL.{group}.BBOX_REG_LOSS_TYPE": "ghm_r"}
    types["MODEL.YOLOV3.OBJ_LOSS_TYPE"] = types["MODEL.RPN.CLS_LOSS_TYPE"] = "ghm_c"
    register_all()
    torch.manual_seed(0)
    words = [word for pair in {**KEYS, **types}.items() for word in pair]
    return build_model(load_config(f"quick/{name}.yaml", words)).train()


def step(model, seed):
    """The losses of a batch, and the scalars that were logged."""
    torch.manual_seed(0)  # anchors and proposals are sampled
    with EventStorage() as storage:
        losses = model(inputs((3, 2, 0), seed))
    return losses, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_loss_follows_the_batch_and_resumes_exactly(name):
    model, resumed = build(name), build(name)
    losses, logged = step(model, 1)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    found = {n: m for n, m in model.named_modules() if isinstance(m, HarmonizedLoss)}
    assert found.keys() == DETECTORS[name][1].keys()
    for loss, foreground in DETECTORS[name][1].items():
        density, rows = found[loss].density, 3 * logged[foreground]  # images
        classes = 80 if loss == "ghm_c" and "ssd" not in name else 1  # of sigmoids, each its own
        assert density.num_classes == classes
        samples, seen = density.ema_foreground.view(classes, 2).T
        samples = samples / seen
        multiple, each = (0.5, 4) if "ghm_r" in loss else (3, 1)
        assert samples.sum().item() == pytest.approx(each * rows) and rows > 1
        prior = multiple * samples.clamp(min=1)
        torch.testing.assert_close(density.prior_count.view(-1), prior)
        if "ghm_r" in loss:
            assert isinstance(found[loss].mu, torch.Tensor) and found[loss].mu.item() != 0.1
    resumed.load_state_dict(model.state_dict())
    (mine, _), (expected, _) = step(resumed, 2), step(model, 2)
    assert all(torch.equal(loss, expected[key]) for key, loss in mine.items())
