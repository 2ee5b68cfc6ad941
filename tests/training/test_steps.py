"""Training steps: parts of a batch, mixed precision, and skipping a NaN loss or gradient."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_batch import tiny_batch
from torch import nn

from ghm_d2.config import check_config, get_cfg, load_config
from ghm_d2.errors import DataError, DivergedError, UsageError
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.register import register_all
from ghm_d2.training import train as train_module
from ghm_d2.training.hooks import FiniteCheckpointer
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.prepare import config_errors, scale_to_group
from ghm_d2.training.trainer import GHMTrainer


class Mean(nn.Module):
    """The loss is the weight times the mean of the numbers in the batch; a buffer counts calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.sizes = []

    def forward(self, batch):
        self.calls += 1
        self.sizes.append(len(batch))
        return {"loss_cls": self.weight * torch.tensor([item["x"] for item in batch]).mean()}


def config(*overrides):
    cfg = get_cfg()
    plain = ["SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.BASE_LR", 0.1]
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "SEED", 1, *plain, *overrides])
    return cfg


def trainer_of(cfg, batches, model=None, **kwargs):
    model = model or Mean()
    return GHMTrainer(cfg, model, batches, build_optimizer(cfg, model), **kwargs)


def run(trainer, steps):
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(steps):
            trainer.storage.iter = trainer.iter
            trainer.run_step()
            trainer.step_done()
    return trainer.detector


def items(*numbers):
    return [{"x": float(x), "file_name": f"{x}.jpg"} for x in numbers]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(parts):
    trainer = trainer_of(config("SOLVER.ACCUMULATE", parts), [items(1, 2, 3, 10)])
    model = run(trainer, 1)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 4)
    assert model.sizes == [4 // parts] * parts
    assert trainer.storage.latest()["total_loss"][0] == pytest.approx(4)


NAN = float("nan")


def test_a_step_that_is_not_finite_stops_and_changes_nothing(tmp_path):
    trainer = trainer_of(config(), [items(1, 3), items(5, NAN)])
    trainer.divergence_file = tmp_path / "divergence.jsonl"
    with pytest.raises(DivergedError, match="iteration 1: loss_cls is nan"):
        run(trainer, 2)
    assert trainer.detector.weight.item() == pytest.approx(0.8)
    assert trainer.detector.calls.item() == 1  # of the buffers too
    (row,) = map(json.loads, trainer.divergence_file.read_text().splitlines())
    assert row["iteration"] == 1 and row["action"] == "stopped"
    assert row["losses"] == {"loss_cls": "nan"} and row["images"] == ["5.jpg", "nan.jpg"]
    assert row["grad_norms_before"] == [2.0]


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(tmp_path):
    said = []
    limit = ["SOLVER.ON_DIVERGENCE", "skip", "SOLVER.MAX_SKIPPED_STEPS", 2]
    bad, good = items(NAN), items(2)
    trainer = trainer_of(config(*limit), [good, bad, good, bad, good, bad], tell=said.append)
    trainer.divergence_file = tmp_path / "divergence.jsonl"
    run(trainer, 5)
    assert trainer.skipped == 2 and len(said) == 2 and "iteration 1" in said[0]
    assert trainer.detector.weight.item() == pytest.approx(1 - 3 * 0.2)
    assert trainer.detector.calls.item() == 3
    resumed = trainer_of(config(*limit), [bad])
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(DivergedError):
        run(resumed, 1)
    rows = [json.loads(x) for x in trainer.divergence_file.read_text().splitlines()]
    assert [row["action"] for row in rows] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    ("name", "layer", "words", "said"),
    [
        ("faster_rcnn_ghm_r", "proposal_generator.rpn_head.anchor_deltas", [], "proposals"),
        ("fcos", "head.bbox_pred", [], "predicted boxes"),
        ("retinanet_ghm_c", "head.bbox_pred", ["BBOX_REG_LOSS_TYPE", "giou"], "predicted boxes"),
    ],
)
def test_what_stops_a_forward_pass_is_skipped_too(name, layer, words, said, tiny, tmp_path):
    """Detectron2 raises FloatingPointError for such proposals, and GIoU asserts."""
    register_all()
    words = [f"MODEL.RETINANET.{words[0]}", words[1]] if words else []
    own = ["MODEL.DEVICE", "cpu", "SEED", "1", "SOLVER.ON_DIVERGENCE", "skip"]
    cfg = load_config(f"configs/quick/{name}.yaml", [*tiny, *own, *words])
    torch.manual_seed(0)
    model = build_model(cfg)
    model.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: output * (NAN if trainer.iter == 1 else 1)
    )
    trainer = trainer_of(cfg, [tiny_batch(3)] * 3, model)
    trainer.divergence_file = tmp_path / "divergence.jsonl"
    run(trainer, 3)
    assert trainer.skipped == 1 and trainer.done == 3
    (row,) = map(json.loads, trainer.divergence_file.read_text().splitlines())
    assert said in row["what"] and row["iteration"] == 1 and layer in row["where"]


def test_an_assertion_that_has_another_cause_is_a_fault():
    class Fault(Mean):
        def forward(self, batch):
            raise AssertionError("a fault")

    with pytest.raises(AssertionError, match="a fault"):
        run(trainer_of(config("SOLVER.ON_DIVERGENCE", "skip"), [items(1)], Fault()), 1)


