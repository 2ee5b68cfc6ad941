"""The order in which runs are made, whatever happens to them; the runs themselves are pretended."""

import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from ghm_d2.describe import device_name
from ghm_d2.errors import DataError, RunError, UsageError
from ghm_d2.experiments import compare as module
from ghm_d2.experiments.compare import Request, compare, make_plan, make_runs
from ghm_d2.experiments.launch import BUSY
from ghm_d2.experiments.plan import expected_seconds
from ghm_d2.experiments.run_all import run_all
from ghm_d2.experiments.search import read_settings
from ghm_d2.experiments.suites import Suite, choose_sides, find_suite
from ghm_d2.progress import Progress
from ghm_d2.records import Comparison, Pair, RunRecord, RunsTable, Trial
from ghm_d2.run_folder import LOG_FILE
from ghm_d2.training.metrics.trackers import GROUP

GHM_C, GHM = "GHM-C (robust)", "GHM-C + SL1 (robust)"


@dataclass
class Pretended:
    """A launcher whose runs end at once, with the codes that `script` has for their sides."""

    script: dict[str, list]
    room: int = 1

    def __post_init__(self):
        self.free = [None] * self.room
        self.started, self.stopped, self.most = [], [], 0

    def start(self, run, table_file):
        self.started.append((run.side, run.seed))
        self.free.pop()
        self.most = max(self.most, self.room - len(self.free))
        return PretendedJob(self, run, table_file)


class PretendedJob:
    def __init__(self, launcher, run, table_file):
        self.launcher, self.run, self.table_file = launcher, run, table_file

    def poll(self):
        codes = self.launcher.script.get(self.run.side, [])
        code = codes.pop(0) if codes else 0
        if code is None:
            return None
        self.launcher.free.append(None)
        if code == 0:
            enter(self.run, self.table_file)
        return code

    def stop(self):
        self.launcher.stopped.append(self.run.side)

    def wait(self):
        assert self.run.side in self.launcher.stopped


def enter(run, table_file, **measured):
    run.folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord("m", "n", "d", run.config_hash, run.seed, **measured)
    record.metrics, record.device = {"AP": 1.0}, device_name("cpu")
    record.write(run.folder)
    (run.folder / "analysis.json").write_text("{}")
    folder = str(run.folder.relative_to(table_file.parent))
    RunsTable(table_file).append({"key": run.key, "folder": folder, "record": asdict(record)})


class Heard(Progress):
    def __init__(self):
        self.messages, self.steps = [], []

    def message(self, text):
        self.messages.append(text)

    def step(self, iteration, max_iter, scalars):
        self.steps.append((iteration, max_iter))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    for place in ("compare", "run_all"):
        monkeypatch.setattr(f"ghm_d2.experiments.{place}.POLL_SECONDS", 0)


@pytest.fixture
def request_(digits_folder, tiny, tmp_path) -> Request:
    suite = choose_sides(find_suite(["losses"], "quick"), ["focal + SL1", GHM])
    return Request(suite, digits_folder, "quick", (1, 2), tmp_path, "cpu", tuple(tiny))


@pytest.fixture
def runs(request_):
    return make_runs(request_, {})


def test_all_sides_have_the_same_seeds(runs):
    assert [(run.side, run.seed) for run in runs] == [
        ("focal + SL1", 1),
        (GHM, 1),
        ("focal + SL1", 2),
        (GHM, 2),
    ]
    assert len({run.key for run in runs}) == 4


def test_settings_of_a_search_reach_their_side_and_those_that_share_it(request_):
    suite = choose_sides(find_suite(["density"], "quick"), ["CE", GHM_C, "robust, M 10"])
    request = replace(request_, suite=suite)
    chosen = {GHM_C: ("SOLVER.BASE_LR", "0.5"), "CE": ("SOLVER.BASE_LR", "0.25")}
    rates = {run.side: run.overrides[-1] for run in make_runs(request, chosen)}
    assert rates == {"CE": "0.25", GHM_C: "0.5", "robust, M 10": "0.5"}


def test_finished_runs_are_not_started_again(request_, runs):
    enter(runs[1], request_.table.file)
    run_all(runs, launcher := Pretended({}), request_.table, heard := Heard())
    assert launcher.started == [("focal + SL1", 1), ("focal + SL1", 2), (GHM, 2)]
    assert heard.messages[-1] == f"4 of 4 runs: {GHM}, seed 2: AP 1.0"
    assert heard.steps[-1] == (16, 16)
    enter(runs[0], request_.table.file, status="diverged")  # which is a result, too
    run_all(runs, again := Pretended({}), request_.table, Heard())
    assert again.started == []


