"""The benchmarks at a tiny size."""

import pytest
import rank_suspects
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


def box(x: float, category: int = 1, score: float | None = None) -> dict:
    found = {"image_id": 1, "category_id": category, "bbox": [x, 0, 10, 10]}
    return found if score is None else found | {"score": score}


def test_what_is_wrong_beside_a_clean_json():
    image = rank_suspects.Image([box(0), box(20, 2), box(43), box(90)], [])
    rank_suspects.compare_with_clean(image, [box(0), box(20), box(40), box(60)])
    assert image.errors == ["", "class", "box", "extra"] and image.missing == [box(60)]


def test_suspects_are_ranked():
    clean = [box(20 * i) for i in range(10)]
    image = rank_suspects.Image([box(0, 2), *clean[1:9]], [c | {"score": 0.9} for c in clean])
    rank_suspects.compare_with_clean(image, clean)
    result = rank_suspects.rank([image])
    assert result["errors"] == {"class": 1, "box": 0, "extra": 0, "missing": 1}
    assert result["ours"]["tail"]["AP"] == result["ours"]["missing"]["AP"] == 1
    assert result["confidence"]["missing"]["recall at 100"] == 1
