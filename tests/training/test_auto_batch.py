"""The batch that a GPU's memory holds, found by real training steps on a pretended GPU."""

import math

import pytest
import torch

from ghm_d2.cli import train as command
from ghm_d2.errors import UsageError
from ghm_d2.progress import Progress
from ghm_d2.training import auto_batch
from ghm_d2.training.auto_batch import fit_batch
from ghm_d2.training.prepare import prepare

LEAST, AN_IMAGE, TOTAL = 10, 5, 100  # what weights, each image of a batch, and a GPU are


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of TOTAL that trains on the CPU; the batches that were trained on."""
    tried, peak = [], [0]
    train = auto_batch._train_a_little

    def train_a_little(cfg, batch):
        if LEAST + AN_IMAGE * batch > TOTAL:
            raise torch.OutOfMemoryError
        cfg = cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
        train(cfg, batch)
        peak[0] = LEAST + AN_IMAGE * batch
        tried.append(batch)

    monkeypatch.setattr(auto_batch, "_train_a_little", train_a_little)
    for name, value in {
        "init": None,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "memory_reserved": 0,
        "max_memory_reserved": peak,
        "mem_get_info": (TOTAL, 2 * TOTAL),
    }.items():
        monkeypatch.setattr(
            torch.cuda,
            name,
            lambda *_, value=value: value[0] if isinstance(value, list) else value,
        )
    return tried


@pytest.fixture
def configured(tiny, digits_folder, tmp_path):
    def configure(*words):
        words = [*tiny, "TEST.EVAL_PERIOD", "1000", *(str(word) for word in words)]
        source, output = "quick/retinanet_ghm.yaml", tmp_path / "run"
        cfg = prepare(source, words, dataset=digits_folder, device="cpu", seed=1, output=output)
        cfg.MODEL.DEVICE = "cuda"
        return cfg

    return configure


def test_the_largest_batch_that_fits_is_found_and_the_schedule_sees_as_many_images(
    gpu, configured, tmp_path
):
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(32, 64)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    cfg = configured("SOLVER.MAX_ITER", 9000, "SOLVER.EMA_DECAY", 0.9, *sizes)
    found, line = fit_batch(cfg, Progress())
    before, after = cfg.SOLVER, found.SOLVER
    assert gpu == [2, 4, 8, 16]  # 16 fit, but leave too little room
    assert after.IMS_PER_BATCH == 8 and after.MAX_ITER == 2250 and found.TEST.EVAL_PERIOD == 250
    assert pytest.approx(before.BASE_LR * math.sqrt(4)) == after.BASE_LR
    assert after.REFERENCE_WORLD_SIZE == before.REFERENCE_WORLD_SIZE
    assert line.startswith("a batch of 8 takes 50% of the GPU's memory")
    assert "IMS_PER_BATCH 2 -> 8, BASE_LR 0.001 -> 0.002, MAX_ITER 9000 -> 2250" in line
    assert before.IMS_PER_BATCH == 2
    assert not (tmp_path / "run").exists()  # the trials write nothing


def test_sgd_is_scaled_with_the_batch(gpu, configured):
    cfg = configured("SOLVER.MAX_ITER", 9000, "SOLVER.OPTIMIZER", "SGD")
    assert pytest.approx(4 * cfg.SOLVER.BASE_LR) == fit_batch(cfg, Progress())[0].SOLVER.BASE_LR


def test_a_short_schedule_keeps_its_iterations(gpu, configured):
    found, _ = fit_batch(configured("SOLVER.MAX_ITER", 2100), Progress())
    assert found.SOLVER.IMS_PER_BATCH == 4 and found.SOLVER.MAX_ITER == 1050
    assert gpu == [2, 4]


def test_a_schedule_shorter_than_that_keeps_its_batch(gpu, configured):
    cfg = configured("SOLVER.MAX_ITER", 300)
    found, line = fit_batch(cfg, Progress())
    assert found.SOLVER == cfg.SOLVER and gpu == [2]
    assert line.endswith("a larger batch would leave fewer than 1,000 iterations")


def test_a_batch_that_does_not_fit_is_halved(gpu, configured):
    cfg = configured("SOLVER.IMS_PER_BATCH", 24, "SOLVER.MAX_ITER", 300)
    found, _ = fit_batch(cfg, Progress())
    assert found.SOLVER.IMS_PER_BATCH == 12 and found.SOLVER.MAX_ITER == 600


def test_parts_of_a_batch_share_the_memory_in_turn(gpu, configured):
    cfg = configured("SOLVER.MAX_ITER", 300, "SOLVER.IMS_PER_BATCH", 30, "SOLVER.ACCUMULATE", 3)
    assert fit_batch(cfg, Progress())[0].SOLVER.IMS_PER_BATCH == 15


def test_it_is_an_error_where_nothing_fits(gpu, configured):
    cfg = configured("SOLVER.IMS_PER_BATCH", 60, "SOLVER.ACCUMULATE", 30)
    with pytest.raises(UsageError, match=r"batch of 30 does not fit .* SOLVER.AMP"):
        fit_batch(cfg, Progress())


def test_the_command_says_what_to_do_without_a_gpu_and_in_a_resumed_run(ghm, tmp_path):
    words = ["train", "--config", "quick/retinanet_ghm.yaml", "--auto-batch", "--device", "cpu"]
    done = ghm(*words, cwd=tmp_path)
    assert done.returncode == 2 and "set SOLVER.IMS_PER_BATCH" in done.stderr.replace("\n", " ")
    done = ghm("train", "--resume", "--output", "x", "--auto-batch", cwd=tmp_path)
    assert done.returncode == 2 and "--auto-batch" in done.stderr


def test_a_relaunched_run_keeps_the_batch_that_was_found(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    asked = []
    monkeypatch.setattr(command, "was_begun", lambda folder: True)
    monkeypatch.setattr(command, "_train", lambda *_, **how: asked.append(how))
    command.train(config="quick/retinanet_ghm.yaml", output=tmp_path, auto_batch=True)
    (how,) = asked
    assert how["resume"] and not how["auto_batch"]
