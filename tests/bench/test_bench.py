"""The benchmark's method: interleaving, memory, peers, what does not fit, and the ratios."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch

from ghm_d2.bench import aims as bench_aims
from ghm_d2.bench import losses as bench
from ghm_d2.bench import measure as bench_tools
from ghm_d2.bench import peers as bench_peers
from ghm_d2.bench import step as bench_step
from ghm_d2.bench.losses import Result, Setting, benchmark
from ghm_d2.bench.peers import PEERS, Peer, PeerMissingError, build, load_mmdet_losses
from ghm_d2.errors import UsageError

CPU = torch.device("cpu")
TINY = Setting(samples=(4_000,), classes=8, positives=25, rounds=2)

# stand-ins for the two files of mmdet that are read; they import as the real ones do
UTILS = "def weight_reduce_loss(loss, weight, avg_factor):\n    return (loss * weight).sum()\n"
GHM_LOSS = """
import torch
from torch import nn
from mmdet.registry import MODELS
from .utils import weight_reduce_loss


@MODELS.register_module()
class GHMC(nn.Module):
    def __init__(self, bins, momentum):
        super().__init__()

    def forward(self, pred, target, label_weight):
        assert pred.shape == target.shape == label_weight.shape
        return weight_reduce_loss((pred - target) ** 2, label_weight, 1)


@MODELS.register_module()
class GHMR(nn.Module):
    def __init__(self, mu, bins, momentum):
        super().__init__()

    def forward(self, pred, target, label_weight):
        return weight_reduce_loss((pred - target) ** 2, label_weight, 1)
