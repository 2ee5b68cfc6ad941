"""Precise batch norm: the statistics, and nothing else, as a function of weights and iteration."""

from types import SimpleNamespace

import torch
from detectron2.modeling import build_model
from fvcore.nn.precise_bn import get_bn_modules

from ghm_d2.register import register_all
from ghm_d2.training.precise_bn import SeededPreciseBN
from ghm_d2.training.prepare import prepare
from ghm_d2.training.train import train


def test_statistics_are_computed_anew_and_the_rest_is_left_alone(tiny, digits_folder, tmp_path):
    register_all()
    words = [*tiny, "TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.TIMM.FREEZE_BN", "False"]
    source = "quick/retinanet_ghm.yaml"
    cfg = prepare(source, words, dataset=digits_folder, device="cpu", seed=1, output=tmp_path)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    hook = SeededPreciseBN(cfg, model)

    def after(iteration: int) -> dict[str, torch.Tensor]:
        hook.trainer = SimpleNamespace(iter=iteration)
        hook.update_stats()
        return {name: value.clone() for name, value in model.state_dict().items()}

    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = after(3)
    changed = {name for name in first if not torch.equal(first[name], before[name])}
    norms = {m: name for name, m in model.named_modules()}
    assert changed and all(name.rpartition(".")[0] in norms.values() for name in changed)
    assert {name.rpartition(".")[2] for name in changed} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert any("ghm_c" in name for name in first)  # whose averages a forward pass moves
    other = after(4)
    again = after(3)
    mean = next(name for name in changed if name.endswith("running_mean"))
    assert torch.equal(again[mean], first[mean]) and not torch.equal(other[mean], first[mean])
    assert len(get_bn_modules(model)) > 0 and all(m.momentum != 1 for m in get_bn_modules(model))


def test_a_model_whose_batch_norm_is_fixed_trains_on(tiny, digits_folder, tmp_path):
    words = [*tiny, "TEST.PRECISE_BN.ENABLED", "True", "TEST.EVAL_PERIOD", "2"]
    source = "quick/retinanet_ghm.yaml"
    cfg = prepare(source, words, dataset=digits_folder, device="cpu", seed=1, output=tmp_path)
    assert train(cfg, "digits")[0].status == "finished"
