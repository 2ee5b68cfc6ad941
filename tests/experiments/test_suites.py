"""The questions, and how a command names them."""

from importlib.resources import files

import pytest

from ghm_d2.config import get_cfg, load_config
from ghm_d2.errors import UsageError
from ghm_d2.experiments.plan import side_config
from ghm_d2.experiments.suites import BUDGETS, SUITES, choose_sides, find_suite


def test_every_suite_has_a_file_and_every_file_is_a_suite():
    listed = [name.replace(" ", "-") + ".yaml" for name in SUITES]
    there = files("ghm_d2.experiments").joinpath("suites").iterdir()
    assert sorted(file.name for file in there) == sorted(listed)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SUITES)
def test_every_side_is_a_configuration(name, budget):
    suite = find_suite([name], budget)
    loaded = {}
    for side in suite.sides:
        config, overrides = side_config(side, budget)
        cfg = load_config(config, list(overrides))
        loaded[side.name] = cfg.dump() + str(side.noise)
        shared = [side.name, *(s.settings_of for s in suite.sides if s is not side)]
        names = [other.name for other in suite.sides]
        assert not side.settings_of or side.settings_of in (*shared, *names)
    assert len(set(loaded.values())) == len(suite.sides), "two sides are the same experiment"
    for pair in suite.pairs:
        assert {pair.side, pair.reference} <= loaded.keys() and pair.question


@pytest.mark.parametrize(
    "words",
    [
        ["two-stage", "vs", "one-stage"],
        ["two-stage", "one-stage"],
        ["one-stage", "vs", "two-stage"],
        ["two-stage vs one-stage"],
    ],
)
def test_families_are_named_with_and_without_vs(words):
    suite = find_suite(words, "quick")
    assert suite.name == "two-stage vs one-stage"
    methods = {side.name for side in suite.sides if not side.optional}
    assert len(methods) == 4
    assert sum(name.startswith("Faster R-CNN") for name in methods) == 2
    one_family = [p.side.split()[0] == p.reference.split()[0] for p in suite.pairs]
    asked = [p.question == "what GHM changes within each family" for p in suite.pairs]
    assert asked == one_family and True in asked and False in asked


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["loses"], "losses"),
        (["two-stge", "vs", "one-stage"], "two-stage"),
        (["two-stage"], "two-stage vs one-stage"),
        (["losses", "vs", "regresion"], "regression"),
        ([], "losses"),
        (["a.yaml"], "at least two"),
        (["a.yaml", "vs", "b.yaml", "vs", "b.yaml"], "b.yaml is named twice"),
    ],
)
def test_an_unknown_question_names_the_nearest(words, nearest):
    with pytest.raises(UsageError, match=nearest):
        find_suite(words, "quick")


def test_an_unknown_budget_is_refused():
    with pytest.raises(UsageError, match="quick, half, full"):
        find_suite(["losses"], "quik")


def test_sides_are_chosen_by_name():
    suite = find_suite(["two-stage", "one-stage"], "quick")
    assert len(choose_sides(suite).sides) == 4
    everything = choose_sides(suite, optional=True)
    names = {side.name for side in everything.sides}
    assert {
        "Faster R-CNN GHM-C + GHM-R (robust)",
        "Faster R-CNN CE + GHM-R, RPN GHM-C (robust)",
    } <= names
    named = ["RetinaNet focal + SL1", "RetinaNet GHM-C + GHM-R (robust)"]
    two = choose_sides(suite, named)
    assert [side.name for side in two.sides] == named
    assert len(two.pairs) == 1
    with pytest.raises(UsageError, match="did you mean 'RetinaNet focal \\+ SL1'"):
        choose_sides(suite, ["RetinaNet focal"])
    with pytest.raises(UsageError, match="at least two sides"):
        choose_sides(suite, ["RetinaNet focal + SL1"])


def test_the_published_form_is_optional_only_in_the_quick_budget():
    quick, full = (find_suite(["systems"], budget) for budget in ("quick", "full"))
    published = "RetinaNet GHM-C + GHM-R (published)"
    assert published not in [side.name for side in choose_sides(quick).sides]
    assert published in [side.name for side in choose_sides(quick, optional=True).sides]
    assert published in [side.name for side in choose_sides(full).sides]


@pytest.mark.parametrize("name", ["noise", "noise-kinds", "batch-size"])
def test_a_suite_without_published_recipes_says_so(name):
    with pytest.raises(UsageError, match=f"{name} is available only with --budget quick"):
        choose_sides(find_suite([name], "full"))


def side_values(suite: str, side: str):
    (found,) = (s for s in find_suite([suite], "quick").sides if s.name == side)
    return found, load_config(*side_config(found, "quick"))


