"""The words a report ends in claim no more than the seeds show."""

import json

import numpy as np
import pytest
from made_comparison import AP, FOCAL, GHM, GHM_R, PAIRS, SL1, write_run

from ghm_d2.records import Pair
from ghm_d2.reports.page.document import Best
from ghm_d2.reports.report import by_data, is_decided, overview, read_report

ONE_PAIR = PAIRS[:1]


def test_each_question_has_its_own_answer(comparison):
    """The differences within a family and those between families are not mixed up."""
    *answers, reach, exploration = read_report(comparison(analysis=False)).answer
    within, families = answers
    assert within.startswith("What GHM changes within each family: ")
    assert f"{GHM_R} has a higher AP than {SL1}, by +2.0 (98.3% interval +1.4 to +2.7" in within
    assert f"; undecided between {GHM} and {FOCAL}" in within
    assert families.startswith("How the families compare: ")
    assert f"{SL1} has a higher AP than {FOCAL}" in families
    assert "3 seeds" in reach and "not in the choice of test images" in reach
    assert "The 3 pairs are corrected for each other (Holm)" in reach
    assert exploration == "With fewer than 6 seeds this is exploration, not evidence."


def test_a_question_that_only_names_the_sides_is_not_repeated(comparison):
    """The sides of somebody's own configurations have no other question."""
    pairs = [Pair(GHM_R, SL1, f"{GHM_R} against {SL1}")]
    (sentence, *_) = read_report(comparison(pairs=pairs, analysis=False)).answer
    assert sentence.startswith(f"{GHM_R} has a higher AP than {SL1}, by ")


def test_a_sentence_says_how_small_p_is_at_the_least(comparison):
    sure = {SL1: (50.0, 50.1, 50.0, 50.1, 50.0, 50.1), GHM_R: (60.0, 60.0, 60.1, 60.1, 60.0, 60.2)}
    assert ", p < 0.001, 6 seeds)" in read_report(comparison(sure, ONE_PAIR)).answer[0]
    unsure = {SL1: (50.0, 51.0, 50.5), GHM_R: (50.2, 51.5, 50.0)}
    assert ", p = 0." in read_report(comparison(unsure, ONE_PAIR)).answer[0]


def test_the_primary_pair_is_named_and_is_not_corrected(comparison):
    pairs = [Pair(*PAIRS[0]), Pair(*PAIRS[1]), Pair(*PAIRS[2], primary=True)]
    report = read_report(comparison(pairs=pairs, analysis=False))
    reach = report.answer[-2]
    assert f"The primary pair, {SL1} against {FOCAL}, is tested alone. The other 2" in reach
    assert [d.verdict.alpha for d in report.differences] == pytest.approx([0.025, 0.05, 0.05])
    assert [pair["primary"] for pair in report.to_json()["pairs"]] == [False, False, True]


def test_the_choice_of_images_widens_an_interval(comparison):
    folder = comparison(AP, PAIRS[:1])
    (alone,) = read_report(folder).to_json()["pairs"]
    rng = np.random.default_rng(0)
    for side, alike in ((0, rng.normal(0, 2, 200)), (1, rng.normal(0, 2, 200))):
        for seed in (1, 2, 3):
            file = folder / f"../runs/{side}_{seed}/analysis.json"
            ap = (50 + alike + rng.normal(0, 0.1, 200)).round(2).tolist()
            kept = {"image_bootstrap": {"set": "a", "images": 60, "AP": ap}}
            file.write_text(json.dumps(json.loads(file.read_text()) | kept))
    report = read_report(folder)
    (found,) = report.to_json()["pairs"]
    assert alone["se_images"] is None and alone["verdict"] == "higher"
    assert found["se_images"] == pytest.approx(8**0.5, rel=0.15)
    assert found["se_seeds"] == alone["se_seeds"] and found["verdict"] == "undecided"
    assert found["AP"]["high"] - found["AP"]["low"] > 5 * (alone["AP"]["high"] - alone["AP"]["low"])
    assert "count the chance in training and in the choice of test images" in report.answer[-2]
    table = overview([report])
    assert dict(zip(table.headers, table.rows[0], strict=True))["SE images"].startswith("2.")


def test_a_planned_look_decides_where_the_difference_is_clear(comparison):
    pairs = [Pair(*PAIRS[0], primary=True)]
    clear = {SL1: (50.0, 50.2, 50.1), GHM_R: (60.0, 60.3, 60.0)}
    planned = {name: (*ap, None, None, None) for name, ap in clear.items()}
    assert not is_decided(comparison(planned, pairs, analysis=False), 3)
    folder = comparison(planned, pairs, analysis=False, looks=[3])
    assert is_decided(folder, 3) and not is_decided(folder, 2)
    assert f"{GHM_R} has a higher AP than {SL1}" in read_report(folder).answer[0]
    alike = {SL1: (50.0, 55.2, 52.1), GHM_R: (52.0, 51.3, 53.0)}
    planned = {name: (*ap, None, None, None) for name, ap in alike.items()}
    assert not is_decided(comparison(planned, pairs, analysis=False, looks=[3]), 3)
    later = {name: (*ap, *(clear[name])) for name, ap in alike.items()}
    folder = comparison(later, pairs, analysis=False, looks=[3])
    assert not is_decided(folder, 3), "the seeds after the look say nothing about it"


