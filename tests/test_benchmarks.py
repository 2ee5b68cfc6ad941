"""The benchmark of the losses at a tiny size."""

import pytest
import time_losses
import torch
from peers import PEERS, make_inputs


def test_losses_are_timed():
    names = ["GHM-C", "fvcore focal", "GHM-R", "mmdet GHM-R"]
    words = "--device cpu --samples 400 --classes 8 --boxes 10 --rounds 1 --only"
    result = time_losses.benchmark(time_losses.parse_args([*words.split(), *names]))
    timed = {row["name"]: row for row in result["results"]}
    assert set(timed) | set(result["missing"]) == set(names)
    assert timed["GHM-C"]["median"] > 0 and timed["GHM-C"]["memory_bytes"] >= 4 * 400


@pytest.mark.parametrize("theirs", ["fvcore focal", "torchvision focal", "torch BCE"])
def test_losses_that_are_compared_are_the_same(theirs):
    inputs = make_inputs("sigmoid", 800, 8, torch.float32, torch.device("cpu"))
    ours = "BCE" if "BCE" in theirs else "focal"
    values = [PEERS[name][1](inputs)() for name in (ours, theirs)]
    torch.testing.assert_close(*values)
