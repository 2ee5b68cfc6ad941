"""The histogram of sizes that mu is read from: the C library does what plain PyTorch does."""

import pytest
import torch

from ghm_d2 import kernels
from ghm_d2.kernels import cpu, operators

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C library is not built")
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def differences(rows, dtype=torch.float32):
    """Deltas of all sizes that slots are for, and of those beyond; none on a slot's edge."""
    random = torch.Generator().manual_seed(rows)
    octaves = torch.randint(-80, 80, (rows, 4), generator=random) / 4 + 0.1
    size = octaves.exp2() * torch.randn(rows, 4, generator=random).sign()
    size[:: rows // 3 + 1] = 0
    return size.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_sizes_are_counted_alike(dtype, masked):
    levels = []
    for rows in (1, 7, 600):
        pred = differences(rows, dtype)
        pred[0, :3] = torch.tensor([torch.inf, torch.nan, 1.0])
        valid = [pred.abs() < 3] if masked else []
        levels.append((pred, torch.zeros_like(pred), *valid))
    counts = kernels.size_counts(levels, kernel="c")
    assert torch.equal(counts, kernels.size_counts(levels, kernel="torch"))
    assert counts.sum() > 200


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("of", ["many", "one slot", "none"])
def test_quantiles_agree(quantile, of):
    histogram = torch.zeros(128)
    if of == "many":
        histogram = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 8
    elif of == "one slot":
        histogram[50] = 3.5
    fast, plain = (kernels.quantile(histogram, quantile, 0.07, kernel=k) for k in ("c", "torch"))
    torch.testing.assert_close(fast, plain)
    if of == "one slot":  # 2^(-16 + (50 + quantile) / 4)
        assert fast.log2().item() == pytest.approx(-16 + (50 + quantile) / 4, abs=1e-5)
    if of == "none":
        assert fast.item() == pytest.approx(0.07)


def test_pytorch_knows_the_operators():
    pred = differences(9)
    lists = [pred], [torch.zeros_like(pred)], [pred > 0]
    torch.library.opcheck(operators.size_counts, lists, test_utils=CHECKS)
    torch.library.opcheck(operators.quantile, (torch.ones(128), 0.5, 0.1), test_utils=CHECKS)