def test_what_a_planned_look_decided_is_evidence_once_all_seeds_are_done(comparison):
    clear = {SL1: (50.0, 50.2, 50.1) * 2, GHM_R: (60.0, 60.3, 60.0) * 2}
    pairs = [Pair(*PAIRS[0], primary=True)]
    *_, last = read_report(comparison(clear, pairs, analysis=False, looks=[3])).answer
    assert last == "A pair that the look at 3 seeds decided keeps its verdict."
    stopped = {name: ap[:3] for name, ap in clear.items()}
    *_, last = read_report(comparison(stopped, pairs, analysis=False, looks=[3])).answer
    assert last.startswith("With fewer than 6 seeds")


def test_a_look_that_decided_nothing_leaves_the_caution(comparison):
    pairs = [Pair(*PAIRS[0], primary=True)]
    alike = {SL1: (50.0, 55.2, 52.1), GHM_R: (52.0, 51.3, 53.0)}
    so_far = {name: (*ap, None, None, None) for name, ap in alike.items()}
    *_, last = read_report(comparison(so_far, pairs, analysis=False, looks=[3])).answer
    assert last == "With fewer than 6 seeds this is exploration, not evidence."
    clear = {SL1: (50.0, 50.2, 50.1), GHM_R: (60.0, 60.3, 60.0)}
    so_far = {name: (*ap, None, None, None) for name, ap in clear.items()}
    *_, last = read_report(comparison(so_far, pairs, analysis=False, looks=[3])).answer
    assert last == "A pair that the look at 3 seeds decided keeps its verdict."


def test_a_comparison_on_several_data_sets_has_a_row_for_each(comparison):
    pairs = [Pair(GHM, FOCAL, ""), Pair(GHM_R, SL1, "", primary=True)]
    found = [read_report(comparison(AP, pairs, analysis=False, dataset=d)) for d in ("a", "b")]
    assert by_data(found[:1]) == []
    (table,) = by_data(found)
    assert table.headers == ("AP on", *AP, f"{GHM_R} - {SL1}", "AP is")
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert table.rows[0][1:] == table.rows[1][1:]
    cells = dict(zip(table.headers, table.rows[0], strict=True))
    assert cells["AP is"] == "higher" and cells[f"{GHM_R} - {SL1}"].startswith("+2.0 (")
    assert [name for name in AP if isinstance(cells[name], Best)] == [GHM_R]


def test_no_side_is_best_where_none_is_done(comparison):
    folder = comparison({SL1: (None, None), GHM_R: (None, None)}, ONE_PAIR, analysis=False)
    (table,) = by_data([read_report(folder)] * 2)
    assert table.rows[0][1:3] == ("-", "-")
    assert not any(isinstance(cell, Best) for cell in table.rows[0])


def test_no_side_is_best_where_all_look_alike(comparison):
    folder = comparison({SL1: (0.01, 0.02), GHM_R: (0.01, 0.03)}, ONE_PAIR, analysis=False)
    (table,) = by_data([read_report(folder)] * 2)
    assert table.rows[0][1].startswith("0.0") and table.rows[0][2].startswith("0.0")
    assert not any(isinstance(cell, Best) for cell in table.rows[0])


def test_seeds_that_were_added_after_a_verdict_are_told(comparison):
    folder = comparison(AP, PAIRS[:1], analysis=False, unplanned_looks=[2])
    assert "added after the verdict of 2 seeds could be seen" in read_report(folder).answer[-1]
    folder = comparison(AP, PAIRS[:1], analysis=False, unplanned_looks=[len(AP[SL1])])
    assert "chosen after all results could be seen" in read_report(folder).answer[-1]


def test_a_lower_ap_is_said(comparison):
    pair = [(SL1, GHM_R, "")]
    verdict = read_report(comparison(pairs=pair, analysis=False)).answer
    assert verdict[0].startswith(f"{SL1} has a lower AP than {GHM_R}, by -2.0")
    assert "corrected" not in " ".join(verdict)


def test_one_seed_makes_no_claim_however_large_the_difference(comparison):
    folder = comparison({SL1: (10.0,), GHM_R: (90.0,)}, ONE_PAIR, analysis=False)
    text = " ".join(read_report(folder).answer)
    assert "one seed: no claim" in text
    assert "higher" not in text and "lower" not in text and "exploration" not in text
    assert "A claim needs two seeds" in text


