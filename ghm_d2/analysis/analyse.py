"""A trained detector's gradients, curves and errors, written into the run's folder."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torch import nn

from ghm_d2.analysis.gradients import (
    BoxGradients,
    ClassGradients,
    asl1_norms,
    box_coder_weights,
    histogram,
    moving_mu,
    smooth_l1_beta,
)
from ghm_d2.analysis.loss_inputs import (
    LossInputs,
    can_capture,
    capture,
    has_noise,
    read_batches,
    training_copy,
    training_items,
)
from ghm_d2.analysis.noise import NoiseWeights
from ghm_d2.data.registered import category_ids, is_lvis
from ghm_d2.files import write_atomically, write_text
from ghm_d2.inference.evaluation.bootstrap import image_bootstrap
from ghm_d2.inference.evaluation.confusion import (
    IOU,
    ImageErrors,
    best_detections,
    confuse,
    worst_images,
)
from ghm_d2.inference.evaluation.evaluate import Evaluation, evaluate
from ghm_d2.inference.predict import sheet_beside_truth
from ghm_d2.progress import Progress
from ghm_d2.run_folder import ANALYSIS_FILE, WORST_FILE

IMAGES = 40  # of the training set
NOISY_IMAGES = 400  # if some annotations are known to be wrong, because those are few
MU = 0.02  # the published value, which the histogram of boxes uses for every detector
_IOUS = {"0.5": 0, "0.75": 5}  # IoU -> index in the evaluation's precision
_CELL = 240  # px
_SHEET_BYTES = 120_000  # so that the reports of many runs can be mailed


def analyse(
    cfg,
    model: nn.Module,
    folder: Path,
    progress: Progress,
    evaluation: Evaluation | None = None,
) -> None:
    """Write analysis.json and worst.jpg into the folder of a run, each whole or not at all.

    analysis.json has the gradients of `measure_gradients` and, on DATASETS.TEST, precision against
    recall, AP on resamples of the images (not for LVIS), the confusion matrix and the ten images
    with the most errors. worst.jpg shows these ten. `model` does not change, nor do its mode and
    moving averages, and the same model gives the same numbers.

    Args:
        cfg: the run's configuration; its data sets are registered.
        model: a trained detector.
        folder: an existing folder.
        progress: is told of every image.
        evaluation: an evaluation of `model` as it is now on DATASETS.TEST, if there is one already.

    Raises:
        DataError: an image cannot be read.
    """
    found = measure_gradients(cfg, model, progress)
    name = cfg.DATASETS.TEST[0]
    evaluation = evaluation or evaluate(model, cfg, name, progress)
    found |= _precision_recall(evaluation.precision)
    if evaluation.metrics and not is_lvis(name):
        found["image_bootstrap"] = image_bootstrap(name, evaluation.detections)
    metadata, items = MetadataCatalog.get(name), DatasetCatalog.get(name)
    best = best_detections(items, evaluation.detections)
    matrix, errors = confuse(items, best, category_ids(name))
    worst = worst_images(errors)
    found["confusion"] = {
        "iou": IOU,
        "score": best[-1]["score"] if best else 1.0,
        "labels": [*metadata.thing_classes, "background"],
        "matrix": matrix.tolist(),
    }
    root = Path(metadata.get("image_root", ""))
    found["worst"] = [
        {"file_name": _below(root, e), "missed": e.missed, "false": e.false} for e in worst
    ]
    notes = [f"{e.missed} missed, {e.false} false" for e in worst]
    sheet = sheet_beside_truth(name, [e.item for e in worst], best, notes, _CELL)
    write_atomically(str(folder / WORST_FILE), lambda file: file.write(_jpeg(sheet)))
    # on one line: nobody reads thousands of numbers
    write_text(folder / ANALYSIS_FILE, json.dumps(found, allow_nan=False) + "\n")


def _precision_recall(precision: np.ndarray | None) -> dict:
    """Return mean precisions of the classes with a box, at 101 recalls; {} if there is none."""
    if precision is None or not (precision > -1).any():
        return {}
    there = precision[:, :, (precision > -1).any(axis=(0, 1))]
    curves = {iou: there[i].mean(axis=1).round(6).tolist() for iou, i in _IOUS.items()}
    recall = [i / 100 for i in range(101)]
    return {"precision_recall": {"recall": recall, "precision": curves}}


def _jpeg(sheet: Image.Image) -> bytes:
    """Encode a sheet as JPEG, with quality 80 or the best lower one that makes it small enough."""
    for quality in range(80, 20, -10):
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=quality)
        if buffer.tell() < _SHEET_BYTES:
            break
    return buffer.getvalue()


def _below(root: Path, errors: ImageErrors) -> str:
    """Return the image's path relative to `root`, or its file name if it lies elsewhere."""
    file = Path(errors.item["file_name"])
    return str(file.relative_to(root) if file.is_relative_to(root) else file.name)


def _num_densities(cfg, samples: LossInputs) -> int:
    """Return the number of densities that GHM-C's robust form has, or would have, in this run."""
    keys = cfg.MODEL.GHM.CLS
    by_class = keys.PER_CLASS or not keys.PRIOR
    return len(samples.foreground_by_class) if by_class and not samples.softmax else 1


def measure_gradients(cfg, model: nn.Module, progress: Progress) -> dict:
    """Measure a detector's gradient norms, the effect of losses on them, and the weight of noise.

    It uses up to 40 images of DATASETS.TRAIN (400 if annotations are known to be wrong), without
    augmentation. `model` is left as it was.

    Args:
        cfg: the run's configuration; its data sets are registered.
        model: a trained detector; the result is {} for one that `can_capture` rejects.
        progress: is told of every batch.

    Returns:
        "gradient_norms", "effective_gradient", "gradient_share" and, if annotations are known to be
        wrong, "noise", as in analysis.json. The gradient norms of boxes use mu 0.02 and deltas
        without the box coder's weights, so that detectors can be compared; the other two use the
        detector's own mu and deltas.

    Raises:
        DataError: an image cannot be read.
    """
    if not can_capture(model):
        return {}
    model, items = training_copy(model), training_items(cfg, NOISY_IMAGES)
    mu = moving_mu(model)
    noise = NoiseWeights(smooth_l1_beta(cfg)) if has_noise(items) else None
    items = items if noise else training_items(cfg, IMAGES)
    cls, errors = None, []
    total = -(-len(items) // cfg.SOLVER.IMS_PER_BATCH)
    for batch in progress.track(read_batches(cfg, items), "measuring gradients", total):
        samples = capture(model, batch)
        cls = cls or ClassGradients(cfg, _num_densities(cfg, samples))
        cls.add(samples.norms(), samples.foreground_by_class)
        errors.append(samples.errors.float().cpu())
        if noise:
            noise.add(samples, batch)
    norms = {"images": len(items), "cls": cls.histogram()}
    effective, shares = {"cls": cls.curves()}, {"cls": cls.shares()}
    d = torch.cat(errors)
    if len(d):
        unweighted = d / torch.tensor(box_coder_weights(cfg))
        norms["reg"] = histogram(asl1_norms(unweighted, MU)) | {"mu": MU}
        boxes = BoxGradients(cfg, d.flatten(), mu)
        effective["reg"], shares["reg"] = boxes.curves(), boxes.shares()
    found = {"gradient_norms": norms, "effective_gradient": effective, "gradient_share": shares}
    return found | ({"noise": noise.summary()} if noise else {})