"""


@pytest.fixture
def fake_mmdet(tmp_path, monkeypatch):
    """A folder `mmdet` on the path, whose own __init__ must not be run."""
    losses = tmp_path / "mmdet" / "models" / "losses"
    losses.mkdir(parents=True)
    (tmp_path / "mmdet" / "__init__.py").write_text("raise ImportError('mmcv is missing')\n")
    (losses / "utils.py").write_text(UTILS)
    (losses / "ghm_loss.py").write_text(GHM_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return losses


def peer(name: str) -> Peer:
    return next(p for p in PEERS if p.name == name)


def recorded(seconds: dict[str, float]):
    """Runs that put their names into a list, and take the given seconds."""
    log = []

    def run(name):
        log.append(name)
        return seconds[name]

    return log, {name: lambda name=name: run(name) for name in seconds}


def test_every_round_runs_every_peer_once_in_an_order_of_its_own():
    log, runs = recorded(dict.fromkeys("ABCDE", 1.0))
    taken = bench_tools.interleave(runs, range(8))
    rounds = [log[i : i + 5] for i in range(0, len(log), 5)]
    assert all(sorted(names) == list("ABCDE") for names in rounds) and len(rounds) == 8
    assert len({tuple(names) for names in rounds}) > 4
    assert taken == {name: [1.0] * 8 for name in "ABCDE"}
    again, runs = recorded(dict.fromkeys("ABCDE", 1.0))
    bench_tools.interleave(runs, range(8))
    assert again == log


def test_a_slow_peer_sits_out_the_rest_and_the_others_go_on():
    _, runs = recorded({"slow": 10.0, "fast": 1.0})
    taken = bench_tools.interleave(runs, range(9), seconds=20.0, fewest=3)
    assert len(taken["slow"]) == 3 and len(taken["fast"]) == 9
    assert len(bench_tools.interleave(runs, range(9), seconds=20.0)["slow"]) == 2


def test_peak_memory_is_what_was_held_at_one_time():
    def run():
        first = torch.empty(1_000_000)
        del first
        return torch.empty(500_000)

    assert bench_tools.peak_bytes(run, CPU) == 4_000_000
    x = torch.ones(1000, 100, requires_grad=True)
    assert bench_tools.peak_bytes(lambda: torch.autograd.grad((x * 2).sum(), x), CPU) >= x.nbytes
    assert bench_tools.peak_bytes(lambda: None, CPU) == 0


def test_inputs_are_seeded_and_without_ignored_rows():
    given = bench_peers.make_inputs("sigmoid", 800_000, 80, torch.float32, CPU)
    again = bench_peers.make_inputs("sigmoid", 800_000, 80, torch.float32, CPU)
    assert torch.equal(given.x, again.x) and torch.equal(given.labels, again.labels)
    assert given.x.shape == (10_000, 80) and given.x.is_leaf and given.x.requires_grad
    assert given.x.mean().item() == pytest.approx(-3, abs=0.02)
    foreground = given.labels < 80
    assert 0.005 < foreground.float().mean() < 0.015 and given.labels.min() >= 0
    assert torch.equal(given.one_hot.sum(1), foreground.float())
    assert given.one_hot.argmax(1)[foreground].equal(given.labels[foreground])
    softmax = bench_peers.make_inputs("softmax", 800_000, 80, torch.float32, CPU)
    assert softmax.x.shape == (10_000, 81)
    assert bench_peers.make_inputs("boxes", 100, 80, torch.float32, CPU).x.shape == (25, 4)


@pytest.mark.parametrize("against", ["focal", "BCE"])
def test_peers_compute_what_ours_computes(against):
    given = bench_peers.make_inputs("sigmoid", 4_000, 8, torch.float32, CPU)
    alike = [p for p in PEERS if p.against == against]
    assert len(alike) > 1
    ours = build(peer(against), given)()
    (gradient,) = torch.autograd.grad(ours, given.x)
    for other in alike:
        loss = build(other, given)()
        torch.testing.assert_close(loss, ours, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            *torch.autograd.grad(loss, given.x), gradient, rtol=1e-3, atol=1e-6
        )


def test_mmdets_losses_are_ours_where_it_is_installed():
    for name, kind in (("GHM-C", "sigmoid"), ("GHM-R", "boxes")):
        given = bench_peers.make_inputs(kind, 4_000, 8, torch.float32, CPU)
        try:
            other = build(peer(f"mmdet {name}"), given)
        except PeerMissingError:
            pytest.skip("mmdet is not installed")
        torch.testing.assert_close(other(), build(peer(name), given)(), rtol=1e-4, atol=0)


def test_mmdets_file_loads_alone_and_leaves_no_module_behind(fake_mmdet):
    before = dict(sys.modules)
    loaded = load_mmdet_losses()
    assert sys.modules == before
    assert {"GHMC", "GHMR"} <= set(vars(loaded))
    given = bench_peers.make_inputs("sigmoid", 4_000, 8, torch.float32, CPU)
    loss = build(peer("mmdet GHM-C"), given)()
    torch.testing.assert_close(loss, (given.x - given.one_hot).square().sum())


@pytest.mark.parametrize("broken", ["raise RuntimeError('no')", "import mmcv_is_not_here"])
def test_a_broken_mmdet_leaves_no_module_behind_either(fake_mmdet, broken):
    (fake_mmdet / "ghm_loss.py").write_text(broken)
    before = dict(sys.modules)
    with pytest.raises((RuntimeError, ImportError)):
        load_mmdet_losses()
    assert sys.modules == before


def test_an_mmdet_without_the_file_is_named(fake_mmdet):
    (fake_mmdet / "ghm_loss.py").unlink()
    with pytest.raises(PeerMissingError, match=r"ghm_loss.py.*pip install --no-deps mmdet==3"):
        load_mmdet_losses()


def test_absent_peers_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)  # an import of it fails
    names = ("GHM-R", "mmdet GHM-R", "mmdet GHM-C", "torchvision focal")
    found = benchmark(replace(TINY, only=names))
    assert found["missing"]["mmdet GHM-C"] == "not installed: pip install --no-deps mmdet==3.3.0"
    assert found["missing"]["torchvision focal"].endswith("pip install torchvision")
    assert [r["peer"] for r in found["results"]] == ["GHM-R"]


def test_only_others_may_fail(monkeypatch):
    def fails(inputs):
        raise RuntimeError("not for this dtype\nand more")

    other = Peer("other", "boxes", "GHM-R", fails, "other")
    monkeypatch.setattr(bench_peers, "PEERS", (peer("GHM-R"), other))
    found = benchmark(TINY)
    assert found["missing"] == {"other": "fails on float32: not for this dtype"}
    monkeypatch.setattr(bench_peers, "PEERS", (replace(other, install=""),))
    with pytest.raises(RuntimeError):
        benchmark(TINY)


def test_what_is_measured_of_every_peer(fake_mmdet):
    found = json.loads(json.dumps(benchmark(TINY), allow_nan=False))
    results = {r["peer"]: r for r in found["results"]}
    assert set(results) == {p.name for p in PEERS} and not found["missing"]
    for r in results.values():
        assert r["note"] == "" and r["seconds"] > 0 and r["gb_per_s"] > 0 and r["memory"] >= 1
        assert len(r["runs"]) == TINY.rounds and r["repeats"] >= 1
        assert r["samples"] == (100 if r["kind"] == "boxes" else 4_000)
        ours = results[r["against"]]
        assert ours["kind"] == r["kind"]
        assert r["ratio"] == pytest.approx(r["seconds"] / ours["seconds"])
    assert results["softmax GHM-C"]["elements"] == 500 * 9
    assert [c["samples"] for c in found["copy"]] == [4_000, 100]
    assert {"seed", "device", "dtype", "rounds"} <= set(found["setting"])
    assert {"cpu", "cores", "threads", "memory_gb", "gpu"} <= set(found["machine"])
    assert torch.__version__.startswith(found["packages"]["torch"]) and found["code_version"]
    assert all(r["aim"] is None and r["value"] > 0 for r in found["ratios"])


def test_sizes_that_do_not_fit_are_skipped_with_the_reason(monkeypatch):
    def hungry(inputs):
        return lambda: inputs.x.repeat(50, 1).sum()

    peers = (peer("torch BCE"), Peer("hungry", "sigmoid", "BCE", hungry, "hungry"))
    monkeypatch.setattr(bench_peers, "PEERS", peers)
    monkeypatch.setattr(bench, "free_bytes", lambda device: 4_000_000)
    found = benchmark(replace(TINY, samples=(4_000, 160_000, 4_000_000)))
    notes = {(r["peer"], r["samples"]): r["note"] for r in found["results"]}
    assert notes["torch BCE", 4_000] == notes["hungry", 4_000] == ""
    # the inputs, and twice the gradient, fit; fifty times the gradient does not
    assert notes["torch BCE", 160_000] == ""
    assert notes["hungry", 160_000].startswith("needs about 0.0 GB, and 0.0 GB are free")
    assert notes["torch BCE", 4_000_000].startswith("the inputs alone need about 0.1 GB")
    assert all((r["seconds"] is None) == bool(r["note"]) for r in found["results"])


def test_unknown_peers_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="mmdet GHM-C"):
        benchmark(replace(TINY, only=("mmdet GHMC",)))


def result(name: str, samples: int, seconds: float, **more) -> Result:
    return Result(name, "sigmoid", samples, name, samples, seconds, memory=1.2, **more)


def test_ratios_are_those_of_the_headline_beside_their_aims():
    setting = Setting()
    results = [result("GHM-C", 10**6, 1.0), result("torch BCE", 10**6, 1.0)]
    assert {r["aim"] for r in bench_aims.ratios(results, setting)} == {None}
    results += [result("GHM-C", 8 * 10**6, 8.8), result("torch BCE", 8 * 10**6, 4.0)]
    results += [result("GHM-C", 10**8, 130.0), result("torch BCE", 10**8, 1.0)]
    found = {r["name"]: r for r in bench_aims.ratios(results, setting)}
    bce = found["GHM-C / torch BCE, time"]
    assert bce["value"] == pytest.approx(2.2) and bce["aim"] == "<= 1.6" and bce["met"] is False
    assert found["GHM-C, extra memory / gradient"]["met"] is True
    growth = found["GHM-C, growth of time per sample, 1,000,000 to 100,000,000 samples"]
    assert growth["value"] == pytest.approx(1.3) and growth["met"] is False
    other = bench_aims.ratios(results, replace(setting, dtype="bfloat16"))
    assert {r["aim"] for r in other} == {None}


def test_a_gpu_has_aims_of_its_own():
    size = bench_aims.HEADLINE
    results = [result("GHM-C", size, 1.0, share_of_copy=0.5), result("mmdet GHM-C", size, 40.0)]
    names = {r["name"] for r in bench_aims.ratios(results, Setting(device="cuda"))}
    assert "mmdet GHM-C / GHM-C, time" in names and "GHM-C / mmdet GHM-C, time" not in names
    assert "GHM-C, share of the copy's bandwidth" in names


def test_sides_of_the_step_start_alike_and_take_the_same_batches(detector, digits_folder):
    cfg, _ = detector("retinanet_ghm", digits_folder)
    configs = {name: bench_step._config(cfg, words) for name, words in bench_step.SIDES.items()}
    batches = bench_step._batches(configs[bench_step.CE])
    sides = [bench_step._build(own, batches) for own in configs.values()]
    assert type(sides[1].trainer.model).__name__ == "RetinaNet"
    first = dict(sides[0].trainer.model.named_parameters())
    for side in sides[1:]:
        assert all(torch.equal(p, first[n]) for n, p in side.trainer.model.named_parameters())
    seen = {id(side): [] for side in sides}
    for side in sides:
        side.trainer.model.register_forward_pre_hook(
            lambda _, given, side=side: seen[id(side)].append([i["file_name"] for i in given[0]])
        )
        side.step()
        side.step()
    given = [[item["file_name"] for item in batch] for batch in batches[:2]]
    assert all(names == given for names in seen.values())
    losses = [s.trainer.storage.history("loss_cls").values()[0][0] for s in sides]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)  # Detectron2's focal, and ours