def test_a_run_without_its_analysis_is_not_done(request_, runs):
    enter(runs[0], request_.table.file)
    (runs[0].folder / "analysis.json").unlink()
    run_all(runs[:1], launcher := Pretended({}), request_.table, Heard())
    assert launcher.started == [("focal + SL1", 1)]


def test_as_many_at_once_as_there_is_room_for(request_, runs):
    one, two = Pretended({}), Pretended({"focal + SL1": [None, None]}, room=2)
    run_all(runs[:2], one, request_.table, Heard())
    run_all(runs[2:], two, request_.table, Heard())
    assert (one.most, two.most) == (1, 2)


def test_a_run_that_another_comparison_is_at_waits(request_, runs):
    launcher = Pretended({"focal + SL1": [BUSY, BUSY]})
    run_all(runs[:2], launcher, request_.table, Heard())
    assert launcher.started.count(("focal + SL1", 1)) == 3
    assert all(run.is_done(request_.table) for run in runs[:2])


def test_a_run_that_another_comparison_finishes_is_taken_over(request_, runs):
    class Other(Pretended):
        def start(self, run, table_file):
            enter(runs[1], table_file)
            return super().start(run, table_file)

    launcher, heard = Other({}), Heard()
    run_all(runs[:2], launcher, request_.table, heard)
    assert launcher.started == [("focal + SL1", 1)] and len(heard.messages) == 2


@pytest.mark.parametrize(("code", "kind"), [(3, DataError), (1, RunError), (-9, RunError)])
def test_a_failed_run_stops_the_comparison_with_what_it_said(request_, runs, code, kind):
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / LOG_FILE).write_text("noise\nerror: image.jpg: cannot be read\n\n")
    launcher = Pretended({"focal + SL1": [code], GHM: [None] * 9}, room=2)
    with pytest.raises(kind) as error:
        run_all(runs[:2], launcher, request_.table, Heard())
    assert type(error.value) is kind
    assert "focal + SL1, seed 1" in str(error.value) and "image.jpg: cannot" in str(error.value)
    assert launcher.stopped == [GHM]
    assert ("signal 9" in str(error.value)) == (code == -9)


def test_an_interrupted_run_interrupts(request_, runs):
    with pytest.raises(KeyboardInterrupt):
        run_all(runs[:1], Pretended({"focal + SL1": [130]}), request_.table, Heard())


def test_another_question_or_setting_has_another_folder(request_, tmp_path):
    def folder(**changes) -> Path:
        return replace(request_, **changes).folder()

    def own(name, rate) -> Suite:
        (tmp_path / name).mkdir()
        for side in "ab":
            text = f"_BASE_: quick/retinanet_ghm.yaml\nSOLVER: {{BASE_LR: {rate}}}\n"
            (tmp_path / name / f"{side}.yaml").write_text(text)
        return find_suite([f"{tmp_path / name}/a.yaml", f"{tmp_path / name}/b.yaml"], "full")

    names = {
        folder(),
        folder(overrides=(*request_.overrides, "SOLVER.BASE_LR", "1")),
        folder(search=True),
        folder(suite=choose_sides(find_suite(["losses"], "quick"))),
        folder(suite=own("x", 1)),
        folder(suite=own("y", 2)),
    }
    assert len(names) == 6
    assert folder(seeds=(1, 2, 3)) == folder(), "more seeds complete the same comparison"


def test_trackers_see_the_runs_of_a_comparison_as_one_group(request_, monkeypatch):
    monkeypatch.setenv(GROUP, "that of a comparison before")
    seen, start = set(), Pretended.start

    def started(self, run, table_file):
        seen.add(os.environ[GROUP])
        return start(self, run, table_file)

    monkeypatch.setattr(Pretended, "start", started)
    folder = module.compare(request_, Pretended({}), Heard())
    assert seen == {folder.name}


def test_a_comparison_is_recorded_by_one_process_at_a_time(request_, monkeypatch):
    file, asked = request_.folder() / "comparison.json", []

    def take(lock):
        asked.append(file.is_file())
        return len(asked) > 2  # until then another process has it

    monkeypatch.setattr("ghm_d2.experiments.compare.take", take)
    compare(request_, Pretended({}), Heard())
    assert asked == [False, False, False] and file.is_file()


