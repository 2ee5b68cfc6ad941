"""Averaged weights, early stopping, how many checkpoints are kept: whole runs, resumed too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghm_d2.errors import UsageError
from ghm_d2.inference.evaluation.evaluate import evaluate
from ghm_d2.records import RunRecord
from ghm_d2.training import train as training
from ghm_d2.training.prepare import prepare

ITERATIONS = 6


@pytest.fixture
def run(tiny, digits_folder):
    """Trains into a folder; `end` is the iteration after which the run is cut off."""

    def train(folder: Path, *words, resume=False, end=0, aps=()) -> RunRecord:
        words = [*tiny, "SOLVER.MAX_ITER", ITERATIONS, "TEST.EVAL_PERIOD", 2, *words]
        words = [str(word) for word in words]
        source = str(folder / "config.yaml") if resume else "quick/retinanet_ghm.yaml"
        options = {"device": "cpu", "seed": None if resume else 1, "output": folder}
        cfg = prepare(source, words, dataset=digits_folder, resume=resume, **options)
        folder.mkdir(exist_ok=True)
        patched = pytest.MonkeyPatch()
        if end:

            def after_step(self):  # as after Ctrl-C
                if self.trainer.done == end:
                    raise KeyboardInterrupt

            patched.setattr(training.StopOnSignal, "after_step", after_step)
        if aps:
            left = iter(aps)

            def judged(*arguments):
                found = evaluate(*arguments)
                return replace(found, metrics=found.metrics | {"AP": next(left)})

            patched.setattr(training, "evaluate", judged)
        try:
            return training.train(cfg, "digits", resume=resume)[0]
        except KeyboardInterrupt:
            return RunRecord.read(folder)
        finally:
            patched.undo()

    return train


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def last_weights(file: Path) -> dict[str, torch.Tensor]:
    """The weights that the next step starts from."""
    return torch.load(file, weights_only=True)["trainer"]["hooks"]["AveragedWeights"]["last"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_averaged_weights_are_those_of_all_steps_and_survive_a_resume(run, tmp_path):
    decay = ("SOLVER.EMA_DECAY", 0.25, "SOLVER.CHECKPOINT_PERIOD", 1)
    plain, whole, resumed = (tmp_path / name for name in ("plain", "whole", "resumed"))
    run(plain, "SOLVER.CHECKPOINT_PERIOD", 1)
    run(whole, *decay)
    run(resumed, *decay, end=3)
    record = run(resumed, *decay, resume=True)
    assert same(last_weights(whole / "model_final.pth"), weights(plain / "model_final.pth"))

    name = "head.cls_score.bias"
    steps = [weights(plain / f"model_{i:07d}.pth")[name] for i in range(ITERATIONS)]
    average = steps[0]
    for n, value in enumerate(steps[1:], 1):
        average = torch.lerp(average, value, 1 - min(0.25, (1 + n) / (10 + n)))
    averaged = weights(whole / "model_final.pth")
    torch.testing.assert_close(averaged[name], average)
    assert not torch.equal(averaged[name], steps[-1])

    assert same(weights(resumed / "model_final.pth"), averaged)
    last = last_weights(resumed / "model_final.pth")
    assert same(last, last_weights(whole / "model_final.pth"))
    assert record.metrics == RunRecord.read(whole).metrics


def test_with_everything_on_a_resumed_run_is_the_same_to_the_bit(run, tmp_path):
    words = [
        ("SOLVER.EMA_DECAY", 0.9),
        ("INPUT.MOSAIC", 0.5),
        ("INPUT.MIXUP", 0.5),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("DATALOADER.REPEAT_THRESHOLD", 1.0),
        ("MODEL.CLASS_WEIGHTING", "effective"),
        ("MODEL.RETINANET.ASSIGNMENT", "atss"),
        ("SOLVER.CHECKPOINTS_KEPT", 1),
        ("SOLVER.CHECKPOINT_PERIOD", 2),
    ]
    words = [word for pair in words for word in pair]
    run(tmp_path / "whole", *words)
    run(tmp_path / "resumed", *words, end=3)
    run(tmp_path / "resumed", *words, resume=True)
    states = []
    for folder in (tmp_path / "whole", tmp_path / "resumed"):
        state = torch.load(folder / "model_final.pth", weights_only=True)
        del state["trainer"]["seconds"]
        states.append(flat(state))
    assert states[0].keys() == states[1].keys() and len(states[0]) > 300
    differing = [key for key, value in states[0].items() if not equal(value, states[1][key])]
    assert not differing
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert rows[0] == rows[1]


def flat(value, name=""):
    """Everything in a checkpoint, by its path."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in pairs for k, v in flat(part, f"{name}/{key}").items()}


