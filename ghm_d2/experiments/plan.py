"""Plans the runs of a suite: what each trains, its key and folder, and how long it will take."""

import heapq
import json
import multiprocessing
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghm_d2.config import config_hash, find_config, list_configs, load_config, plain_config
from ghm_d2.config.detectors import DETECTORS
from ghm_d2.config.loader import flatten
from ghm_d2.data.catalog import (
    data_label,
    digits_folder,
    is_registered,
    locate,
    tested_on_training,
)
from ghm_d2.data.coco_json import load_json
from ghm_d2.data.digits.dataset import DigitsSpec
from ghm_d2.data.fingerprint import file_fingerprint, fingerprint
from ghm_d2.describe import device_name, experiment_hash, method_name
from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.suites import Suite, SuiteSide
from ghm_d2.progress import Progress
from ghm_d2.records import DIVERGED, FINISHED, RunRecord, RunsTable
from ghm_d2.run_folder import ANALYSIS_FILE, RUN_FILE
from ghm_d2.training.metrics.timing import time_steps
from ghm_d2.training.prepare import prepare

QUICK_ITERATIONS = 300
# seed of digits on which no setting of a loss was chosen; the digits of seed 0 are for development
NOISE_SEED = 1
SET_UP_SECONDS = 15  # per run, for building the model, loading data and analysis
# meta-architecture -> changes of its losses that the configuration does not show, for a run's key
_LOSSES_SINCE = {"GHMYOLOv3": ["box gradients past the sigmoid"]}
RESULTS = (FINISHED, DIVERGED)  # a run with one of these is never repeated


@dataclass(frozen=True)
class PlannedRun:
    """One training of a comparison, with everything that another process needs to run it."""

    side: str
    config: str  # a shipped configuration's name or an absolute path
    overrides: tuple[str, ...]
    dataset: str | None  # a name or an absolute path; None: the configuration's own
    seed: int
    label: str  # the data's name in the record
    evaluated_on: str  # the registered data set whose AP the record shows
    iterations: int
    config_hash: str
    key: str  # hash of configuration, data and seed
    folder: Path
    analyse: bool = True

    @property
    def command(self) -> str:
        """The `ghm train` command that trains the same."""
        words = ["ghm", "train", "--config", self.config]
        words += ["--dataset", self.dataset] if self.dataset else []
        return shlex.join([*words, "--seed", str(self.seed), *self.overrides])

    def build_config(self, device: str):
        """The run's `CfgNode`; its data sets are then registered."""
        return prepare(
            self.config, self.overrides, dataset=self.dataset, seed=self.seed, device=device
        )

    def record(self) -> RunRecord | None:
        """The record in the run's folder, if there is one."""
        return RunRecord.read(self.folder) if (self.folder / RUN_FILE).is_file() else None

    def is_done(self, table: RunsTable) -> bool:
        """True if the result is in the table and in the run's folder."""
        row = table.latest(self.key)
        if row is None or row["record"]["status"] not in RESULTS or self.record() is None:
            return False
        diverged = row["record"]["status"] == DIVERGED
        return diverged or not self.analyse or (self.folder / ANALYSIS_FILE).is_file()


@dataclass
class Plan:
    """The runs of a comparison, and the time they are expected to take."""

    suite: Suite
    dataset: str  # its label
    runs: list[PlannedRun]
    trials: list[PlannedRun]  # runs of the search, which come first
    later: list[PlannedRun]  # stand for the search's later runs, which depend on `trials`
    done: set[str]  # keys of finished runs
    seconds: dict[str, float]  # key of an unfinished run -> expected seconds
    at_once: int = 1  # runs that share the devices
    margin: float = 1.0  # as in `Comparison`
    looks: tuple[int, ...] = ()

    @property
    def expected_seconds(self) -> float:
        """The seconds until all is done, as if runs on one device did not slow each other down."""
        ends = [0.0] * self.at_once
        for seconds in self.seconds.values():
            heapq.heapreplace(ends, ends[0] + seconds)  # a run takes the place that is free first
        return max(ends)

    def as_dict(self) -> dict:
        """The plan as `--dry-run --json` prints it."""
        return {
            "comparison": self.suite.name,
            "question": self.suite.question,
            "dataset": self.dataset,
            "sides": [side.name for side in self.suite.sides],
            "primary": [asdict(pair) for pair in self.suite.pairs if pair.primary],
            "margin": self.margin,
            "looks": list(self.looks),
            "expected_seconds": round(self.expected_seconds),
            "trials": [self._row(run) for run in self.trials],
            "runs": [self._row(run) for run in self.runs],
        }

    def _row(self, run: PlannedRun) -> dict:
        return {
            "side": run.side,
            "seed": run.seed,
            "iterations": run.iterations,
            "key": run.key,
            "folder": str(run.folder),
            "done": run.key in self.done,
            "expected_seconds": round(self.seconds.get(run.key, 0)),
            "command": run.command,
        }


