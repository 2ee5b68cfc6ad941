"""The analysis of a run that has just been trained, for `ghm train` and `ghm compare`."""

import time
from pathlib import Path

from detectron2.data import DatasetCatalog

from ghm_d2.analysis.analyse import IMAGES, NOISY_IMAGES, analyse
from ghm_d2.analysis.cost import measure
from ghm_d2.analysis.loss_inputs import has_noise, training_items
from ghm_d2.inference.evaluation.evaluate import Evaluation
from ghm_d2.inference.load import load_detector
from ghm_d2.progress import Progress
from ghm_d2.records import RunRecord
from ghm_d2.run_folder import FINAL_WEIGHTS

LARGEST_SHARE = 0.05  # largest share of the training's time for an analysis not asked for
_SET_UP_SECONDS = 3  # building the model, counting its operations, drawing worst.jpg
_LOSS_BATCHES = 3  # duration of `measure`, in batches
_SHARE_OF_STEP = 0.5  # a forward pass and its losses, as a share of a training step
_READINGS = 4  # how often the analysis reads a data set's annotations


def analyse_run(
    cfg, record: RunRecord, progress: Progress, evaluation: Evaluation | None = None
) -> None:
    """Write analysis.json and worst.jpg of the run in OUTPUT_DIR; add its detector's cost.

    The cost, `gflops` and `loss_ms`, is added to the record of the finished run.

    Args:
        cfg: the run's configuration; its data sets are registered.
        record: the run's record.
        progress: is told of every image.
        evaluation: the evaluation of the final weights on DATASETS.TEST, if there is one already.

    Raises:
        DataError: an image cannot be read.
        WeightsError: there is no model_final.pth, or it cannot be read.
    """
    folder = Path(cfg.OUTPUT_DIR)
    model = load_detector(cfg, folder / FINAL_WEIGHTS)
    for name, value in measure(cfg, model).items():
        setattr(record, name, value)
    record.write(folder)
    analyse(cfg, model, folder, progress, evaluation)


def expected_analysis_seconds(cfg, record: RunRecord, evaluated: bool) -> float:
    """Estimate how many seconds `analyse_run` will take, from the speed of the training.

    Args:
        evaluated: whether `analyse_run` will be given an evaluation.
    """
    start = time.perf_counter()
    items = training_items(cfg, NOISY_IMAGES)
    reading = time.perf_counter() - start
    images = len(items) if has_noise(items) else min(len(items), IMAGES)
    batches = images / cfg.SOLVER.IMS_PER_BATCH + _LOSS_BATCHES
    # one process analyses the whole batches that a group shared
    step = record.world_size * record.train_seconds / max(record.iterations, 1)
    seconds = _SET_UP_SECONDS + _READINGS * reading + batches * _SHARE_OF_STEP * step
    if not evaluated:
        tests = len(DatasetCatalog.get(cfg.DATASETS.TEST[0]))
        seconds += tests * (record.ms_per_image or 0) / 1000
    return seconds
