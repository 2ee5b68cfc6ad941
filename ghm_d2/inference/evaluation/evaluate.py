"""COCO evaluation with faster-coco-eval; lvis.py has that of LVIS."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from faster_coco_eval import COCO, COCOeval_faster

from ghm_d2.config.detectors import with_masks
from ghm_d2.data.loading.loaders import build_test_loader, raise_on_bad_image
from ghm_d2.data.registered import is_lvis, require_lvis, set_name
from ghm_d2.files import finite_or_none
from ghm_d2.inference.augmented import with_augmentation
from ghm_d2.inference.evaluation.object_sizes import objects_by_size
from ghm_d2.inference.evaluation.results_file import with_dataset_ids
from ghm_d2.progress import Progress
from ghm_d2.records import AP_COLUMNS, LVIS_COLUMNS, RunRecord, SetFigures


@dataclass
class Evaluation:
    """AP figures in percent (None where undefined), the detections, and the speed.

    Figures are empty if the data set has no annotations, and on ranks other than 0.

    Attributes:
        metrics: of boxes; keys `AP_COLUMNS`, and `LVIS_COLUMNS` for an LVIS data set.
        per_class: class name -> AP of its boxes.
        mask_metrics: of masks, with the keys of `metrics`; empty if the detector has none.
        objects: number of annotated objects behind APs, APm and APl, by these names.
        precision: (10, 101, K) in [0, 1], at IoU 0.5, 0.55, ... 0.95 and recall 0, 0.01, ... 1 for
            each class, boxes of all sizes; -1 for a class without a box. None without annotations.
    """

    metrics: dict[str, float | None]
    per_class: dict[str, float | None]
    ms_per_image: float | None  # None in a process without an image
    detections: list[dict] = field(repr=False)  # in COCO's result format, masks as RLEs
    mask_metrics: dict[str, float | None] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    precision: np.ndarray | None = field(default=None, repr=False)

    def write_into(self, record: RunRecord) -> None:
        """Copy the figures and the speed into `record`."""
        record.metrics, record.per_class = self.metrics, self.per_class
        record.mask_metrics, record.objects = self.mask_metrics, self.objects
        record.ms_per_image = self.ms_per_image

    def figures(self, dataset_name: str) -> SetFigures:
        """Return the figures alone, in the form for one of a record's several data sets."""
        name = set_name(dataset_name)
        return SetFigures(name, self.metrics, self.per_class, self.mask_metrics, self.objects)


class FasterCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator of boxes and masks, with AP computed by faster-coco-eval.

    If nothing is detected in a data set that has boxes, AP is 0 instead of NaN.
    """

    def __init__(self, dataset_name: str, distributed: bool = True, masks: bool = False):
        tasks = ("bbox", "segm") if masks else ("bbox",)
        super().__init__(dataset_name, tasks=tasks, distributed=distributed, use_fast_impl=False)
        self._name = dataset_name
        self._do_evaluation = bool(self._coco_api.dataset.get("annotations"))

    def _eval_predictions(self, predictions, img_ids=None):
        self.detections = detections = with_dataset_ids(predictions, self._name)
        if not self._do_evaluation:
            return
        self.objects = objects_by_size(self._coco_api.dataset["annotations"])
        names = self._metadata.get("thing_classes")
        for task in self._tasks:
            coco_eval = _coco_eval(self._coco_api.dataset, detections, task, img_ids)
            if task == "bbox":
                self.precision = coco_eval.eval["precision"][..., 0, -1]
            self._results[task] = self._derive_coco_results(coco_eval, task, class_names=names)


def _coco_eval(dataset: dict, detections: list[dict], task: str, img_ids) -> COCOeval_faster:
    truth = COCO(dataset)
    other = "segmentation" if task == "bbox" else "bbox"  # areas must not be computed from it
    own = [{k: v for k, v in d.items() if k != other} for d in detections]  # loadRes edits them
    found = truth.loadRes(own) if own else COCO(dataset | {"annotations": []})
    coco_eval = COCOeval_faster(truth, found, task, print_function=lambda *_: None)
    if img_ids is not None:
        coco_eval.params.imgIds = img_ids
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval


@torch.no_grad()
def evaluate(model, cfg, dataset_name: str, progress: Progress) -> Evaluation:
    """Run `model` on the whole data set `dataset_name`, and compute COCO's AP of its detections.

    AP is computed for boxes, and for masks if the detector has them; LVIS data get LVIS's own AP.
    With TEST.AUG.ENABLED the model sees resized and mirrored copies of each image.

    The model returns to the mode (training or evaluation) it was in. The ranks of a group share
    the images, each of which is seen once; only rank 0 gets figures and detections.

    Raises:
        DataError: an image cannot be read.
        UsageError: it is an LVIS data set, and the package lvis is not installed.
    """
    masks = with_masks(cfg)
    evaluator = _evaluator(dataset_name, masks)
    evaluator.reset()
    loader = build_test_loader(cfg, dataset_name)
    detect = with_augmentation(model, cfg)
    was_training = model.training
    model.eval()
    seconds = []
    try:
        for batch in progress.track(loader, f"evaluating {dataset_name}", len(loader)):
            raise_on_bad_image(batch)
            start = time.perf_counter()
            outputs = detect(batch)
            if cfg.MODEL.DEVICE.startswith("cuda"):
                torch.cuda.synchronize(cfg.MODEL.DEVICE)
            seconds.append((time.perf_counter() - start) / len(batch))
            evaluator.process(batch, outputs)
    finally:
        model.train(was_training)
    everything = evaluator.evaluate() or {}
    boxes = everything.get("bbox", {})
    return Evaluation(
        metrics=_metrics(boxes),
        mask_metrics=_metrics(everything.get("segm", {})),
        per_class=_per_class(boxes, evaluator._metadata.thing_classes) if boxes else {},
        objects=getattr(evaluator, "objects", {}),
        ms_per_image=1000 * sorted(seconds)[len(seconds) // 2] if seconds else None,
        detections=getattr(evaluator, "detections", []),
        precision=getattr(evaluator, "precision", None),
    )


def _evaluator(dataset_name: str, masks: bool) -> DatasetEvaluator:
    if not is_lvis(dataset_name):
        return FasterCOCOEvaluator(dataset_name, masks=masks)
    require_lvis(dataset_name)
    from ghm_d2.inference.evaluation.lvis import FederatedEvaluator

    return FederatedEvaluator(dataset_name, masks=masks)


def _metrics(results: dict[str, float]) -> dict[str, float | None]:
    columns = (*AP_COLUMNS, *(name for name in LVIS_COLUMNS if name in results)) if results else ()
    return {name: finite_or_none(results.get(name, float("nan"))) for name in columns}


def _per_class(results: dict[str, float], names: list[str]) -> dict[str, float | None]:
    if len(names) == 1:  # Detectron2 gives no per-class AP for one class
        return {names[0]: finite_or_none(results.get("AP", float("nan")))}
    return {n: finite_or_none(results.get(f"AP-{n}", float("nan"))) for n in names}
