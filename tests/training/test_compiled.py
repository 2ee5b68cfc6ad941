"""Training with a compiled backbone and head: the same losses, and exact when it is resumed."""

import json

import pytest
import torch

from ghm_d2.training.prepare import prepare
from ghm_d2.training.train import train


@pytest.mark.slow
def test_a_compiled_training_has_the_same_losses_and_resumes_to_the_bit(
    tiny, digits_folder, tmp_path, monkeypatch
):
    # traced as always, but not turned into C++, which takes minutes
    compile_part, compiled_parts = torch.nn.Module.compile, []

    def traced(part, **how):
        compiled_parts.append(type(part).__name__)
        compile_part(part, **how, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)

    def run(name, last, *words, resume=False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        # images of two sizes: nothing may depend on which came first
        words = [*tiny, "INPUT.MIN_SIZE_TRAIN", "(64, 96)", "TEST.EVAL_PERIOD", "2", *words]
        source = str(folder / "config.yaml") if resume else "quick/retinanet_ghm.yaml"
        options = {"device": "cpu", "seed": None if resume else 1, "output": folder}
        cfg = prepare(source, words, dataset=digits_folder, resume=resume, **options)
        cfg.SOLVER.MAX_ITER = last
        torch.compiler.reset()  # as in a new process
        train(cfg, "digits", resume=resume)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return rows, torch.load(folder / "model_final.pth", weights_only=True)["model"]

    rate = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "()")
    plain, weights = run("plain", 4, *rate)
    compiled, whole = run("compiled", 4, *rate, "MODEL.COMPILE", "True")
    assert compiled_parts == ["FPN", "RetinaNetHead"] and whole.keys() == weights.keys()
    losses = [[r["loss_cls"] for r in rows if "loss_cls" in r] for rows in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) > 1
    run("parts", 2, *rate, "MODEL.COMPILE", "True")
    _, again = run("parts", 4, resume=True)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