def side_config(side: SuiteSide, budget: str) -> tuple[str, tuple[str, ...]]:
    """A side's configuration and overrides; the last overrides scale its schedule to the budget.

    "full" is the schedule as written, and "half" has half its iterations. "quick" has as many as
    the side says, or else at most QUICK_ITERATIONS, as the shipped quick configurations have.
    """
    config = portable_config(side.config)
    cfg = load_config(config)
    written = max(1, cfg.SOLVER.MAX_ITER)
    quick = (side.iterations or min(written, QUICK_ITERATIONS)) / written
    factor = {"quick": quick, "half": 0.5, "full": 1.0}[budget]
    values = flatten(cfg)
    scaled = [word for k, x in side.factors.items() for word in (k, f"{values[k] * x:.4g}")]
    return config, (*side.overrides, *scaled, *scaled_schedule(cfg, factor))


def portable_config(config: str) -> str:
    """A shipped configuration's name, or a file's absolute path, for a process elsewhere."""
    if config in list_configs() and not Path(config).is_file():
        return config
    return str(find_config(config).resolve())


def scaled_schedule(cfg, factor: float) -> tuple[str, ...]:
    """Overrides that make a schedule `factor` times as long."""
    if factor == 1.0:
        return ()
    keys = (
        "SOLVER.MAX_ITER",
        "SOLVER.WARMUP_ITERS",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.EVAL_PERIOD",
    )
    words = []
    for key in keys:
        group, name = key.split(".")
        value = cfg[group][name]
        words += [key, str(max(1, round(value * factor)) if value > 0 else value)]
    steps = tuple(max(1, round(step * factor)) for step in cfg.SOLVER.STEPS)
    return (*words, "SOLVER.STEPS", str(steps))


def side_dataset(side: SuiteSide, dataset: str | None) -> str | None:
    """The data set of a side: its own, the generated digits with its noise, or the comparison's.

    Raises:
        UsageError: a side brings its own data and another data set is asked for.
    """
    if side.dataset:
        if dataset:
            raise UsageError("the compared folders are the data sets; leave out --dataset")
        return absolute(side.dataset)
    if side.noise is None:
        return dataset and absolute(dataset)
    if dataset not in (None, "digits"):
        raise UsageError(
            f"{side.name} needs the data set digits, whose annotation errors are known; leave out "
            "--dataset"
        )
    if isinstance(side.noise, dict):
        rates: dict[str, Any] = {f"noise_{kind}": rate for kind, rate in side.noise.items()}
        return str(digits_folder(DigitsSpec(seed=NOISE_SEED, **rates)))
    return str(digits_folder(DigitsSpec(seed=NOISE_SEED, noise=side.noise)))


def require_one_val(suite: Suite) -> None:
    """Check that the data sets which a suite compares have the same val split to be judged on.

    Raises:
        DataError: the val splits differ, or a data set has none.
    """
    folders = [side.dataset for side in suite.sides if side.dataset]
    first = None
    for folder in folders:
        file, _ = locate(folder).get("val", (None, None))
        if file is None:
            raise DataError(f"{folder} has no val.json, on which the comparison would be judged")
        coco = load_json(file)
        sizes = [(image["id"], image["width"], image["height"]) for image in coco["images"]]
        judge = sizes, coco.get("annotations", []), coco["categories"]
        first = first or judge
        if judge != first:
            raise DataError(
                f"{folders[0]} and {folder} have different val splits; to compare them, give them "
                "the same val split"
            )


def absolute(dataset: str) -> str:
    """A data set's name, or its folder's absolute path, for a process that runs elsewhere."""
    if is_registered(dataset) or not Path(dataset).exists():
        return dataset
    return str(Path(dataset).resolve())