def equal(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_judged_and_kept_as_the_best_is_the_average(run, tmp_path, monkeypatch):
    seen = []

    def judged(model, *arguments):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *arguments)

    monkeypatch.setattr(training, "evaluate", judged)
    run(tmp_path / "a", "SOLVER.EMA_DECAY", 0.9)
    assert same(seen[-1], weights(tmp_path / "a" / "model_final.pth"))
    best = weights(tmp_path / "a" / "model_best.pth")
    assert any(same(best, kept) for kept in seen)


def test_a_training_ends_after_evaluations_without_a_higher_ap(run, tmp_path):
    folder = tmp_path / "early"
    # after 2, 4, 6 and 8 iterations, and of the best weights once more
    words = ("SOLVER.PATIENCE", 2, "SOLVER.MAX_ITER", 20)
    record = run(folder, *words, aps=[10.0, 30.0, 20.0, 29.0, 30.0])
    assert record.status == "finished" and record.iterations == 8
    assert "8 of 20 iterations" in record.outcome and "2 evaluations" in record.outcome
    assert record.metrics["AP"] == 30.0 and record.best == {"AP": 30.0, "iteration": 4}
    final, best = (weights(folder / f"model_{name}.pth") for name in ("final", "best"))
    assert same(final, best)
    assert (folder / "last_checkpoint").read_text() == "model_0000007.pth"
    # there is nothing left to do, unless somebody has more patience
    again = run(folder, *words, resume=True, aps=[30.0])
    assert again.iterations == 8
    longer = (*words[:1], 4, "SOLVER.MAX_ITER", 12)
    more = run(folder, *longer, resume=True, aps=[25.0, 26.0, 30.0])
    assert more.iterations == 12 and more.outcome.startswith("ended after 12") is False


def test_a_cut_off_run_is_as_patient_as_before(run, tmp_path):
    folder = tmp_path / "early"
    words = ("SOLVER.PATIENCE", 2, "SOLVER.MAX_ITER", 20)
    run(folder, *words, end=5, aps=[10.0, 30.0])
    record = run(folder, *words, resume=True, aps=[20.0, 29.0, 30.0])
    assert record.iterations == 8 and record.best == {"AP": 30.0, "iteration": 4}


@pytest.mark.parametrize("end", [0, 3])
def test_the_newest_checkpoints_are_kept(run, tmp_path, end):
    folder = tmp_path / "kept"
    words = ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_KEPT", 2)
    run(folder, *words, end=end)
    if end:
        run(folder, *words, resume=True)
    numbered = sorted(file.name for file in folder.glob("model_[0-9]*.pth"))
    assert numbered == ["model_0000004.pth", "model_0000005.pth"]
    assert (folder / "model_final.pth").is_file() and (folder / "model_best.pth").is_file()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["iteration"] for line in lines]
    assert max(steps) == ITERATIONS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.EMA_DECAY", "1.0"], "EMA_DECAY must be at least 0 and below 1"),
        (["SOLVER.EMA_DECAY", "0.9", "TEST.PRECISE_BN.ENABLED", "True"], "PRECISE_BN"),
        (["SOLVER.PATIENCE", "3", "TEST.EVAL_PERIOD", "0"], "TEST.EVAL_PERIOD above 0"),
    ],
)
def test_settings_that_contradict_each_other(run, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "none", *words)
    assert not (tmp_path / "none").exists()
