"""The words a report ends in claim no more than the seeds show."""

import json

import pytest
from made_comparison import AP, FOCAL, GHM, GHM_R, PAIRS, SL1, write_run

from ghm_d2.reports.report import read_report

ONE_PAIR = PAIRS[:1]


def test_each_question_has_its_own_answer(comparison):
    """What GHM changes within a family, and how the families compare, are not mixed up."""
    *answers, reach = read_report(comparison(analysis=False)).verdict
    within, families = answers
    assert within.startswith("What GHM changes within each family: ")
    assert f"{GHM_R} has a higher AP than {SL1}, by +2.0 (95% interval +1.7 to +2.4" in within
    assert f"; no difference shown between {GHM} and {FOCAL}" in within
    assert families.startswith("How the families compare: ")
    assert f"{SL1} has a higher AP than {FOCAL}" in families
    assert "3 seeds" in reach
    assert "not corrected for the number of comparisons (3)" in reach


def test_a_lower_ap_is_said(comparison):
    pair = [(SL1, GHM_R, "")]
    verdict = read_report(comparison(pairs=pair, analysis=False)).verdict
    assert verdict[0].startswith(f"{SL1} has a lower AP than {GHM_R}, by -2.0")
    assert "not corrected" not in " ".join(verdict)


def test_one_seed_makes_no_claim_however_large_the_difference(comparison):
    folder = comparison({SL1: (10.0,), GHM_R: (90.0,)}, ONE_PAIR, analysis=False)
    text = " ".join(read_report(folder).verdict)
    assert "one seed: no claim" in text
    assert "higher" not in text and "lower" not in text
    assert "A claim needs two seeds" in text


def test_unequal_seeds_are_compared_on_those_both_have(comparison):
    ap = {SL1: (50.0, 51.0, None, 99.0), GHM_R: (52.0, 53.5, 10.0, None)}
    report = read_report(comparison(ap, ONE_PAIR, analysis=False))
    (difference,) = report.differences
    assert difference.seeds == [1, 2]
    assert difference.ap["AP"].mean == pytest.approx(2.25)


def test_no_seed_on_both_sides(comparison):
    folder = comparison({SL1: (50.0, None), GHM_R: (None, 52.0)}, ONE_PAIR, analysis=False)
    assert "no seed on both sides: no claim" in read_report(folder).verdict[0]


def test_a_diverged_run_is_told_and_its_ap_does_not_count(comparison):
    folder = comparison(analysis=False)
    how = "diverged at iteration 312: loss_cls was nan"
    write_run(folder / "../runs/3_2", 3, GHM, 2, 99.0, status="diverged", outcome=how)
    report = read_report(folder)
    sentence = f"{GHM}: diverged in 1 of 3 runs (seed 2: {how}); its figures are of the others."
    assert sentence in report.verdict
    row = next(row for row in report.rows if row.side.name == GHM)
    assert (row.ap["AP"].n, row.ap["AP"].mean) == (2, pytest.approx(48.75))
    assert "2 of 3" in report.markdown


def test_a_side_that_always_diverged_has_no_figures(comparison):
    folder = comparison(analysis=False)
    for seed in (1, 2, 3):
        write_run(folder / f"../runs/3_{seed}", 3, GHM, seed, 1.0, status="diverged", metrics={})
    report = read_report(folder)
    text = " ".join(report.verdict)
    assert "diverged in 3 of 3 runs" in text and "it has no figures" in text
    assert f"no claim on {GHM} against {FOCAL}" in text
    json.dumps(report.to_json(), allow_nan=False)


def test_many_questions_are_answered_together(comparison):
    """The density suite asks a dozen; a dozen sentences are no answer."""
    names = [f"M {m}" for m in range(8)]
    ap = {SL1: AP[SL1]} | {name: tuple(v + i for v in AP[SL1]) for i, name in enumerate(names)}
    pairs = [(name, SL1, f"{name} against the published settings") for name in names]
    first, reach = read_report(comparison(ap, pairs, analysis=False)).verdict
    assert f"AP is higher for M 1 against {SL1}, +1.0" in first
    assert f"No difference shown for M 0 against {SL1}" in first
    assert "(8)" in reach


def test_pairs_of_one_question_share_its_sentence(comparison):
    pairs = [(GHM_R, SL1, "two stages"), (GHM, SL1, "two stages")]
    first, _ = read_report(comparison(pairs=pairs, analysis=False)).verdict
    assert first.startswith(f"Two stages: {GHM_R} has a higher AP than {SL1}, by +2.0")
    assert f"; no difference shown between {GHM} and {SL1}" in first


def test_an_ap_that_is_not_defined_is_counted_as_such(comparison):
    """APs without a small box: the row says of how many seeds its mean is."""
    folder = comparison(analysis=False)
    record = json.loads((folder / "../runs/0_1/run.json").read_text())
    record["metrics"]["AP50"] = None
    (folder / "../runs/0_1/run.json").write_text(json.dumps(record))
    table = read_report(folder).shown_tables[0]
    row = dict(zip(table.headers, table.rows[0], strict=True))
    assert row["AP50"].endswith("(n = 2)")
    assert row["AP_S"] == "-"
    assert row["Seeds"] == "3 of 3"