def test_a_side_may_have_its_own_number_of_iterations_and_factors():
    _, base = side_values("losses", "GHM-C + SL1 (robust)")
    _, long = side_values("noise", "GHM (robust), 20 % noise")
    _, large = side_values("batch-size", "GHM (robust), batch 16")
    _, small = side_values("density", "robust, c / 3")
    assert (base.SOLVER.MAX_ITER, long.SOLVER.MAX_ITER) == (300, 600)
    assert long.SOLVER.WARMUP_ITERS == 2 * base.SOLVER.WARMUP_ITERS
    assert large.SOLVER.MAX_ITER * large.SOLVER.IMS_PER_BATCH == 300 * base.SOLVER.IMS_PER_BATCH
    assert large.SOLVER.BASE_LR == 2 * base.SOLVER.BASE_LR
    priors = [cfg.MODEL.GHM.CLS.PRIOR for cfg in (base, small)]
    assert priors[0] / 3 == pytest.approx(priors[1], rel=1e-3)


def test_the_forms_differ_in_all_detectors_and_no_robust_one_has_keys_of_its_own():
    sides = choose_sides(find_suite(["systems"], "quick"), optional=True).sides
    ghm = {s.name: load_config(*side_config(s, "quick")).MODEL.GHM for s in sides}
    robust = [keys for name, keys in ghm.items() if name.endswith("(robust)")]
    published = [keys for name, keys in ghm.items() if name.endswith("(published)")]
    assert len(robust) == len(published) == 7
    assert all(keys == robust[0] and keys.CLS.PRIOR > 0 for keys in robust)
    defaults = get_cfg().MODEL.GHM
    for keys in published:
        keys.REG.MU, keys.REG.LOSS_WEIGHT = defaults.REG.MU, defaults.REG.LOSS_WEIGHT
        assert keys == defaults


def test_sides_without_a_pair_are_compared_with_the_first():
    suite = choose_sides(find_suite(["losses"], "quick"), ["CE + SL1", "OHEM + SL1"])
    assert [(p.side, p.reference) for p in suite.pairs] == [("OHEM + SL1", "CE + SL1")]


def test_own_configurations_are_named_by_their_files(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    suite = find_suite([str(a), "vs", str(b)], "full")
    assert [side.name for side in suite.sides] == ["a", "b"]
    assert (suite.pairs[0].side, suite.pairs[0].reference) == ("b", "a")
    other = tmp_path / "other" / "a.yaml"
    suite = find_suite([str(a), str(other)], "full")
    assert [side.name for side in suite.sides] == [str(a), str(other)]


def test_a_budget_scales_anyones_schedule(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "_BASE_: quick/retinanet_focal.yaml\n"
        "SOLVER: {MAX_ITER: 3000, STEPS: [2000], WARMUP_ITERS: 100}\nTEST: {EVAL_PERIOD: 0}\n"
    )
    side = find_suite([str(file), "quick/retinanet_ghm.yaml"], "quick").sides[0]

    def solver(budget):
        cfg = load_config(*side_config(side, budget))
        return cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD

    assert solver("full") == (3000, (2000,), 100, 0)
    assert solver("half") == (1500, (1000,), 50, 0)
    assert solver("quick") == (300, (200,), 10, 0)


def test_the_help_names_every_suite(ghm):
    shown = " ".join(ghm("compare", "--help").stdout.split())
    for name in SUITES:
        assert all(word in shown for word in name.split())


def test_one_pair_is_primary():
    """The one that the suite names, or the first of those whose sides are compared."""

    def primary(suite) -> list[tuple[str, str]]:
        return [(pair.side, pair.reference) for pair in suite.pairs if pair.primary]

    for name in SUITES:
        named = [pair for pair in find_suite([name], "quick").pairs if pair.primary]
        chosen = choose_sides(find_suite([name], "quick"))
        assert len(primary(chosen)) == 1 and (not named or chosen.pairs.index(named[0]) >= 0), name
    losses = find_suite(["losses"], "quick")
    assert primary(choose_sides(losses, ["OHEM + SL1", "CE + SL1"])) == [("OHEM + SL1", "CE + SL1")]


def test_folders_of_data_are_sides(digits_folder, tmp_path):
    other = tmp_path / "mended"
    other.symlink_to(digits_folder)
    suite = find_suite([digits_folder, "vs", str(tmp_path / "mended")], "quick")
    assert [side.dataset for side in suite.sides] == [digits_folder, str(other)]
    assert {side.config for side in suite.sides} == {"quick/retinanet_ghm.yaml"}
    chosen = find_suite([digits_folder, str(other)], "quick", "quick/fcos.yaml")
    assert {side.config for side in chosen.sides} == {"quick/fcos.yaml"}
    with pytest.raises(UsageError, match="at least two data sets"):
        find_suite([digits_folder], "quick")
    with pytest.raises(UsageError, match="--config works only for a comparison of data sets"):
        find_suite(["losses"], "quick", "quick/fcos.yaml")


def test_the_word_that_is_no_data_set_is_named(digits_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses").mkdir()  # a suite's name stays one
    assert find_suite(["losses"], "quick").name == "losses"
    for bad, what in ("losses", "has no train.json"), ("typo", "no such folder"):
        with pytest.raises(UsageError, match=f"^{bad}: {what}.* `ghm data import SOURCE"):
            find_suite([digits_folder, "vs", bad], "quick", "quick/fcos.yaml")
    with pytest.raises(UsageError, match="did you mean 'regression'"):
        find_suite(["losses", "vs", "regresion"], "quick")
