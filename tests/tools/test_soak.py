"""What `make soak` goes by: a difference of one bit, work lost, faults that were not injected."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import soak

STATE = {"model": {"w": torch.tensor([1.0, 2.0])}, "trainer": {"iteration": 3, "late": [1, 0.5]}}


def changed(**parts):
    return {**STATE, **parts}


def test_equal_states_are_the_same():
    copy = {"model": {"w": STATE["model"]["w"].clone()}, "trainer": dict(STATE["trainer"])}
    assert soak.same(STATE, copy)


@pytest.mark.parametrize(
    "other",
    [
        changed(model={"w": torch.tensor([1.0, 2.0]).nextafter(torch.tensor(3.0))}),
        changed(model={"w": torch.tensor([1.0, 2.0]).double()}),
        changed(model={"w": torch.tensor([1.0])}),
        changed(model={}),
        changed(trainer={"iteration": 3.0, "late": [1, 0.5]}),
        changed(trainer={"iteration": 3, "late": [1, 0.25]}),
        changed(more=1),
    ],
)
def test_a_bit_a_type_or_a_part_makes_a_difference(other):
    assert not soak.same(STATE, other)


def row(**parts):
    return soak.Row(**{"fault": "x", "planned": 2, "injected": 2, "survived": 2, **parts})


def test_the_target_is_what_it_says():
    good = row(lost=[0, soak.PERIOD], identical=True)
    assert good.met and row(lost=[0], identical=None).met
    bad = [
        row(lost=[0, soak.PERIOD + 1], identical=True),
        row(lost=[1], limit=0, identical=True),
        row(lost=[-1], identical=True),
        row(survived=1, identical=True),
        row(injected=1, survived=1, identical=True),
        row(identical=False),
    ]
    assert not any(x.met for x in bad)
    shown = soak.table([good, bad[-1]]).splitlines()
    assert shown[2] == f"| x | 2 | 2 | {soak.PERIOD} | identical |"
    assert "**different**" in shown[3]


def test_work_lost_is_read_from_the_run(tmp_path):
    run = soak.Training(tmp_path / "run", tmp_path)
    assert (run.done(), run.resumptions(), run.resumed_after()) == (0, 0, 0)
    run.output.mkdir()
    rows = ['{"iteration": 0, "loss_cls": 1}', '{"iteration": 1, "loss_cls": 1}', '{"iteration": 2']
    (run.output / "metrics.jsonl").write_text("\n".join(rows))
    run.stderr.write_text("training on data into run, seed 1\n")
    assert (run.done(), run.resumptions(), run.resumed_after()) == (2, 1, 0)
    run.stderr.write_text("resuming after 15 iterations\nresuming on data into run, seed 1\n")
    assert (run.resumptions(), run.resumed_after()) == (1, 15)
