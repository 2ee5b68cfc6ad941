"""The region proposal network with GHM-C."""

import pytest
import torch
from detectron2.engine import DefaultTrainer
from tiny_models import (
    FILES,
    TINY,
    faster_rcnn,
    ghm_faster_rcnn,
    gradients,
    inputs,
    recorded_losses,
    step,
)

from ghm_d2.config import load_config
from ghm_d2.errors import UsageError
from ghm_d2.losses import GHMC
from ghm_d2.losses.density.gradient_density import SCOPES
from ghm_d2.register import register_all

LEVELS = 5


def rpn_step(model, batch, seed=0):
    """Return by level the logits and 0/1 targets of sampled anchors, and then the losses."""
    generator = model.proposal_generator
    arguments, losses = recorded_losses(generator, batch, lambda b: step(model, b, seed))
    _, logits, labels, _, _ = arguments
    labels, start, levels = torch.stack(labels), 0, []
    for x in logits:
        y = labels[:, start : start + x.shape[1]].reshape(-1)
        start += x.shape[1]
        levels.append((x.reshape(-1)[y >= 0], y[y >= 0]))
    assert start == labels.shape[1] and len(levels) == LEVELS
    return levels, losses


@pytest.mark.parametrize("scope", SCOPES)
def test_ghm_c_over_the_sampled_anchors(scope):
    keys = {"MODEL.GHM.SCOPE": scope, "MODEL.RPN.LOSS_WEIGHT": "0.5"}
    model = ghm_faster_rcnn(rpn="ghm_c", keys=keys)
    shared = GHMC()
    modules = [GHMC() if scope == "level_ema" else shared for _ in range(LEVELS)]
    for seed in (1, 2):
        levels, losses = rpn_step(model, inputs((4, 3), seed), seed)
        assert sum(1 in y.tolist() and 0 in y.tolist() for _, y in levels) >= 3
        if scope == "batch":
            levels = [tuple(map(torch.cat, zip(*levels, strict=True)))]
        expected = 0
        for module, (x, target) in zip(modules, levels, strict=False):
            # one class, "object", whose label is 0; background is 1
            expected = expected + module(x[:, None], 1 - target.long())
        torch.testing.assert_close(losses["loss_rpn_cls"], 0.5 * expected)
    assert model.proposal_generator.ghm_c.density.ema.shape[0] == (5 if scope == "level_ema" else 1)


def test_one_region_is_the_mean_cross_entropy():
    keys = {"MODEL.GHM.CLS.BINS": "1", "MODEL.GHM.CLS.MOMENTUM": "0.0", "MODEL.GHM.SCOPE": "batch"}
    model = ghm_faster_rcnn(rpn="ghm_c", keys=keys)
    levels, losses = rpn_step(model, inputs((4, 3)))
    logits, target = map(torch.cat, zip(*levels, strict=True))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    torch.testing.assert_close(losses["loss_rpn_cls"], expected)


def test_a_large_sample_harmonises_every_labelled_anchor():
    few = ghm_faster_rcnn(rpn="ghm_c", keys={"MODEL.RPN.BATCH_SIZE_PER_IMAGE": "16"})
    every = ghm_faster_rcnn(rpn="ghm_c", keys={"MODEL.RPN.BATCH_SIZE_PER_IMAGE": "1000000"})
    counts = []
    for model in (few, every):
        levels, losses = rpn_step(model, inputs((4, 3)))
        assert losses["loss_rpn_cls"].isfinite()
        counts.append(sum(len(x) for x, _ in levels))
    assert counts[0] == 32 and counts[1] > 1000


def test_the_other_losses_are_detectron2s():
    ours, theirs = ghm_faster_rcnn(rpn="ghm_c"), faster_rcnn()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    mine, expected = step(ours, inputs((4, 3))), step(theirs, inputs((4, 3)))
    for name, loss in mine.items():
        assert torch.equal(loss, expected[name]) == (name != "loss_rpn_cls")
    name = "proposal_generator.rpn_head.objectness_logits.weight"
    assert not torch.equal(gradients(ours)[name], gradients(theirs)[name])


def test_evaluation_leaves_the_average_alone():
    model = ghm_faster_rcnn(rpn="ghm_c")
    step(model, inputs((4, 3)))
    average = model.proposal_generator.ghm_c.density.ema.clone()
    assert average.any()
    with torch.no_grad():
        model.eval()(inputs((4, 3), seed=5))
    assert torch.equal(model.proposal_generator.ghm_c.density.ema, average)


def test_unknown_loss_type():
    message = r"MODEL\.RPN\.CLS_LOSS_TYPE must be one of ce, ghm_c, not 'focal'"
    with pytest.raises(UsageError, match=message):
        ghm_faster_rcnn(rpn="focal")


def test_alone_it_refuses_a_trainer_that_ignores_keys(monkeypatch):
    """Beside Detectron2's own detector and ROI heads."""
    register_all()
    monkeypatch.setattr("detectron2.engine.defaults.setup_logger", lambda: None)
    keys = TINY | {"MODEL.PROPOSAL_GENERATOR.NAME": "GHMRPN", "SOLVER.OPTIMIZER": "ADAMW"}
    words = [word for pair in keys.items() for word in pair]
    cfg = load_config(FILES["GeneralizedRCNN"], words)
    with pytest.raises(UsageError, match=r"DefaultTrainer ignores SOLVER\.OPTIMIZER ADAMW"):
        DefaultTrainer(cfg)