def test_bad_images_are_named_once_and_limited():
    said = []
    cfg = config("DATALOADER.MAX_BAD_IMAGES", 1)
    batches = [items(1), items(1), items(1)]
    batches[0][0]["faults"] = batches[1][0]["faults"] = {"a.jpg": "a.jpg: cannot be read"}
    batches[2][0]["faults"] = {"b.jpg": "b.jpg: cannot be read"}
    trainer = trainer_of(cfg, batches, tell=said.append)
    with pytest.raises(DataError, match=r"b\.jpg.*MAX_BAD_IMAGES is 1"):
        run(trainer, 3)
    assert len(said) == 2 and "a.jpg" in said[0]
    assert trainer.done == 2 and list(trainer.bad_images) == ["a.jpg", "b.jpg"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = trainer_of(config(), [items(1)])
    checkpointer = GHMCheckpointer(trainer.detector, str(tmp_path))
    hook = FiniteCheckpointer(checkpointer, 1)
    trainer.register_hooks([hook])
    trainer.max_iter = 9
    hook.before_train()
    hook.after_step()
    with torch.no_grad():
        trainer.detector.weight.fill_(float("inf"))
    trainer.iter = 1
    with pytest.raises(DivergedError, match="weights"):
        hook.after_step()
    assert [f.name for f in tmp_path.glob("*.pth")] == ["model_0000000.pth"]


@pytest.mark.parametrize("config_name", ["retinanet_ghm", "faster_rcnn_ghm_r"])
def test_bfloat16_trains_on_a_cpu_with_losses_in_float32(config_name, tiny):
    register_all()
    amp = ["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu", "SEED", "1"]
    cfg = load_config(f"configs/quick/{config_name}.yaml", [*tiny, *amp])
    check_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    kinds = []
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    next(layers).register_forward_hook(lambda _module, _inputs, out: kinds.append(out.dtype))
    # of a map of 1 x 1, as of 64 px, PyTorch's bfloat16 gives some gradients as NaN
    trainer = trainer_of(cfg, [tiny_batch(3, (128, 128))] * 3, model)
    before = {k: v.clone() for k, v in model.named_parameters()}
    losses = []
    forward = model.forward
    model.forward = lambda batch: losses.append(forward(batch)) or losses[-1]
    run(trainer, 3)
    assert set(kinds) == {torch.bfloat16}
    assert {x.dtype for row in losses for x in row.values()} == {torch.float32}
    assert any(not torch.equal(v, before[k]) for k, v in model.named_parameters())


def test_under_loss_scaling_an_overflow_is_the_scalers_to_skip():
    cfg = config("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")
    trainer = trainer_of(cfg, [items(2)] * 2)
    handle = trainer.detector.weight.register_hook(lambda gradient: gradient * float("inf"))
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
        assert trainer.detector.weight.item() == 1 and trainer.skipped == 0
        scale = trainer.state_dict()["scaler"]["scale"]
        handle.remove()
        trainer.run_step()
    assert trainer.detector.weight.item() == pytest.approx(0.8)
    resumed = trainer_of(cfg, [items(2)])
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.state_dict()["scaler"]["scale"] == scale == 2**15


def test_a_gradient_that_overflows_at_any_scale_stops_the_training():
    cfg = config("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")
    trainer = trainer_of(cfg, [items(2)] * 20)
    trainer.detector.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match="gradient's norm is nan"):
        run(trainer, 20)
    assert trainer.iter == 16  # the scale begins at 2**16


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SOLVER.AMP.DTYPE", "float16", "bfloat16"),
        ("SOLVER.AMP.DTYPE", "half", "float16, bfloat16"),
        ("SOLVER.ON_DIVERGENCE", "ignore", "stop, skip"),
        ("SOLVER.ACCUMULATE", 0, "at least 1"),
        ("SOLVER.MAX_SKIPPED_STEPS", -1, "at least 0"),
        ("DATALOADER.MAX_BAD_IMAGES", -1, "at least 0"),
    ],
)
def test_values_that_cannot_be(key, value, said):
    with pytest.raises(UsageError, match=said):
        check_config(config("SOLVER.AMP.ENABLED", True, key, value))


def test_the_batch_is_shared_and_scaled_as_detectron2_scales_it(monkeypatch):
    monkeypatch.setattr(train_module.comm, "get_world_size", lambda: 4)
    cfg = config("SOLVER.IMS_PER_BATCH", 16, "SOLVER.MAX_ITER", 1000, "SOLVER.STEPS", (800,))
    same, said = scale_to_group(cfg)
    assert same.SOLVER == cfg.SOLVER and "4 processes" in said and "not scaled" in said
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    scaled, said = scale_to_group(cfg)
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (8, 0.05, 2000)
    assert all(x in said for x in ("REFERENCE_WORLD_SIZE 8", "0.05", "2000"))
    assert scale_to_group(cfg, resume=True)[0].SOLVER == cfg.SOLVER  # the schedule it began with
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH = 0, 6
    with pytest.raises(UsageError, match=r"number of processes \(4\)"):
        scale_to_group(cfg)
    monkeypatch.setattr(train_module.comm, "get_world_size", lambda: 1)
    assert scale_to_group(cfg) == (cfg, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("NN"), "the configuration is invalid: the name 'NN' is not known"),
        (
            KeyError("No object named 'X' found in 'META_ARCH'!\n..."),
            "No object named 'X' found in",
        ),
        (AssertionError("2 images\nfor 3"), "the configuration is invalid: 2 images$"),
    ],
)
def test_what_detectron2_refuses_is_one_line(error, said):
    with pytest.raises(UsageError, match=said), config_errors():
        raise error