def test_unequal_seeds_are_compared_on_those_both_have(comparison):
    ap = {SL1: (50.0, 51.0, None, 99.0), GHM_R: (52.0, 53.5, 10.0, None)}
    report = read_report(comparison(ap, ONE_PAIR, analysis=False))
    (difference,) = report.differences
    assert difference.seeds == [1, 2]
    assert difference.ap["AP"].mean == pytest.approx(2.25)


def test_no_seed_on_both_sides(comparison):
    folder = comparison({SL1: (50.0, None), GHM_R: (None, 52.0)}, ONE_PAIR, analysis=False)
    assert "no seed on both sides: no claim" in read_report(folder).answer[0]


def test_a_diverged_run_is_told_and_counts_as_an_ap_of_zero(comparison):
    folder = comparison(analysis=False)
    how = "diverged at iteration 312: loss_cls was nan"
    write_run(folder / "../runs/3_2", 3, GHM, 2, 99.0, status="diverged", outcome=how)
    report = read_report(folder)
    sentence = f"{GHM}: diverged in 1 of 3 runs, which counts as AP 0 (seed 2: {how})."
    assert sentence in report.answer
    row = next(row for row in report.rows if row.side.name == GHM)
    assert (row.ap["AP"].n, row.ap["AP"].mean) == (3, pytest.approx((48.0 + 0 + 49.5) / 3))
    assert row.ap["APs"].n == 0  # it is defined in no run
    difference = report.differences[1]
    assert difference.seeds == [1, 2, 3]
    assert difference.ap["AP"].mean == pytest.approx((1.0 - 49.0 + 1.5) / 3)
    assert row.cost["s_per_iter"].n == 2
    assert "2 of 3" in report.markdown


def test_a_diverged_run_that_leaves_a_pair_undecided_is_left_out_once(comparison):
    """The interval of the pair is a hundred AP wide; what the other seeds show is told apart."""
    start = "Descriptive, not tested: mean difference of AP over the seeds that finished"
    folder = comparison(analysis=False)
    assert start not in " ".join(read_report(folder).answer)
    write_run(folder / "../runs/3_2", 3, GHM, 2, 99.0, status="diverged")
    report = read_report(folder)
    assert report.differences[1].verdict.word == "undecided"
    shown = f"{GHM} against {FOCAL}, +1.2 over 2 of 3 seeds (1 and 0 runs diverged)."
    assert report.answer.count(f"{start} on both sides: {shown}") == 1
    assert report.to_json()["pairs"][1]["AP"]["difference"] < -10  # the tested one counts it


def test_a_run_that_failed_is_missing(comparison):
    folder = comparison(AP, PAIRS[:1], analysis=False)
    write_run(folder / "../runs/1_2", 1, GHM_R, 2, 0.0, status="failed", metrics={})
    report = read_report(folder)
    assert report.differences[0].verdict.word == "interim: 2 of 3 seeds, no verdict"
    assert f"{GHM_R}: failed in 1 of 3 runs, which is missing (seed 2: failed)." in report.answer


def test_a_side_that_always_diverged_has_ap_zero(comparison):
    folder = comparison(analysis=False)
    for seed in (1, 2, 3):
        write_run(folder / f"../runs/3_{seed}", 3, GHM, seed, 1.0, status="diverged", metrics={})
    report = read_report(folder)
    text = " ".join(report.answer)
    assert "diverged in 3 of 3 runs" in text
    assert f"{GHM} has a lower AP than {FOCAL}, by -48.0" in text
    json.dumps(report.to_json(), allow_nan=False)


def test_many_questions_are_answered_together(comparison):
    """The density suite asks a dozen; a dozen sentences are no answer."""
    names = [f"M {m}" for m in range(8)]
    ap = {SL1: AP[SL1]} | {name: tuple(v + i for v in AP[SL1]) for i, name in enumerate(names)}
    pairs = [(name, SL1, f"{name} against the published settings") for name in names]
    first, reach, _ = read_report(comparison(ap, pairs, analysis=False)).answer
    assert f"AP is higher for M 2 against {SL1}, +2.0" in first
    assert f"AP is practically the same for M 0 against {SL1}" in first
    assert "The 8 pairs" in reach


def test_pairs_of_one_question_share_its_sentence(comparison):
    pairs = [(GHM_R, SL1, "two stages"), (GHM, SL1, "two stages")]
    first, *_ = read_report(comparison(pairs=pairs, analysis=False)).answer
    assert first.startswith(f"Two stages: {GHM_R} has a higher AP than {SL1}, by +2.0")
    assert f"; undecided between {GHM} and {SL1}" in first


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
