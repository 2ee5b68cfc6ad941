"""Operations and the time of the losses, as a run's record has them."""

import copy
import warnings

import pytest
import torch

from ghm_d2.analysis.cost import gflops, loss_ms, measure
from ghm_d2.data.loading.loaders import build_test_loader


def products(model, batch) -> float:
    """Multiplications in the convolutions and matrix products of a forward pass."""
    total = 0

    def count(module, _inputs, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(batch)
    return total


@pytest.mark.parametrize("name", ["retinanet_ghm", "faster_rcnn_sl1", "dssd_ghm"])
def test_measured_quietly_and_without_a_trace(name, detector, digits_folder, capfd):
    cfg, model = detector(name, digits_folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    with warnings.catch_warnings(record=True) as warned:
        found = measure(cfg, model)
    assert [str(w.message) for w in warned] == []
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    batch = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    expected = products(copy.deepcopy(model).eval(), batch) / 1e9
    assert found["gflops"] == pytest.approx(expected, rel=0.1)
    assert 0 < found["loss_ms"] < 60_000


class Strange(torch.nn.Module):
    def forward(self, batch):
        raise NotImplementedError


def test_what_cannot_be_measured_is_none(detector, digits_folder):
    cfg, _ = detector("retinanet_focal", digits_folder)
    assert gflops(cfg, Strange()) is None
    assert loss_ms(cfg, Strange()) is None
