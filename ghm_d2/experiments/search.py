"""The search for settings: the same for every side, and never on the data that judge it.

Successive halving over a grid of learning rates and box loss weights around the configured ones:

1. Each setting of the grid is trained once, for half of the iterations. If the best one has the
   grid's largest or smallest rate, one setting beyond it is tried too.
2. The best and the configured setting are trained at full length with two seeds. The configured
   one stays unless the other is ahead by more than half an AP and more than one standard error of
   the differences, paired by data set and seed.

A side takes at most eight full trainings on each data set. On the compared data, trials train on
four fifths of the training images and are judged on the rest. On other data they use its train and
val splits, unless the comparison is judged on some of these val images. AP is the mean over data
sets. One weight is enough: a factor common to both losses acts like a factor on the learning rate
under SGD, and has no effect under AdamW.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ghm_d2.config import load_config
from ghm_d2.config.detectors import DETECTORS
from ghm_d2.data.catalog import data_label
from ghm_d2.data.fingerprint import fingerprint, shared_images
from ghm_d2.data.holdout import write_holdout
from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.plan import PlannedRun, make_run, scaled_schedule
from ghm_d2.records import FINISHED, Comparison, RunsTable, Trial
from ghm_d2.training.prepare import prepare

CONFIGURED = (1.0, 1.0)  # factors of learning rate and weight; first in GRID, it wins ties
# not both halved or both doubled: boxes would learn at a quarter of the rate or four times the rate
GRID = (CONFIGURED, (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0), (0.5, 2.0), (2.0, 0.5))
BEYOND = {0.5: 0.25, 2.0: 4.0}  # the grid's outer rates -> the rates beyond them
SEEDS = (0, 1000)  # not the compared runs' seeds; the first rung uses only the first
SHORT = 0.5  # the first rung's share of the iterations
LEAST_GAIN = 0.5  # AP by which another setting has to be ahead of the configured one
RATE_KEY, WEIGHT_KEY = "SOLVER.BASE_LR", "BBOX_REG_LOSS_WEIGHT"
# MODEL.META_ARCHITECTURE -> the group with WEIGHT_KEY
WEIGHT_GROUPS = {arch: d.group for arch, d in DETECTORS.items() if arch != "RetinaNet"}

Factors = tuple[float, float]
Settings = dict[str, tuple[str, ...]]  # chosen overrides by side


@dataclass(frozen=True)
class PlannedTrial:
    """One training of a search."""

    factors: Factors
    dataset: str  # its label
    final: bool  # trained at full length
    run: PlannedRun

    def score(self, table: RunsTable) -> float:
        """AP, 0..100; 0 if it diverged or has none."""
        return self.ap(table) or 0.0

    def ap(self, table: RunsTable) -> float | None:
        """AP, 0..100; None if it diverged, has none or is not done."""
        row = table.latest(self.run.key)
        if row is None or row["record"]["status"] != FINISHED:
            return None
        return row["record"]["metrics"].get("AP")


class SideSearch:
    """The trials of one side; the results of the first ones decide which follow."""

    def __init__(
        self,
        root: Path,
        side: str,
        config: str,
        overrides: Sequence[str],
        datasets: Mapping[str, str],
        device: str,
    ):
        """
        Args:
            root: the folder that comparisons share.
            config, overrides: the side's own, which the search varies.
            datasets: label -> folder or name, from `trial_data`.

        Raises:
            UsageError: the detector's box loss has no weight.
        """
        self.side = side
        self._root, self._config, self._datasets, self._device = root, config, datasets, device
        cfg = load_config(config, list(overrides))
        if cfg.MODEL.META_ARCHITECTURE not in WEIGHT_GROUPS:
            raise UsageError(
                f"--search supports {', '.join(WEIGHT_GROUPS)}, not {cfg.MODEL.META_ARCHITECTURE}; "
                "GHMRetinaNet with focal and smooth_l1 losses is the same as RetinaNet"
            )
        no_evaluation = ("TEST.EVAL_PERIOD", "0")
        self._full = (*overrides, *no_evaluation)
        self._short = (*overrides, *scaled_schedule(cfg, SHORT), *no_evaluation)
        group = WEIGHT_GROUPS[cfg.MODEL.META_ARCHITECTURE]
        self._weight_key = f"MODEL.{group}.{WEIGHT_KEY}"
        self._rate, self._weight = cfg.SOLVER.BASE_LR, cfg.MODEL[group].BBOX_REG_LOSS_WEIGHT
        self._runs: dict[tuple, PlannedRun] = {}

    def trials(self, table: RunsTable) -> list[PlannedTrial]:
        """The trials known so far; the second rung depends on the first one's results."""
        return self._rungs(table)[0]

    def later(self, table: RunsTable) -> list[PlannedRun]:
        """Runs that stand for the second rung, as long as its trials are not known."""
        return [] if self._rungs(table)[1] else [t.run for t in self._rung(GRID[:2], final=True)]

    def _rungs(self, table: RunsTable) -> tuple[list[PlannedTrial], Factors | None]:
        """The trials known so far, and the first rung's best setting; None until it is done."""
        found = self._rung(GRID)
        best = _best(found, table)
        if best and best[0] in BEYOND:
            found += self._rung([(BEYOND[best[0]], best[1])])
            best = _best(found, table)
        if best and best != CONFIGURED:
            found += self._rung((CONFIGURED, best), final=True)
        return found, best

    def choice(self, table: RunsTable) -> Factors | None:
        """The chosen setting; None while trials are left."""
        found, best = self._rungs(table)
        if not best or not all(trial.run.is_done(table) for trial in found):
            return None
        final = [trial for trial in found if trial.final]
        ahead = [t.score(table) for t in final if t.factors == best]
        configured = [t.score(table) for t in final if t.factors == CONFIGURED]
        gains = [a - b for a, b in zip(ahead, configured, strict=True)]
        return best if _is_clear(gains) else CONFIGURED

    def setting(self, factors: Factors) -> tuple[str, ...]:
        """The setting's overrides; empty for the configured one."""
        rate, weight = factors
        words = (RATE_KEY, f"{self._rate * rate:g}") if rate != 1 else ()
        return (*words, self._weight_key, f"{self._weight * weight:g}") if weight != 1 else words

    def _rung(self, settings: Iterable[Factors], final: bool = False) -> list[PlannedTrial]:
        return [
            PlannedTrial(factors, label, final, self._run(factors, label, seed, final))
            for factors in settings
            for label in self._datasets
            for seed in (SEEDS if final else SEEDS[:1])
        ]

    def _run(self, factors: Factors, label: str, seed: int, final: bool) -> PlannedRun:
        asked = (factors, label, seed, final)
        if asked not in self._runs:
            overrides = (*(self._full if final else self._short), *self.setting(factors))
            self._runs[asked] = make_run(
                self._root,
                self.side,
                self._config,
                overrides,
                self._datasets[label],
                seed,
                self._device,
                analyse=False,
            )
        return self._runs[asked]


