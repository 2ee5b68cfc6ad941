"""The ratio of the gradients of classification and of boxes: right, and without effect."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_batch import tiny_batch
from torch import nn

from ghm_d2.config import load_config
from ghm_d2.register import register_all
from ghm_d2.training.metrics.gradient_ratio import shared_features, squared_norms
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.trainer import GHMTrainer

NAME = "grad_ratio_cls_box"
AMP = ("SOLVER.AMP.ENABLED", "True")
PARTS = ("SOLVER.ACCUMULATE", "2", "DATALOADER.NUM_WORKERS", "0")


def built(name, tiny, *words):
    register_all()
    own = [*tiny, "MODEL.DEVICE", "cpu", "SEED", "1", *words]
    cfg = load_config(f"configs/quick/{name}.yaml", own)
    torch.manual_seed(0)
    return cfg, build_model(cfg).train()


def trained(name, tiny, words, period) -> tuple[GHMTrainer, dict]:
    """After two steps, with the values of the second."""
    cfg, model = built(name, tiny, *words)
    # each image with an object, as each is a part of its own; 1 x 1 maps are NaN in bfloat16
    item = tiny_batch(3, (128, 128))[0]
    item["image"] = torch.randint(0, 256, item["image"].shape, dtype=torch.uint8)
    batch = [item] * 2
    trainer = GHMTrainer(cfg, model, [batch] * 2, build_optimizer(cfg, model))
    trainer.ratio_period = period
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(2):
            trainer.storage.iter = trainer.iter
            trainer.run_step()
            trainer.step_done()
        return trainer, trainer.storage.latest()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("retinanet_ghm", AMP),
        ("fcos", PARTS),
        ("dssd_ghm", ()),
        ("yolov3_ghm", ()),
        ("faster_rcnn_ghm_r", ()),
    ],
)
def test_measuring_changes_no_bit_of_the_training(name, words, tiny):
    measured, values = trained(name, tiny, words, period=2)
    assert values[NAME][0] > 0 and values[NAME][1] == 1, "of the second step alone"
    plain, others = trained(name, tiny, words, period=0)
    assert NAME not in others
    assert values["grad_norm"] == others["grad_norm"]
    states = measured.detector.state_dict(), plain.detector.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


class Maps(nn.Module):
    """Feature maps that are nobody's function."""

    size_divisibility, padding_constraints = 32, {}

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, _images):
        return self.maps


def test_it_is_of_the_gradients_at_the_maps_through_the_heads_alone(tiny):
    _, model = built("retinanet_ghm", tiny)
    batch = [tiny_batch(3)[0]] * 2
    with EventStorage(0), shared_features(model) as features:
        found = squared_norms(model(batch), features)
    assert len(features) == 5
    images = model.preprocess_image(batch).tensor
    maps = {k: v.detach().requires_grad_() for k, v in model.backbone(images).items()}
    model.backbone = Maps(maps)
    names = ("loss_cls", "loss_box_reg")
    for name, squared in zip(names, found.tolist(), strict=True):
        for value in model.buffers():
            value.zero_() if value.dtype.is_floating_point and value.dim() == 2 else None
        with EventStorage(0):
            gradients = torch.autograd.grad(model(batch)[name], list(maps.values()))
        expected = sum(g.double().square().sum().item() for g in gradients)
        assert squared == pytest.approx(expected, rel=1e-4), name


class Another(nn.Module):
    """A detector that is not known, with losses of the known names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, _batch):
        return {"loss_cls": self.weight**2, "loss_box_reg": self.weight}


def test_another_detector_is_left_alone(tiny):
    cfg, _ = built("retinanet_ghm", tiny)
    model = Another()
    trainer = GHMTrainer(cfg, model, [tiny_batch(3)], build_optimizer(cfg, model))
    trainer.ratio_period = 1
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
        assert NAME not in trainer.storage.latest()
