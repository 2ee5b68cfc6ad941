"""The same small search for every side of a comparison, on a part of the training split alone.

Each side tries three learning rates and then, at the best of them, two more weights of the box
loss: five trials of half the iterations, trained on four fifths of the training images and judged
by AP on the rest. One weight is enough: a factor common to both losses is one of the learning rate
under SGD, and of no effect under AdamW.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ghm_d2.config import load_config
from ghm_d2.config.detectors import DETECTORS
from ghm_d2.data.catalog import data_label
from ghm_d2.data.fingerprint import fingerprint
from ghm_d2.data.holdout import write_holdout
from ghm_d2.errors import UsageError
from ghm_d2.experiments.plan import PlannedRun, make_run, scaled_schedule
from ghm_d2.records import RunsTable, Trial
from ghm_d2.training.prepare import prepare

LR_FACTORS, WEIGHT_FACTORS = (1.0, 0.5, 2.0), (0.5, 2.0)  # the configured rate wins a tie
# MODEL.META_ARCHITECTURE -> the group with BBOX_REG_LOSS_WEIGHT
WEIGHT_KEYS = {arch: d.group for arch, d in DETECTORS.items() if arch != "RetinaNet"}
TRIALS = len(LR_FACTORS) + len(WEIGHT_FACTORS)  # a side
SEED, ITERATIONS = 0, 0.5  # the seed of no compared run; the share of a run's iterations


class SideSearch:
    """The trials of one side, as far as those already done tell which they are."""

    def __init__(
        self,
        root: Path,
        side: str,
        config: str,
        overrides: Sequence[str],
        dataset: str,
        device: str,
    ):
        """
        Args:
            root: the folder that comparisons share.
            config, overrides: of the side; the search varies them.
            dataset: a folder from `holdout`.

        Raises:
            UsageError: a detector whose box loss has no weight.
        """
        self.side = side
        self._root, self._config, self._dataset, self._device = root, config, dataset, device
        cfg = load_config(config, list(overrides))
        if cfg.MODEL.META_ARCHITECTURE not in WEIGHT_KEYS:
            raise UsageError(
                f"--search knows {', '.join(WEIGHT_KEYS)}, not {cfg.MODEL.META_ARCHITECTURE}; "
                "with focal and smooth_l1 GHMRetinaNet trains as RetinaNet does"
            )
        short = (*scaled_schedule(cfg, ITERATIONS), "TEST.EVAL_PERIOD", "0")
        self._overrides = (*overrides, *short)
        part = WEIGHT_KEYS[cfg.MODEL.META_ARCHITECTURE]
        self._weight_key = f"MODEL.{part}.BBOX_REG_LOSS_WEIGHT"
        self._lr, self._weight = cfg.SOLVER.BASE_LR, cfg.MODEL[part].BBOX_REG_LOSS_WEIGHT

    def trials(self, table: RunsTable) -> list[tuple[tuple[str, ...], PlannedRun]]:
        """(setting, run) of the trials that are known by now; the weights' follow the rates'."""
        rates = [self._setting(lr=f) for f in LR_FACTORS]
        found = [(s, self._run(s)) for s in rates]
        if all(run.is_done(table) for _, run in found):
            best_lr = _best(found, table)[:2]
            weights = [(*best_lr, *self._setting(weight=f)) for f in WEIGHT_FACTORS]
            found += [(s, self._run(s)) for s in weights]
        return found

    def _setting(self, lr: float | None = None, weight: float | None = None) -> tuple[str, ...]:
        if lr is not None:
            return ("SOLVER.BASE_LR", f"{self._lr * lr:g}")
        return (self._weight_key, f"{self._weight * weight:g}")

    def _run(self, setting: tuple[str, ...]) -> PlannedRun:
        overrides = (*self._overrides, *setting)
        return make_run(
            self._root,
            self.side,
            self._config,
            overrides,
            self._dataset,
            SEED,
            self._device,
            analyse=False,
        )


def search(
    sides: Sequence[SideSearch], table: RunsTable, run_all: Callable[[list[PlannedRun]], None]
) -> tuple[dict[str, tuple[str, ...]], list[Trial]]:
    """Run what is not done of the search, and choose for each side.

    Args:
        run_all: trains runs, those alone that are not done.

    Returns:
        the chosen overrides by side, and all trials.
    """
    for _ in ("learning rates", "weights"):
        run_all([run for side in sides for _, run in side.trials(table)])
    chosen, trials = {}, []
    for side in sides:
        found = side.trials(table)
        chosen[side.side] = _best(found, table)
        for setting, run in found:
            ap = _ap(run, table)
            trials.append(Trial(side.side, list(setting), ap, setting == chosen[side.side]))
    return chosen, trials


def holdout(
    root: Path, config: str, overrides: Sequence[str], dataset: str | None, device: str
) -> str:
    """A folder below `root` that divides the training split of the comparison's data.

    Raises:
        UsageError, DataError: there is no one training split, or none that can be divided.
    """
    cfg = prepare(config, overrides, dataset=dataset, device=device)
    if len(cfg.DATASETS.TRAIN) > 1:
        raise UsageError("--search divides one training set; DATASETS.TRAIN names several")
    name = cfg.DATASETS.TRAIN[0]
    folder = root / "data" / f"{data_label(name)}-train-{fingerprint(name)}"
    write_holdout(name, folder)
    return str(folder.resolve())


def _ap(run: PlannedRun, table: RunsTable) -> float | None:
    row = table.latest(run.key)
    if row is None or row["record"]["status"] != "finished":
        return None
    return row["record"]["metrics"].get("AP")


def _best(found, table: RunsTable) -> tuple[str, ...]:
    """The setting with the largest AP; of equals the first; a diverged trial is below all."""

    def score(trial) -> float:
        ap = _ap(trial[1], table)
        return -1.0 if ap is None else ap

    return max(found, key=score)[0]
