"""The shipped recipes in a training script that is written for Detectron2's `DefaultTrainer`."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from ghm_d2.config import add_ghm_config, config_text, find_config, list_configs, load_config
from ghm_d2.data.catalog import apply_to_config
from ghm_d2.data.loading.loaders import GHMDatasetMapper
from ghm_d2.errors import DataError, UsageError
from ghm_d2.progress import Progress
from ghm_d2.register import register_all
from ghm_d2.training.default_trainer import GHMDefaultTrainer
from ghm_d2.training.optimizer import ClippedSGD
from ghm_d2.training.train import set_up
from ghm_d2.training.trainer import GHMTrainer, _step_seed

REMEDY = "from ghm_d2.training.default_trainer import GHMDefaultTrainer as DefaultTrainer"
SMALL_RESNET = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
# what Detectron2's trainer reads too
PLAIN = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]


@pytest.fixture
def recipe(tiny, digits_folder, tmp_path):
    """The recipe of a name, tiny, for one iteration on digits."""

    def make(name: str, *words: str):
        register_all()
        end = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "1"]
        end += ["SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "0", "SEED", "3"]
        cfg = load_config(name, [*tiny, *end, "OUTPUT_DIR", str(tmp_path), *words])
        apply_to_config(cfg, digits_folder)
        return cfg

    return make


def losses_of(storage) -> dict[str, float]:
    return {name: value for name, (value, _) in storage.latest().items() if name.startswith("loss")}


def our_step(cfg, batch=None):
    """The losses of the first iteration of `ghm train`, and the weights before it.

    Args:
        batch: of that iteration; None takes it from the loader.
    """
    trainer, *_ = set_up(cfg, False, Progress())
    weights = copy.deepcopy(trainer.detector.state_dict())
    if batch:
        trainer = GHMTrainer(cfg, trainer.detector, [batch], trainer.optimizer)
    trainer.iter = 0
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
    return losses_of(trainer.storage), weights


def ignored_keys(name: str) -> list[str]:
    """The keys of a recipe that Detectron2's trainer does not know."""
    keys = []
    if name.startswith("quick/"):
        keys.append("SOLVER.OPTIMIZER ADAMW")
    if not name.startswith("coco/yolov3"):
        keys.append("SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model")
    if "ssd" in name:
        keys.append("INPUT.RESIZE square")
    if name.startswith("coco/") and ("ssd" in name or "yolo" in name):
        keys.append("INPUT.AUGMENTATION ssd" if "ssd" in name else "INPUT.AUGMENTATION yolo")
    return keys


@pytest.mark.parametrize("name", list_configs())
def test_detectron2_reads_the_file_as_ghm_does(name):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(find_config(name)))
    assert config_text(cfg) == config_text(load_config(name))


@pytest.mark.parametrize("name", list_configs())
def test_detectron2s_trainer_is_refused_with_the_line_that_mends_the_script(name, recipe):
    cfg = recipe(name, "MODEL.DEVICE", "meta")
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        DefaultTrainer(cfg)
    assert str(caught.value).endswith(f"`{REMEDY}`")
    assert all(key in str(caught.value) for key in ignored_keys(name)) and ignored_keys(name)


@pytest.mark.parametrize("trainer", [DefaultTrainer, GHMDefaultTrainer])
@pytest.mark.parametrize(
    "words",
    [
        ("SOLVER.EMA_DECAY", "0.9"),
        ("SOLVER.PATIENCE", "2", "TEST.EVAL_PERIOD", "1"),
        ("SOLVER.CHECKPOINTS_KEPT", "1"),
        ("SOLVER.TRACKERS", "('wandb',)"),
    ],
)
def test_keys_that_ghm_train_alone_reads_are_no_secret_to_a_script(trainer, words, recipe):
    cfg = recipe("quick/retinanet_ghm.yaml", *words, "MODEL.DEVICE", "meta")
    with torch.device("meta"), pytest.raises(UsageError, match=rf"{words[0]} .*ghm train"):
        trainer(cfg)


