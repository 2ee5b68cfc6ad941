"""`ghm_d2.losses.mmdet` against mmdetection's own file, where it is installed, and its formulas."""

import pytest
import torch
import torch.nn.functional as F
from peers import load_mmdet_losses

from ghm_d2.losses import mmdet

K = 4


def theirs():
    try:
        return load_mmdet_losses()
    except ImportError as error:
        pytest.skip(str(error))


def batch(step, kind):
    random = torch.Generator().manual_seed(step)
    if kind == "GHMC":
        pred = 2 * torch.randn(50, K, generator=random)
        target = torch.randint(0, K + 1, (50,), generator=random)
        weight = (torch.rand(50, generator=random) < 0.8).float()
        return pred, target, weight
    pred, target = (torch.randn(30, 4, generator=random) for _ in range(2))
    weight = (torch.rand(30, 1, generator=random) < 0.8).float().expand(30, 4)
    return pred, target, weight


def formula(module, pred, target, weight):
    """mmdetection's loss of one step without a moving average, from its definition."""
    if isinstance(module, mmdet.GHMC):
        target = F.one_hot(target, K + 1)[:, :K].float()
        valid = (weight > 0)[:, None].expand_as(pred)
        norm = (pred.sigmoid() - target).abs()
        loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    else:
        valid, d = weight > 0, pred - target
        root = (d * d + module.mu**2).sqrt()
        norm, loss = d.abs() / root, root - module.mu
    region = (norm * module.bins).long().clamp(max=module.bins - 1)
    counts = torch.bincount(region[valid], minlength=module.bins)
    return (loss / counts.clamp(min=1)[region])[valid].sum() / (counts > 0).sum()


@pytest.mark.parametrize("kind", ["GHMC", "GHMR"])
def test_without_an_average_it_is_the_formula(kind):
    module = getattr(mmdet, kind)()
    assert (module.bins, module.momentum) == (10, 0)
    tensors = batch(0, kind)
    torch.testing.assert_close(module(*tensors), formula(module, *tensors), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["GHMC", "GHMR"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("momentum", [0, 0.75])
def test_it_is_mmdetections_step_by_step(kind, reduction, momentum):
    options = {"momentum": momentum, "loss_weight": 2.0}
    mine, other = (getattr(m, kind)(**options) for m in (mmdet, theirs()))
    for step in range(4):
        pred, *rest = batch(step, kind)
        values = []
        for module in (mine, other):
            x = pred.clone().requires_grad_()
            loss = module(x, *rest, reduction_override=reduction)
            values += [loss, torch.autograd.grad(loss.sum(), x)[0]]
        torch.testing.assert_close(values[0], values[2], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(values[1], values[3], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=1e-6, atol=0)
    other.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("kind", ["GHMC", "GHMR"])
def test_a_checkpoint_goes_on(kind):
    module, resumed = (getattr(mmdet, kind)(momentum=0.7) for _ in range(2))
    module(*batch(0, kind))
    assert set(module.state_dict()) == {"edges", "acc_sum"} and module.acc_sum.any()
    resumed.load_state_dict(module.state_dict())
    for _ in range(2):
        assert torch.equal(module(*batch(1, kind)), resumed(*batch(1, kind)))


def test_a_module_built_without_memory_is_reset():
    with torch.device("meta"):
        module = mmdet.GHMC(bins=4, momentum=0.7)
    module.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(module.state_dict(), mmdet.GHMC(bins=4, momentum=0.7).state_dict())


def test_dense_targets_and_weights_say_the_same():
    pred, target, weight = batch(0, "GHMC")
    dense = F.one_hot(target, K + 1)[:, :K]
    expected = mmdet.GHMC()(pred, target, weight)
    mine = mmdet.GHMC()(pred, dense, weight[:, None].expand(-1, K))
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
    with pytest.raises(NotImplementedError, match="SoftmaxGHMC"):
        mmdet.GHMC(use_sigmoid=False)


@pytest.mark.parametrize("momentum", [0, 0.75])
@pytest.mark.parametrize("kind", ["GHMC", "GHMR"])
def test_the_module_goes_where_the_model_goes(kind, momentum):
    module = getattr(mmdet, kind)(momentum=momentum)
    expected = module(*batch(0, kind))
    half = getattr(mmdet, kind)(momentum=momentum).half()
    assert torch.equal(half(*batch(0, kind)), expected)
    assert module.to("meta")(*(t.to("meta") for t in batch(0, kind))).is_meta


def test_what_is_set_later_counts():
    module = mmdet.GHMC()
    before = module(*batch(0, "GHMC"))
    module.loss_weight = 2.0
    assert module(*batch(0, "GHMC")) == 2 * before
    pred, target, weight = batch(0, "GHMC")
    background = module(pred, torch.full_like(target, K), weight)
    assert torch.equal(module(pred, torch.full_like(target, -1), weight), background)