def _best(trials: Sequence[PlannedTrial], table: RunsTable) -> Factors | None:
    """The setting with the largest mean AP over the data sets; None while a trial is left."""
    if not all(trial.run.is_done(table) for trial in trials):
        return None
    scores: dict[Factors, list[float]] = {}
    for trial in trials:
        scores.setdefault(trial.factors, []).append(trial.score(table))
    return max(scores, key=lambda factors: statistics.mean(scores[factors]))


def _is_clear(gains: Sequence[float]) -> bool:
    """Return whether the mean of the gains is above LEAST_GAIN and above its standard error."""
    if not gains:
        return False
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.mean(gains) > max(LEAST_GAIN, error)


def search(
    sides: Sequence[SideSearch], table: RunsTable, run_all: Callable[[list[PlannedRun]], None]
) -> tuple[Settings, list[Trial]]:
    """Run the trials that are not done, and choose a setting for each side.

    Args:
        run_all: trains those of the given runs that are not done.

    Returns:
        the chosen overrides by side, and all trials.
    """
    chosen: dict[str, Factors] = {}
    while len(chosen) < len(sides):
        run_all([trial.run for side in sides for trial in side.trials(table)])
        chosen = {side.side: found for side in sides if (found := side.choice(table))}
    settings = {side.side: side.setting(chosen[side.side]) for side in sides}
    trials = [trial for side in sides for trial in _records(side, chosen[side.side], table)]
    return settings, trials


