"""SOLVER.TRACKERS: Detectron2 EventWriters that log a training to Weights & Biases or MLflow.

The trackers' own environment variables set the server and the account (WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI and so on).
"""

import json
import logging
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from ghm_d2.config.loader import plain_config
from ghm_d2.errors import UsageError
from ghm_d2.files import write_text
from ghm_d2.run_folder import TRACKER_FILE

PROJECT = "ghm_d2"
GROUP = "GHM_D2_RUN_GROUP"  # environment variable: the group of a comparison's runs
logger = logging.getLogger(__name__)
_SMOOTHING_WINDOW = 20  # iterations; as in metrics.jsonl


class _Tracker(EventWriter):
    """Sends the values of each logged iteration; a resumed run continues its entry.

    If the server is lost during the training, that is logged once and nothing more is sent.
    """

    name: str  # also the name of the module to import
    package: str

    def __init__(self, cfg, start_iter: int):
        self._folder, self._written = Path(cfg.OUTPUT_DIR), start_iter - 1
        self._lost = False
        ids = _read_ids(self._folder)
        ids[self.name] = self._open(cfg, ids.get(self.name))
        write_text(self._folder / TRACKER_FILE, json.dumps(ids) + "\n")

    def _open(self, cfg, before: str | None) -> str:
        """Begin an entry, or continue the one with the id `before`, and return its id."""
        raise NotImplementedError

    def _send(self, values: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def write(self) -> None:
        if not self._lost:
            self._try(self._send_new)

    def close(self) -> None:
        if not self._lost:
            self._try(self._end)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any type; what a tracker lacks is in metrics.jsonl
            self._lost = True
            reason = str(error).partition("\n")[0] or type(error).__name__
            logger.warning(f"{self.name}: {reason}; nothing more of this run is sent to it")

    def _send_new(self) -> None:
        rows: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(_SMOOTHING_WINDOW)
        for name, (value, iteration) in latest.items():
            if iteration > self._written:
                rows.setdefault(iteration, {})[name] = value
        for iteration in sorted(rows):
            self._send(rows[iteration], iteration)
        self._written = max([self._written, *rows])


class WandbWriter(_Tracker):
    """Writes an entry of Weights & Biases, with project, name, group and configuration."""

    name = package = "wandb"

    def _open(self, cfg, before):
        self._run = _import(type(self)).init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._folder.resolve().name,
            group=os.environ.get(GROUP),
            dir=str(self._folder),
            config=plain_config(cfg),
            id=before,
            resume="allow",
        )
        return self._run.id

    def _send(self, values, iteration):
        self._run.log(values, step=iteration)

    def _end(self) -> None:
        self._run.finish()


class MLflowWriter(_Tracker):
    """Writes a run of MLflow, with experiment and name, a tag for the group and config.yaml."""

    name, package = "mlflow", "mlflow-skinny"

    def _open(self, cfg, before):
        self._mlflow = _import(type(self))
        try:
            self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            run = self._mlflow.start_run(
                run_id=before, run_name=None if before else self._folder.resolve().name
            )
        except self._mlflow.MlflowException as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"MLflow: {reason}; check the URI in MLFLOW_TRACKING_URI") from None
        if group := os.environ.get(GROUP):
            self._mlflow.set_tag("group", group)
        self._mlflow.log_text(cfg.dump(), "config.yaml")
        return run.info.run_id

    def _send(self, values, iteration):
        self._mlflow.log_metrics(values, iteration)

    def _end(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, type[_Tracker]] = {kind.name: kind for kind in (WandbWriter, MLflowWriter)}


def trackers_of(cfg, start_iter: int = 0) -> list[EventWriter]:
    """Return a writer for each of SOLVER.TRACKERS.

    Raises:
        UsageError: a tracker's package is not installed, or its server refuses. No entry is begun
            if a package is missing.
    """
    kinds = [TRACKERS[name] for name in cfg.SOLVER.TRACKERS]
    for kind in kinds:
        _import(kind)
    if not start_iter:
        (Path(cfg.OUTPUT_DIR) / TRACKER_FILE).unlink(missing_ok=True)
    return [kind(cfg, start_iter) for kind in kinds]


def _import(kind: type[_Tracker]):
    try:
        return import_module(kind.name)
    except ImportError as error:
        remedy = f"pip install {kind.package} (or 'ghm_d2[trackers]')"
        missing = isinstance(error, ModuleNotFoundError) and error.name == kind.name
        fault = "is not installed" if missing else f"cannot be imported ({error})"
        raise UsageError(
            f"SOLVER.TRACKERS {kind.name}: the package {kind.package} {fault}; run: {remedy}"
        ) from None


def _read_ids(folder: Path) -> dict[str, str]:
    """Return tracker -> id of this run's entry, as an earlier start of the run wrote them."""
    try:
        found = json.loads((folder / TRACKER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in known if name in TRACKERS and isinstance(value, str)}