def test_fewer_seeds_take_none_from_the_comparison(request_):
    for seeds in ((1, 2), (1,), (1, 2, 3)):
        request = replace(request_, seeds=seeds, command=f"--seeds {len(seeds)}")
        folder = compare(request, Pretended({}), Heard())
    assert Comparison.read(folder).seeds == [1, 2, 3]
    request = replace(request_, seeds=(1,), command="--seeds 1")
    comparison = Comparison.read(compare(request, Pretended({}), Heard()))
    assert comparison.command == "--seeds 3", "which does what is not done"
    assert comparison.seeds == [1, 2, 3]
    assert all((folder / run / "run.json").is_file() for s in comparison.sides for run in s.runs)


def test_a_plan_is_not_changed_once_it_has_begun(request_):
    asked = replace(request_, seeds=(1, 2, 3, 4), margin=0.5, looks=(3,))
    folder = compare(asked, Pretended({}), Heard())
    again = replace(asked, margin=None, looks=None)  # as the command without the options
    kept = Comparison.read(compare(again, Pretended({}), Heard()))
    assert (kept.margin, kept.looks) == (0.5, [3]) and sum(p.primary for p in kept.pairs) == 1
    for changed, shown in ({"margin": 1.0}, "--margin, 0.5,"), ({"looks": (2,)}, "--looks, 3,"):
        with pytest.raises(UsageError, match=f"was planned with another {shown}"):
            compare(replace(again, **changed), Pretended({}), Heard())
    inside = replace(asked, root=folder, margin=1.0, looks=(2,))  # --output is a comparison's
    assert module.keep_plan(inside) == inside
    kept = Comparison.read(folder)
    assert kept.unplanned_looks == []
    other = Pair(GHM, "another", "", primary=True)
    kept.pairs = [other, *(replace(p, primary=False) for p in kept.pairs)]
    kept.write(folder)
    with pytest.raises(UsageError, match=f"another primary pair, {re.escape(GHM)} against"):
        compare(again, Pretended({}), Heard())


def test_a_look_that_decides_ends_the_comparison(request_):
    request = replace(request_, seeds=(1, 2, 3, 4), looks=(2, 3))
    asked = []

    def at_the_second(folder, look):
        asked.append((folder, look, Comparison.read(folder).seeds))
        return len(asked) > 1

    first, heard = Pretended({}), Heard()
    folder = compare(request, first, heard, at_the_second)
    assert {seed for _, seed in first.started} == {1, 2, 3}
    assert asked == [(folder, look, [1, 2, 3, 4]) for look in (2, 3)]
    assert heard.messages[-1].startswith("the early verdict after 3 seeds decides the primary pair")
    rest = Pretended({})
    compare(request, rest, Heard())
    assert {seed for _, seed in rest.started} == {4}, "without the question all seeds are trained"
    compare(request, Pretended({}), heard, at_the_second)
    assert len(asked) == 2, "nothing is left that a look could save"


def test_a_plan_made_when_all_results_are_there_is_noted(request_):
    compare(request_, Pretended({}), Heard())
    fewer = choose_sides(request_.suite, [side.name for side in request_.suite.sides][:2])
    turned = replace(fewer, sides=fewer.sides[::-1])
    folder = compare(replace(request_, suite=turned, margin=0.1), Pretended({}), Heard())
    assert folder != request_.folder()
    assert Comparison.read(folder).unplanned_looks == [len(request_.seeds)]


def test_seeds_that_are_added_after_the_verdict_are_noted(request_):
    compare(replace(request_, seeds=(1, 2)), Pretended({}), Heard())
    folder = compare(replace(request_, seeds=(1, 2, 3)), Pretended({}), Heard())
    assert Comparison.read(folder).unplanned_looks == [2]


def test_a_search_that_is_half_done_can_be_planned(request_, monkeypatch):
    monkeypatch.setattr("ghm_d2.experiments.plan._known_timing", lambda *_: (1.0, 0.1))
    request = replace(request_, search=True)
    plan = make_plan(request, Heard())
    assert len(plan.trials) == 14 and len(plan.later) == 8 and not plan.done
    assert all(plan.seconds[run.key] > 0 for run in (*plan.trials, *plan.later, *plan.runs))
    for trial in plan.trials:
        enter(trial, request.table.file)
    later = make_plan(request, Heard())
    assert len(later.trials) == 14 and later.later == []
    assert len(later.done) == 14 and later.expected_seconds < plan.expected_seconds


