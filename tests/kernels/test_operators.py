"""The kernels as PyTorch operators: what traces, compiles or exports a training sees them."""

import pytest
import torch
from torch import nn

from ghm_d2.kernels import SigmoidSamples, cpu, operators
from ghm_d2.losses import GHMC, GHMR, SoftmaxGHMC, bce_loss, focal_loss, softmax_ce_loss, sum_up

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C library is not built")
K = 3


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def level(kind, rows=12, seed=0, dtype=torch.float32):
    pred = torch.randn(rows, K + (kind == "softmax"), generator=random(seed), dtype=dtype)
    if kind == "asl1":
        return pred, torch.zeros_like(pred), torch.rand(rows, K, generator=random(seed)) < 0.8
    return pred, torch.randint(-1, K + 1, (rows,), generator=random(seed + 1))


def arguments(kind, by_class=False, gamma=0.0):
    levels = [level(kind, rows) for rows in (12, 5)]
    pred, target, *valid = (list(x) for x in zip(*levels, strict=True))
    mu = torch.tensor(0.1, dtype=torch.float64) if kind == "asl1" else None
    return kind, pred, target, valid[0] if valid else [], mu, 4, by_class, -1.0, gamma


CASES = [("sigmoid",), ("sigmoid", True), ("softmax",), ("asl1",)]
# what needs a derivative is `total`, a torch.autograd.Function; the operators have none
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_are_what_pytorch_takes_them_for(case):
    given = arguments(*case)
    torch.library.opcheck(operators.regions, given, test_utils=CHECKS)
    counts, _ = operators.regions(*given)
    weights = torch.rand(counts.shape, dtype=torch.float64, generator=random())
    torch.library.opcheck(operators.total, (*given, weights), test_utils=CHECKS)
    torch.library.opcheck(operators.gradient, (*given, weights, torch.ones(())), test_utils=CHECKS)


def test_the_densitys_operator_says_what_it_changes():
    counts = torch.tensor([[3, 0, 9, 1], [0, 0, 7, 2]])
    state = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 2)
    options = 0.9, 3.0, True, "weights", "debias", True, 1.0
    given = counts, torch.tensor([2, 1]), *state, *options
    torch.library.opcheck(operators.density, given, test_utils=CHECKS)
    operators.density(*given)
    assert all(x.any() for x in state)


class Losses(nn.Module):
    """All losses of a step, with the moving averages and the all-reduce of several losses."""

    def __init__(self):
        super().__init__()
        self.published, self.robust = GHMC(), GHMC.robust(num_classes=K)
        self.softmax, self.boxes = SoftmaxGHMC(), GHMR.robust()

    def forward(self, logits, labels, rows, deltas, target, valid):
        cls = self.published.begin([logits, logits * 2], [labels, labels.clone()])
        box = self.boxes.begin([deltas], [target], [valid])
        sum_up(cls, box)
        others = self.robust(logits, labels) + self.softmax(rows, labels)
        plain = (
            bce_loss(logits, labels) + focal_loss(logits, labels) + softmax_ce_loss(rows, labels)
        )
        return cls.total() + box.total() + others + plain


def step_inputs(seed=0, rows=12):
    logits, labels = level("sigmoid", rows, seed)
    return logits, labels, level("softmax", rows, seed)[0], *level("asl1", rows, seed)


def train(module, loss, steps=3):
    found = []
    for step in range(steps):
        tensors = step_inputs(step, rows=12 + step)
        leaves = [t.requires_grad_() for t in (tensors[0], tensors[2], tensors[3])]
        value = loss(*tensors)
        found += [value.detach(), *torch.autograd.grad(value, leaves)]
    return [*found, *module.state_dict().values()]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_losses_compile_without_a_graph_break(backend):
    torch.compiler.reset()
    eager, module = Losses(), Losses()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    expected = train(eager, eager)
    for mine, theirs in zip(train(module, compiled), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strict", [True, False])
def test_losses_export(strict):
    module = Losses().eval()
    tensors = step_inputs()
    program = torch.export.export(module, tensors, strict=strict)
    torch.testing.assert_close(program.module()(*tensors), module(*tensors))
    # the fast path, not plain PyTorch
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {str(node.target) for part in parts for node in part.graph.nodes}
    assert {"ghm_d2.regions.default", "ghm_d2.density.default"} <= called


def test_transforms_and_fake_tensors_see_the_operators():
    from torch._subclasses import FakeTensorMode

    logits, labels = level("sigmoid")
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(logits).requires_grad_()
        loss = GHMC()(fake, mode.from_tensor(labels))
        loss.backward()
        assert loss.shape == () and fake.grad.shape == logits.shape


def test_a_profiler_sees_the_operators():
    logits, labels = level("sigmoid")
    with torch.profiler.profile() as profile:
        GHMC()(logits.requires_grad_(), labels).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"ghm_d2::regions", "ghm_d2::density", "ghm_d2::gradient"} <= names


def test_a_device_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setitem(operators.backends, "cpu", None)
    given = operators.sample_arguments(SigmoidSamples(), [level("sigmoid")], 4)
    with pytest.raises(RuntimeError, match="ghm_d2::regions has no kernel for cpu"):
        operators.regions(*given)
