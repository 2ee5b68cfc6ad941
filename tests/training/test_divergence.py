"""A NaN or infinite loss or gradient stops the training before it harms the weights."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_batch import tiny_batch

from ghm_d2.config import load_config
from ghm_d2.errors import DataError, DivergedError
from ghm_d2.register import register_all
from ghm_d2.training.divergence import diverged, first_nonfinite_output
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.trainer import GHMTrainer


@pytest.fixture
def setup(tiny):
    def build(config="retinanet_ghm", *overrides):
        register_all()
        cfg = load_config(f"configs/quick/{config}.yaml", [*tiny, *overrides])
        cfg.MODEL.DEVICE = "cpu"
        torch.manual_seed(0)
        return cfg, build_model(cfg).train()

    return build


def trainer_of(cfg, model, batch):
    trainer = GHMTrainer(cfg, model, [batch], build_optimizer(cfg, model))
    trainer.iter = 7
    return trainer


@pytest.mark.parametrize("config", ["retinanet_ghm", "retinanet_focal", "faster_rcnn_ghm_r"])
def test_names_loss_iteration_and_module_and_leaves_the_weights(setup, config):
    cfg, model = setup(config)
    layer = (
        model.head.cls_subnet[0] if "retina" in config else model.roi_heads.box_predictor.cls_score
    )
    with torch.no_grad():
        layer.bias[0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = trainer_of(cfg, model, tiny_batch(3))
    with EventStorage(7) as trainer.storage, pytest.raises(DivergedError) as error:
        trainer.run_step()
    said = str(error.value)
    assert "iteration 7" in said and "loss_cls" in said and "SOLVER.BASE_LR" in said
    assert ("head.cls_subnet.0 at level p3" if "retina" in config else "cls_score") in said
    weights = {k for k, _ in model.named_parameters()}
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) or k.endswith("bias") for k in weights)


def test_names_the_feature_level(setup):
    _, model = setup()
    calls = []

    def break_the_third_level(_module, _inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) % 5 == 3 else output

    model.head.cls_score.register_forward_hook(break_the_third_level)
    where = first_nonfinite_output(model, tiny_batch(3))
    assert where == "head.cls_score at level p5"


def test_an_overflowing_gradient_stops_too(setup):
    cfg, model = setup()
    for p in model.head.bbox_pred.parameters():
        p.register_hook(lambda gradient: gradient * float("inf"))
    trainer = trainer_of(cfg, model, tiny_batch(3))
    with EventStorage(7) as trainer.storage, pytest.raises(DivergedError, match="gradient"):
        trainer.run_step()


def test_what_happened_is_told_in_brief_too(setup):
    _, model = setup()
    error = diverged(model, tiny_batch(3), "loss_cls is nan", 312)
    assert error.what == "iteration 312: loss_cls is nan"
    assert str(error).startswith(error.what) and len(str(error)) > len(error.what)


def test_looking_for_the_fault_changes_no_moving_average(setup):
    _, model = setup()
    with EventStorage(0):
        model(tiny_batch(3))
    before = {k: v.clone() for k, v in model.named_buffers()}
    diverged(model, tiny_batch(3), "loss_cls is nan", 0)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert before["ghm_c.density.ema"].any()


def test_proposals_that_are_not_finite_stop_too(setup):
    cfg, model = setup("faster_rcnn_sl1")
    with torch.no_grad():
        model.proposal_generator.rpn_head.anchor_deltas.bias[0] = float("nan")
    trainer = trainer_of(cfg, model, tiny_batch(3))
    with EventStorage(7) as trainer.storage, pytest.raises(DivergedError) as error:
        trainer.run_step()
    assert "rpn_head.anchor_deltas at level p3" in str(error.value)


def test_a_bad_image_is_an_error_of_the_data(setup):
    cfg, model = setup()
    trainer = trainer_of(cfg, model, [{"error": "a.jpg: cannot be read: truncated"}])
    with EventStorage(0) as trainer.storage, pytest.raises(DataError, match=r"a\.jpg"):
        trainer.run_step()
