"""The parts of the trainer: clipping, optimizers, the best checkpoint, the metrics file."""

import json
import math
import subprocess
import sys

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ghm_d2.config import get_cfg
from ghm_d2.describe import describe_run, device_name, experiment_hash
from ghm_d2.errors import UsageError
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.training.hooks import BestCheckpoint, LossHistory
from ghm_d2.training.metrics.writers import MetricsWriter
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.trainer import GHMTrainer


class Quadratic(nn.Module):
    """Two parameters whose gradients are 30 and 40: a norm of 50 together."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, _batch):
        return {"loss": (30 * self.a + 40 * self.b).sum()}


def config(**solver):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR = 0.0, 0.0, 1.0
    for key, value in solver.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


def step(cfg) -> Quadratic:
    model = Quadratic()
    trainer = GHMTrainer(cfg, model, [[{}]], build_optimizer(cfg, model))
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
        assert trainer.storage.latest()["grad_norm"][0] == pytest.approx(50)
    return model


def test_full_model_clips_the_norm_of_all_gradients_together():
    cfg = config()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0
    model = step(cfg)
    assert (model.a.item(), model.b.item()) == pytest.approx((-3, -4), rel=1e-4)


def test_detectron2s_norm_clips_each_parameter():
    cfg = config()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0
    model = step(cfg)
    assert (model.a.item(), model.b.item()) == pytest.approx((-5, -5), rel=1e-4)


def test_without_clipping():
    model = step(config())
    assert (model.a.item(), model.b.item()) == pytest.approx((-30, -40))


def test_optimizers_by_name():
    assert isinstance(build_optimizer(config(), Quadratic()), torch.optim.SGD)
    assert isinstance(build_optimizer(config(OPTIMIZER="ADAMW"), Quadratic()), torch.optim.AdamW)
    with pytest.raises(UsageError, match="SGD, ADAMW"):
        build_optimizer(config(OPTIMIZER="LION"), Quadratic())


def test_the_best_weights_are_kept_and_the_best_survives_a_resume(tmp_path):
    model = Quadratic()
    best = BestCheckpoint(GHMCheckpointer(model, str(tmp_path)))
    for i, ap in enumerate((20.0, 30.0, None, 25.0)):
        nn.init.constant_(model.a, ap or 0.0)
        best.update(ap, i)
        if i == 1:
            state = best.state_dict()
            best = BestCheckpoint(GHMCheckpointer(model, str(tmp_path)))
            best.load_state_dict(state)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["model"]["a"].item() == 30.0
    assert best.best == {"AP": 30.0, "iteration": 1}
    nn.init.constant_(model.a, math.inf)
    best.update(40.0, 4)
    assert best.best == {"AP": 30.0, "iteration": 1}, "NaN or infinite weights are not kept"
    assert not (tmp_path / "last_checkpoint").exists()


def test_metrics_of_iterations_to_be_run_again_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"iteration": i, "loss": 1.0} for i in range(4)]
    file.write_text("\n".join(json.dumps(r) for r in rows) + '\n{"iteration": 4, "lo')
    writer = MetricsWriter(file, start_iter=2)
    with EventStorage(2) as storage:
        storage.put_scalars(loss=0.5, time=0.1)
        writer.write()
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["iteration"] for row in kept] == [0, 1, 2]
    assert kept[-1] == {"iteration": 2, "loss": 0.5}


def history_of(values, start=0, state=None, max_iter=4):
    """A `LossHistory` that has seen the losses `values` of the iterations from `start` on."""
    trainer = GHMTrainer(config(), Quadratic(), [[{}]], build_optimizer(config(), Quadratic()))
    history = LossHistory()
    trainer.register_hooks([history])
    trainer.max_iter, trainer.start_iter, trainer.done = max_iter, start, start
    if state:
        history.load_state_dict(state)
    with EventStorage(start) as trainer.storage:
        history.before_train()
        for trainer.iter, value in enumerate(values, start):
            trainer.storage.iter = trainer.iter
            trainer.storage.put_scalar("loss_cls", value)
            history.after_step()
            trainer.step_done()
        smoothed = trainer.storage.latest_with_smoothing_hint(20)["loss_cls"][0]
        return history.variation, history.state_dict(), smoothed


def test_the_variation_of_the_loss_is_of_the_second_half():
    assert history_of([100.0, 50.0])[0] is None
    whole = history_of([100.0, 50.0, 3.0, 1.0])
    assert whole[0] == pytest.approx(math.sqrt(2) / 2)
    state = json.loads(json.dumps(history_of([100.0, 50.0, 3.0])[1]))
    assert history_of([1.0], start=3, state=state) == whole
    assert history_of([1.0], start=3)[0] is None  # not all of the second half was seen
    assert history_of([1.0, 2.0], start=4, state=whole[1], max_iter=6)[0] is None


def test_the_configuration_hash_is_of_the_experiment():
    cfg = config()
    same = cfg.clone()
    same.SEED, same.OUTPUT_DIR, same.MODEL.DEVICE = 5, "elsewhere", "mps"
    same.MODEL.ANCHOR_GENERATOR.SIZES = [list(x) for x in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    other = cfg.clone()
    other.SOLVER.BASE_LR *= 2
    model = Quadratic()
    hashes = [describe_run(c, model, "d").config_hash for c in (cfg, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_configuration_hash_knows_ghm_where_a_loss_uses_it():
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = "GHMRetinaNet"
    other = cfg.clone()
    other.MODEL.GHM.CLS.BINS = 31
    for loss, differs in (("focal", False), ("ghm_c", True)):
        cfg.MODEL.RETINANET.CLS_LOSS_TYPE = other.MODEL.RETINANET.CLS_LOSS_TYPE = loss
        assert (experiment_hash(cfg) != experiment_hash(other)) == differs


def test_a_gpu_is_recorded_by_its_name(monkeypatch):
    names = {"cuda:1": "a big one"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.get)
    assert device_name("cuda:1") == "a big one"


def test_peak_memory_is_the_process_own():
    """On Linux, getrusage of a child process starts at the peak of its parent."""
    code = "from ghm_d2.describe import peak_memory_mb; print(peak_memory_mb('cpu'))"
    parent = "import subprocess, sys, numpy; numpy.ones((125, 2**20)); "  # 1 GB, given back
    done = subprocess.run(
        [sys.executable, "-c", parent + f"subprocess.run([sys.executable, '-c', {code!r}])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 50 < float(done.stdout) < 900