def make_run(
    root: Path,
    side: str,
    config: str,
    overrides: Sequence[str],
    dataset: str | None,
    seed: int,
    device: str,
    analyse: bool = True,
) -> PlannedRun:
    """A run with its key, in a folder below `root`/runs.

    Raises:
        UsageError, DataError: the configuration or the data cannot be used.
    """
    cfg = prepare(config, overrides, dataset=dataset, seed=seed, device=device)
    if cfg.SOLVER.PATIENCE:
        raise UsageError(
            "early stopping (SOLVER.PATIENCE) would choose weights on the images that judge the "
            "comparison; set SOLVER.PATIENCE to 0"
        )
    if line := tested_on_training(cfg):
        raise UsageError(line)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    experiment = experiment_hash(cfg)
    weights, pretrained = cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED
    content = [experiment, file_fingerprint(weights), [fingerprint(n) for n in names], seed]
    content += [file_fingerprint(pretrained)] if Path(pretrained).is_file() else []
    content += _LOSSES_SINCE.get(cfg.MODEL.META_ARCHITECTURE, [])
    key = config_hash(json.dumps(content))
    slug = re.sub(r"[^a-z0-9]+", "-", method_name(cfg).lower()).strip("-")
    return PlannedRun(
        side=side,
        config=config,
        overrides=tuple(overrides),
        dataset=dataset,
        seed=seed,
        label=data_label(cfg.DATASETS.TRAIN[0]),
        evaluated_on=cfg.DATASETS.TEST[0],
        iterations=cfg.SOLVER.MAX_ITER,
        config_hash=experiment,
        key=key,
        folder=root / "runs" / f"{slug}-s{seed}-{key}",
        analyse=analyse,
    )


def expected_seconds(
    runs: Sequence[PlannedRun], table: RunsTable, device: str, progress: Progress
) -> dict[str, float]:
    """Seconds for each run, by key: from finished runs of its configuration, or timed steps.

    Runs that differ only in their losses share one timing.
    """
    timings: dict[str, tuple[float, float]] = {}
    expected = {}
    spawn = multiprocessing.get_context("spawn")
    # a separate process, which frees its memory when it ends
    with ProcessPoolExecutor(1, spawn) as pool:
        for run in progress.track(runs, "timing a few steps", len(runs)):
            cfg = run.build_config(device)
            kind = _kind_of_network(cfg)
            if kind not in timings:
                known = _known_timing(run, table, device_name(device))
                timings[kind] = known or pool.submit(_time_steps, run, device).result()
            expected[run.key] = _seconds(cfg, *timings[kind])
    return expected


def _known_timing(run: PlannedRun, table: RunsTable, device: str) -> tuple[float, float] | None:
    """The timing of a finished run with the same configuration on the same device."""
    for row in table.rows():
        record = row["record"]
        same = (record["config_hash"], record["device"]) == (run.config_hash, device)
        if same and record["s_per_iter"] and record["ms_per_image"]:
            return record["s_per_iter"], record["ms_per_image"] / 1000
    return None


def _time_steps(run: PlannedRun, device: str) -> tuple[float, float]:
    return time_steps(run.build_config(device))


def _kind_of_network(cfg) -> str:
    """The settings that decide the time of a step, apart from the losses."""
    losses = ("LOSS_TYPE", "LOSS_WEIGHT")
    model = plain_config(cfg.MODEL)
    del model["GHM"], model["WEIGHTS"]
    for detector in DETECTORS.values():
        keys = model[detector.group]
        model[detector.group] = {k: v for k, v in keys.items() if not k.endswith(losses)}
    return json.dumps([model, cfg.INPUT, cfg.SOLVER.IMS_PER_BATCH, cfg.DATASETS.TRAIN], default=str)


def _seconds(cfg, s_per_iter: float, s_per_image: float) -> float:
    from detectron2.data import DatasetCatalog

    iterations, period = cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD
    evaluations = 1 + ((iterations - 1) // period if period > 0 else 0)
    images = evaluations * len(DatasetCatalog.get(cfg.DATASETS.TEST[0]))
    return SET_UP_SECONDS + iterations * s_per_iter + images * s_per_image
