"""Detections to compare annotations with: a checkpoint's, or those of cross-validation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ghm_d2.config import load_config
from ghm_d2.config.detectors import score_threshold_key
from ghm_d2.data.coco_json import by_image, load_json
from ghm_d2.data.fingerprint import fingerprint
from ghm_d2.data.holdout import write_fold
from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.plan import PlannedRun, absolute, make_run
from ghm_d2.experiments.run_all import run_all
from ghm_d2.inference.evaluation.evaluate import evaluate
from ghm_d2.inference.load import config_source, load_detector
from ghm_d2.progress import Progress
from ghm_d2.records import FINISHED, TABLE_FILE, RunsTable
from ghm_d2.run_folder import DETECTIONS_FILE
from ghm_d2.training.prepare import prepare_evaluation

LEAST_SCORE = 0.01  # a detection's; a score that is low for one object is high for another

# an image's annotations in COCO's format, and the detections on it in COCO's result format
ImageDetections = Iterator[tuple[list[dict], list[dict]]]


def detections_by_weights(
    weights: Path, config: str | None, name: str, device: str, progress: Progress
) -> ImageDetections:
    """A checkpoint's detections on a registered data set that has a COCO JSON.

    Args:
        config: needed if no config.yaml lies beside the weights.

    Raises:
        UsageError, DataError, WeightsError: the checkpoint or the data cannot be used.
    """
    source = config_source(weights, config)
    words = [*_generous(source, (), name), "MODEL.MASK_ON", "False"]
    cfg = prepare_evaluation(source, words, dataset=name, device=device)
    found = evaluate(load_detector(cfg, weights), cfg, name, progress)
    return _images(load_json(json_file(name)), found.detections)


@dataclass(frozen=True)
class CrossValidation:
    """Cross-validation: each training leaves out one part of a split, then detects on it.

    Attributes:
        root: the folder of the parts, the trainings and their table; interrupted trainings
            continue there.
        config: a shipped configuration's name or a file's absolute path.
        overrides: KEY VALUE words.
        name: a registered data set, with a COCO JSON.
        folds: number of parts, 2 or more.
        seed: the trainings' seed; the parts do not depend on it.
        device: the device that the trainings are planned for.
    """

    root: Path
    config: str
    overrides: tuple[str, ...]
    name: str
    folds: int
    seed: int
    device: str

    def runs(self) -> list[PlannedRun]:
        """The trainings, one per fold.

        Raises:
            UsageError, DataError: the configuration or the data cannot be used.
        """
        if self.folds < 2:
            raise UsageError(f"--folds must be at least 2, not {self.folds}")
        generous = _generous(self.config, self.overrides, self.name)
        words, runs = (*self.overrides, *generous, "TEST.EVAL_PERIOD", "0"), []
        for fold in range(self.folds):
            folder = self.root / "folds" / f"{fingerprint(self.name)}-{fold + 1}-of-{self.folds}"
            write_fold(self.name, folder, fold, self.folds)
            data = absolute(str(folder))
            side = f"fold {fold + 1}"
            run = (self.root, side, self.config, words, data, self.seed, self.device)
            runs.append(make_run(*run, analyse=False))
        return runs

    def train(self, launcher, progress: Progress) -> None:
        """Train the folds that are not done yet.

        Raises:
            UsageError, DataError, RunError: a training failed; another call continues.
            KeyboardInterrupt: after Ctrl-C, once the runs have saved checkpoints.
        """
        run_all(self.runs(), launcher, RunsTable(self.root / TABLE_FILE), progress)

    def detections(self) -> ImageDetections:
        """The annotations and detections of each image, one fold after another.

        Raises:
            DataError: a fold diverged, so that its images have none.
        """
        for run in self.runs():
            record, file = run.record(), run.folder / DETECTIONS_FILE
            if record is None or record.status != FINISHED or not file.is_file():
                why = record.outcome if record else "it was not trained"
                why = why or "none of its images is annotated; use fewer --folds"
                raise DataError(f"{run.side} has no detections: {why} (see {run.folder})")
            coco = load_json(Path(str(run.dataset)) / "val.json")
            yield from _images(coco, json.loads(file.read_text(encoding="utf-8")))


def json_file(name: str) -> str:
    """The COCO JSON of a registered data set; DataError if it has none."""
    from detectron2.data import MetadataCatalog

    file = MetadataCatalog.get(name).get("json_file")
    if file is None:
        raise DataError(f"{name} cannot be judged: it was registered without a COCO JSON file")
    return file


def _generous(config: str, overrides: Sequence[str], name: str) -> tuple[str, ...]:
    """Return overrides that keep enough detections for crowded images, down to LEAST_SCORE."""
    annotations = by_image(load_json(json_file(name))["annotations"])
    most = max(100, 3 * max(map(len, annotations.values()), default=0))
    threshold = score_threshold_key(load_config(config, overrides))
    return threshold, str(LEAST_SCORE), "TEST.DETECTIONS_PER_IMAGE", str(most)


def _images(coco: dict, detections: Sequence[dict]) -> ImageDetections:
    annotations, found = by_image(coco["annotations"]), by_image(detections)
    for image in coco["images"]:
        yield annotations.get(image["id"], []), found.get(image["id"], [])
