"""The power that a plan promises, and the spread that it is computed from."""

import pytest
from made_comparison import AP, GHM, GHM_R, write_run

from ghm_d2.reports.statistics.power import PlannedPower, Spread, read_spread
from ghm_d2.reports.statistics.verdicts import spending


@pytest.mark.parametrize(("seeds", "sd", "difference"), [(3, 1.0, 3.26), (6, 1.0, 1.435)])
def test_power_is_that_of_the_paired_t_test(seeds, sd, difference):
    """The differences are from tables of the noncentral t distribution."""
    spread = Spread(sd, 0.0, 60, "")
    assert spread.detectable(seeds) == pytest.approx(difference, abs=0.01)
    assert spread.power(spread.detectable(seeds), seeds) == pytest.approx(0.8, abs=1e-3)
    assert spread.seeds_for(difference + 0.01) == seeds


def test_no_number_of_seeds_makes_up_for_few_images():
    assert Spread(1.0, 1.0, 60, "").seeds_for(1.0) is None
    assert Spread(1.0, 0.1, 60, "").seeds_for(1.0) < 20


def test_a_plan_tells_too_few_seeds_from_too_few_images():
    """An error from images of 1 AP hides a difference of 1 AP; one of 0.25 AP does not."""
    hidden = str(PlannedPower(Spread(1.0, 1.0, 60, ""), 6, 1.0))
    assert "1 AP cannot be shown by any number of seeds with these test images; 2 AP" in hidden
    slow = Spread(4.0, 0.25, 60, "")
    assert slow.can_show(1.0) and slow.seeds_for(1.0) is None
    assert "1 AP would need more than 100 seeds; 2 AP would need" in str(PlannedPower(slow, 6, 1.0))
    assert "cannot be shown" not in str(PlannedPower(slow, 1, 1.0))


def test_both_figures_of_a_plan_have_the_alpha_of_its_last_look():
    spread = Spread(1.0, 0.0, 60, "")
    found = PlannedPower(spread, 6, 1.0, [5]).as_dict()
    alpha = spending([5], 6)[-1]
    assert found["detectable"] == spread.detectable(6, alpha)
    assert found["seeds_for"]["1"] == spread.seeds_for(1.0, alpha) > spread.seeds_for(1.0)


def test_the_spread_is_that_of_the_runs_that_finished(tmp_path):
    """A diverged run's AP of 0 would make it tens of AP."""
    for side, method in enumerate((GHM, GHM_R)):
        for seed, ap in enumerate(AP[method], 1):
            write_run(tmp_path / f"{side}_{seed}", side, method, seed, ap)
    before = read_spread(tmp_path, ["bccd"], [300])
    assert before.source == "estimated from 6 finished runs on these data"
    assert "diverged" not in str(PlannedPower(before, 6, 1.0))
    write_run(tmp_path / "0_4", 0, GHM, 4, 0.0, status="diverged", metrics={})
    after = read_spread(tmp_path, ["bccd"], [300])
    assert (after.sd, after.source, after.diverged) == (before.sd, before.source, 1)
    assert "on these data; diverged runs left out: 1;" in str(PlannedPower(after, 6, 1.0))
    assert PlannedPower(after, 6, 1.0).as_dict()["diverged"] == 1


def test_two_runs_are_too_few_for_a_spread(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), 0, GHM, seed, AP[GHM][seed])
    assert "too few finished runs" in read_spread(tmp_path, ["bccd"], [300]).source