def _records(side: SideSearch, chosen: Factors, table: RunsTable) -> list[Trial]:
    return [
        Trial(
            side.side,
            list(side.setting(trial.factors)),
            trial.ap(table),
            trial.factors == chosen,
            trial.dataset,
            trial.run.seed,
            trial.run.iterations,
        )
        for trial in side.trials(table)
    ]


def read_settings(file: Path, budget: str) -> tuple[Settings, list[Trial]]:
    """The settings that an earlier comparison's search chose, and its trials.

    Args:
        file: the earlier comparison.json, or its folder.
        budget: the new comparison's budget.

    Raises:
        DataError: there is no such file, or it has settings that no search finds.
        UsageError: it was made without a search, or with another budget.
    """
    found = Comparison.read(file)
    settings: Settings = {}
    for trial in found.search:
        if trial.chosen and settings.setdefault(trial.side, tuple(trial.overrides)) != tuple(
            trial.overrides
        ):
            raise DataError(f"{file}: the search has two chosen settings for {trial.side}")
    if not settings:
        raise UsageError(f"{file}: no settings were searched; name a comparison made with --search")
    if found.budget != budget:
        raise UsageError(f"{file}: the search was made with --budget {found.budget}, not {budget}")
    for words in settings.values():
        if not _is_searched(words):
            raise DataError(
                f"{file}: no search chooses the settings {' '.join(words)}; a search sets only "
                f"{RATE_KEY} and {WEIGHT_KEY}, to values above 0"
            )
    return settings, found.search


def _is_searched(words: Sequence[str]) -> bool:
    """Return whether KEY VALUE words set only the learning rate and box loss weights, above 0."""
    known = {RATE_KEY, *(f"MODEL.{group}.{WEIGHT_KEY}" for group in WEIGHT_GROUPS.values())}
    if len(words) % 2 or not known.issuperset(words[::2]):
        return False
    try:
        return all(0 < float(value) < math.inf for value in words[1::2])
    except ValueError:
        return False


def trial_data(
    root: Path,
    config: str,
    overrides: Sequence[str],
    dataset: str | None,
    device: str,
    other: str | None = None,
) -> tuple[str, str]:
    """The data that trials train and are judged on: its label, and its folder or name.

    Args:
        dataset: the compared data set.
        other: another data set to search on, with its train and val splits. If it is None, or the
            comparison is judged on some of its val images, the training split is divided, in a
            folder below `root`.

    Raises:
        UsageError, DataError: there are several training splits, the split cannot be divided, or
            the comparison is judged on some of its images.
    """
    compared = prepare(config, overrides, dataset=dataset, device=device)
    cfg = compared if other is None else prepare(config, overrides, dataset=other, device=device)
    if len(cfg.DATASETS.TRAIN) > 1:
        raise UsageError("--search needs exactly one data set in DATASETS.TRAIN")
    name = cfg.DATASETS.TRAIN[0]
    if other is not None:
        judged = compared.DATASETS.TEST
        if shared := sum(shared_images(name, test) for test in judged):
            raise UsageError(
                f"--search-on {other}: the comparison is judged on {shared} of its training "
                "images; choose another data set"
            )
        if not any(shared_images(val, test) for val in cfg.DATASETS.TEST for test in judged):
            return data_label(name), other
    folder = root / "data" / f"{data_label(name)}-train-{fingerprint(name)}"
    write_holdout(name, folder)
    return data_label(name), str(folder.resolve())
