"""LVIS's evaluation, for images whose annotations are complete for only some classes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from detectron2.evaluation import LVISEvaluator
from lvis import LVISEval, LVISResults

from ghm_d2.data.registered import category_ids
from ghm_d2.inference.evaluation.object_sizes import objects_by_size
from ghm_d2.inference.evaluation.results_file import with_dataset_ids
from ghm_d2.records import AP_COLUMNS, LVIS_COLUMNS

DETECTIONS = 300  # per image, the best ones: LVIS's own limit


class FederatedEvaluator(LVISEvaluator):
    """Detectron2's LVIS evaluator, which also keeps the detections and the AP of each class.

    If nothing is detected in a data set that has boxes, AP is 0 instead of NaN.

    Attributes:
        detections, objects, precision: as in `evaluate.Evaluation`.
    """

    def __init__(self, dataset_name: str, masks: bool = False):
        super().__init__(dataset_name, tasks=("bbox", "segm") if masks else ("bbox",))
        self._name = dataset_name

    def _eval_predictions(self, predictions):
        self.detections = with_dataset_ids(predictions, self._name)
        if not self._do_evaluation:
            return
        self.objects = objects_by_size(self._lvis_api.dataset["annotations"])
        numbers, names = category_ids(self._name), self._metadata.thing_classes
        for task in self._tasks:
            if not self.detections:
                self._results[task] = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
                continue
            found = _lvis_eval(self._lvis_api, self.detections, task)
            precision = found.eval["precision"][..., 0]  # (iou, recall, class)
            figures = {c: found.results[c] for c in (*AP_COLUMNS, *LVIS_COLUMNS)}
            for i, category_id in enumerate(found.params.cat_ids):
                known = precision[:, :, i][precision[:, :, i] > -1]
                name = names[numbers[category_id]]
                figures[f"AP-{name}"] = known.mean() if known.size else -1
            self._results[task] = {
                k: 100 * float(v) if v > -1 else float("nan") for k, v in figures.items()
            }
            if task == "bbox":
                self.precision = precision


def _lvis_eval(truth, detections: list[dict], task: str) -> LVISEval:
    other = "segmentation" if task == "bbox" else "bbox"  # areas must not be computed from it
    own = [{k: v for k, v in d.items() if k != other} for d in detections]  # LVISResults edits them
    with _old_float():
        found = LVISEval(truth, LVISResults(truth, own, max_dets=DETECTIONS), task)
        found.run()
    return found


@contextmanager
def _old_float() -> Iterator[None]:
    """Restore `np.float`, which lvis 0.5.3 uses and numpy 1.24 removed."""
    np.float = float
    try:
        yield
    finally:
        del np.float
