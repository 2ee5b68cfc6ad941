"""Class weights from the number of annotations of each class in the training data."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

_BETA = 0.999  # one of the authors' four values; it suits hundreds to thousands of objects


def fill_class_weights(cfg) -> None:
    """Set MODEL.CLASS_WEIGHTS by MODEL.CLASS_WEIGHTING; DATASETS.TRAIN must be registered."""
    from detectron2.data import DatasetCatalog

    if cfg.MODEL.CLASS_WEIGHTING in ("inverse", "effective"):
        images = chain.from_iterable(map(DatasetCatalog.get, cfg.DATASETS.TRAIN))
        objects = count_objects(images)
        counts = [objects[i] for i in range(len(cfg.DATASETS.CLASS_NAMES))]
        cfg.MODEL.CLASS_WEIGHTS = class_weights(counts, cfg.MODEL.CLASS_WEIGHTING)


def class_weights(counts: Sequence[int], weighting: str) -> tuple[float, ...]:
    """Return class weights whose sum is the number of classes.

    Args:
        counts: number of annotations of each class; 0 counts as 1.
        weighting: "inverse": 1 / n. "effective": 1 / effective number of the class, which is
            (1 - beta) / (1 - beta^n) with beta 0.999 (Cui et al., arXiv 1901.05555, equation 2).
    """
    n = np.maximum(np.asarray(counts, float), 1)
    weights = 1 / n if weighting == "inverse" else (1 - _BETA) / -np.expm1(n * np.log(_BETA))
    return tuple((len(n) * weights / weights.sum()).tolist())


def count_objects(images: Iterable[dict]) -> Counter[int]:
    """Count annotated objects, without crowds, by class, 0..K-1, in Detectron2's data set dicts."""
    annotations = chain.from_iterable(image.get("annotations", ()) for image in images)
    return Counter(a["category_id"] for a in annotations if not a.get("iscrowd", 0))