def test_a_search_on_other_data_is_reused(request_, noisy_folder, tmp_path):
    request = replace(request_, seeds=(1,), search=True, search_on=(noisy_folder,))
    folder = compare(request, Pretended({}), Heard())
    searched = Comparison.read(folder)
    assert searched.dataset == "digits" and {t.dataset for t in searched.search} == {"noisy"}
    assert folder != replace(request, search_on=()).folder()
    for trial in searched.search:  # as if it had found something
        trial.overrides = ["SOLVER.BASE_LR", "0.5"] if trial.chosen else trial.overrides
    searched.write(folder)

    frozen = replace(request_, seeds=(1,), settings=folder)
    launcher = Pretended({})
    again = compare(frozen, launcher, Heard())
    assert launcher.started == [("focal + SL1", 1), (GHM, 1)], "no trials"
    found = Comparison.read(again)
    assert [side.overrides[-2:] for side in found.sides] == [["SOLVER.BASE_LR", "0.5"]] * 2
    assert found.search == searched.search and again not in (folder, request_.folder())

    suite = choose_sides(find_suite(["losses"], "quick"), ["focal + SL1", "OHEM + SL1"])
    with pytest.raises(UsageError, match="has no settings for OHEM"):
        make_plan(replace(frozen, suite=suite), Heard())


@pytest.mark.parametrize(
    "words",
    [
        ["SOLVER.BASE_LR", "inf"],
        ["SOLVER.BASE_LR", "-1"],
        ["SOLVER.BASE_LR", "many"],
        ["SOLVER.BASE_LR"],
        ["MODEL.NOPE.BBOX_REG_LOSS_WEIGHT", "2"],
        ["OUTPUT_DIR", "/"],
    ],
)
def test_settings_that_no_search_finds_are_refused(tmp_path, words):
    comparison = Comparison("a", "", "digits", "quick", [1], [], [])
    comparison.search = [Trial("focal + SL1", words, 50.0, True)]
    comparison.write(tmp_path)
    with pytest.raises(DataError, match="no search chooses the settings"):
        read_settings(tmp_path, "quick")
    comparison.search = [Trial("a", ["SOLVER.BASE_LR", x], 50.0, True) for x in ("1", "2")]
    comparison.write(tmp_path)
    with pytest.raises(DataError, match="two chosen settings for a"):
        read_settings(tmp_path, "quick")


def test_runs_of_one_configuration_take_as_long_as_the_last(request_, runs):
    enter(runs[0], request_.table.file, s_per_iter=1000.0, ms_per_image=1.0)
    heard = Heard()
    left = expected_seconds(runs[2:3], request_.table, "cpu", heard)
    assert 4000 < left[runs[2].key] < 4100


def test_runs_side_by_side_are_expected_to_end_sooner(request_, monkeypatch):
    monkeypatch.setattr("ghm_d2.experiments.plan._known_timing", lambda *_: (1.0, 0.1))
    request = replace(request_, seeds=(1, 2, 3))
    one = make_plan(request, Heard())
    each = one.expected_seconds / 6
    several = {n: make_plan(replace(request, at_once=n), Heard()) for n in (2, 4, 8)}
    runs = {n: plan.as_dict()["expected_seconds"] / each for n, plan in several.items()}
    assert runs == pytest.approx({2: 3, 4: 2, 8: 1}, rel=0.05)


def test_what_a_side_shares_with_another_is_recorded(request_, monkeypatch):
    suite = choose_sides(find_suite(["density"], "quick"), ["CE", GHM_C, "robust, M 10"])
    request = replace(request_, suite=suite, search=True, seeds=(1,))
    sides = Comparison.read(compare(request, Pretended({}), Heard())).sides
    assert {side.name: side.settings_of for side in sides} == {
        "CE": "",
        GHM_C: "",
        "robust, M 10": GHM_C,
    }


def test_conditions_share_one_search_and_what_an_earlier_one_found(request_, monkeypatch):
    """The noise lab takes the settings of the claim, whose sides have the same names."""
    monkeypatch.setattr("ghm_d2.experiments.plan.digits_folder", lambda _: request_.dataset)
    monkeypatch.setattr(module, "expected_seconds", lambda runs, *_: {run.key: 1 for run in runs})
    suite = choose_sides(find_suite(["noise"], "quick"))
    request = replace(request_, suite=suite, dataset=None, seeds=(1,), search=True)
    trials = make_plan(request, Heard()).trials
    losses = list(dict.fromkeys(run.side for run in trials))
    assert losses == [side.name for side in find_suite(["claim"], "quick").sides]
    rates = {
        run.side: run.overrides[-1]
        for run in make_runs(request, {losses[1]: ("SOLVER.BASE_LR", "0.5")})
    }
    assert [name for name, rate in rates.items() if rate == "0.5"] == [
        f"focal + SL1, {noise} % noise" for noise in (0, 20, 40)
    ]