def slow_but_one_a_detector(name: str):
    quick = name.startswith("quick/") and name.endswith(("_ghm.yaml", "_ghm_r.yaml", "_ghm_c.yaml"))
    fast = quick and name != "quick/retinanet_ghm_c.yaml"
    return pytest.param(name, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize("name", [slow_but_one_a_detector(n) for n in list_configs()])
def test_our_trainer_in_its_place_trains_as_ghm_train_does(name, recipe):
    cfg = recipe(name, *(SMALL_RESNET if "_R_50_" in name else []))
    ours, weights = our_step(cfg)
    trainer = GHMDefaultTrainer(cfg)
    trainer.model.load_state_dict(weights)
    trainer.train()
    assert losses_of(trainer.storage) == pytest.approx(ours, rel=1e-6)
    assert len(ours) >= 2


@pytest.mark.parametrize("name", ["retinanet_ghm", "faster_rcnn_ghm_r", "mask_rcnn_ghm_r"])
def test_detectron2s_trainer_trains_alike_where_it_knows_all_keys(name, recipe):
    cfg = recipe(f"quick/{name}.yaml", *PLAIN, "INPUT.RANDOM_FLIP", "none")
    seed_all_rng(cfg.SEED)  # as default_setup does
    trainer, batch = DefaultTrainer(cfg), []

    def look(_model, inputs):
        batch.extend(inputs[0])
        seed_all_rng(_step_seed(cfg.SEED, 0, 0))  # as ours does; anchors and proposals are drawn

    trainer.model.register_forward_pre_hook(look)
    weights = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    ours, initial = our_step(cfg, batch)
    assert all(torch.equal(weights[name], value) for name, value in initial.items())
    assert losses_of(trainer.storage) == pytest.approx(ours, rel=1e-4)
    for item in batch:
        assert_mapped_alike(item, cfg)


def assert_mapped_alike(item: dict, cfg) -> None:
    """Our mapper gives the same sample, but for boxes of whole px, whose fractions it keeps."""
    images = {image["file_name"]: image for image in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])}
    mine = GHMDatasetMapper(cfg, True)(images[item["file_name"]])
    assert torch.equal(mine["image"], item["image"])
    assert torch.equal(mine["instances"].gt_classes, item["instances"].gt_classes)
    boxes = mine["instances"].gt_boxes.tensor, item["instances"].gt_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=0, atol=1)


def test_who_overrides_a_method_answers_for_its_keys(recipe):
    class Trainer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return ClippedSGD(model.parameters(), lr=cfg.SOLVER.BASE_LR, max_norm=1.0)

    Trainer(recipe("quick/retinanet_ghm.yaml"))
    with pytest.raises(UsageError, match=r"INPUT.RESIZE square, SOLVER.ACCUMULATE 2; write"):
        Trainer(recipe("quick/ssd_ghm.yaml", "SOLVER.ACCUMULATE", "2"))


def test_a_model_that_is_not_to_be_trained_is_never_refused(recipe):
    cfg = recipe("quick/ssd_ghm.yaml")
    assert DefaultTrainer.build_model(cfg).training
    assert "instances" in DefaultPredictor(cfg)(np.zeros((64, 80, 3), np.uint8))


def test_a_run_goes_on_with_its_optimizer(recipe):
    cfg = recipe("quick/retinanet_ghm.yaml", "SOLVER.CHECKPOINT_PERIOD", "1")
    GHMDefaultTrainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 2
    trainer = GHMDefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert (trainer.start_iter, steps) == (1, {1})
    trainer.train()


def test_an_image_that_cannot_be_read_is_named_in_evaluation(recipe, tmp_path):
    cfg = recipe("quick/retinanet_ghm.yaml")
    (image, *_) = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    DatasetCatalog.register("with_a_broken_image", lambda: [image | {"file_name": str(broken)}])
    loader = GHMDefaultTrainer.build_test_loader(cfg, "with_a_broken_image")
    with pytest.raises(DataError, match=r"broken\.jpg: cannot be read"):
        next(iter(loader))
