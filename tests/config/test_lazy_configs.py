"""The files for Detectron2's lazy trainer, configs/lazy, beside their twins in YAML."""

import shutil
from importlib.resources import files

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from tiny_batch import tiny_batch

from ghm_d2.config import load_config
from ghm_d2.register import register_all
from ghm_d2.training.optimizer import build_optimizer

WIDTH = 32  # channels of the FPN and of the heads
TINY = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": str(WIDTH),
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.FCOS.NUM_CONVS": "1",
    "MODEL.ROI_BOX_HEAD.FC_DIM": str(WIDTH),
}
PAIRS = {
    "retinanet_ghm": "coco/retinanet_R_50_FPN_ghm_1x.yaml",
    "faster_rcnn_ghm_r": "coco/faster_rcnn_R_50_FPN_ghm_r_1x.yaml",
    "fcos_ghm_c": "coco/fcos_R_50_FPN_ghm_c_1x.yaml",
}


def lazy(name: str):
    return LazyConfig.load(str(files("ghm_d2.configs") / "lazy" / f"{name}.py"))


def tiny(cfg):
    """A lazy configuration's model as `TINY` makes a YAML's."""
    model, shape = cfg.model, ShapeSpec(channels=WIDTH)
    stages = model.backbone.bottom_up.stages
    stages.depth = 18
    del stages.stride_in_1x1  # ResNet-18 has no 1x1 convolutions
    model.backbone.out_channels = WIDTH
    if "roi_heads" in model:
        model.proposal_generator.head.in_channels = WIDTH
        box_head = model.roi_heads.box_head
        box_head.input_shape = ShapeSpec(channels=WIDTH, height=7, width=7)
        box_head.fc_dims = [WIDTH, WIDTH]
        model.roi_heads.box_predictor.input_shape = shape
    else:
        of_p5 = model.backbone.top_block.get("in_feature") == "p5"
        model.backbone.top_block.in_channels = WIDTH if of_p5 else 512
        model.head.input_shape, model.head.conv_dims = [shape] * 5, [WIDTH]
    return cfg


def step(model, optimizer) -> dict[str, float]:
    """The losses of one step of Detectron2's lazy trainer."""
    trainer = SimpleTrainer(model, [tiny_batch(80)], optimizer)
    torch.manual_seed(0)  # anchors and proposals are drawn
    trainer.iter = 0
    with EventStorage(0) as storage:
        trainer.run_step()
        return {k: v for k, (v, _) in storage.latest().items() if "loss" in k}


@pytest.mark.parametrize(("name", "twin"), PAIRS.items())
def test_a_step_of_detectron2s_trainer_is_that_of_the_yaml(name, twin):
    register_all()
    cfg = load_config(twin, [word for pair in TINY.items() for word in pair])
    theirs, lazy_cfg = build_model(cfg), tiny(lazy(name))
    ours = instantiate(lazy_cfg.model)
    assert type(ours) is type(theirs)
    ours.load_state_dict(theirs.state_dict())
    lazy_cfg.optimizer.params.model = ours
    losses = step(ours, instantiate(lazy_cfg.optimizer))
    assert losses == pytest.approx(step(theirs, build_optimizer(cfg, theirs)), rel=1e-6)
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
        assert mine.requires_grad == expected.requires_grad


@pytest.mark.parametrize(("name", "twin"), PAIRS.items())
def test_data_and_schedule_are_the_yamls(name, twin):
    cfg, mine = load_config(twin), lazy(name)
    train, test = mine.dataloader.train, mine.dataloader.test
    assert train.dataset.names == cfg.DATASETS.TRAIN[0]
    assert test.dataset.names == cfg.DATASETS.TEST[0]
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert tuple(train.mapper.augmentations[0].short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN
    assert not train.mapper.use_instance_mask
    assert mine.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert mine.train.max_iter == cfg.SOLVER.MAX_ITER
    assert mine.train.eval_period == cfg.TEST.EVAL_PERIOD
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR)
    assert mine.optimizer.lr == cfg.SOLVER.BASE_LR
    theirs, multiplier = build_lr_scheduler(cfg, optimizer), instantiate(mine.lr_multiplier)
    for done in (0.0, 0.005, 0.5, 0.7, 0.95):
        assert multiplier(done) == pytest.approx(theirs._multiplier(done))


def test_a_file_of_ones_own_builds_upon_them(tmp_path):
    """The files of configs/lazy can be copied and built upon."""
    folder = tmp_path / "lazy"
    shutil.copytree(str(files("ghm_d2.configs") / "lazy"), folder)
    (folder / "mine.py").write_text(
        "from .retinanet_ghm import dataloader, lr_multiplier, model, optimizer, train\n"
        "model.num_classes = 3\n"
    )
    assert LazyConfig.load(str(folder / "mine.py")).model.head.num_classes == 3


def test_ghm_runs_no_python_file(ghm, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = ghm("train", "--config", file)
    assert done.returncode == 2
    assert "ghm does not execute Python configurations" in done.stderr
    assert not (tmp_path / "ran").exists()
