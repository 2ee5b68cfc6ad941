"""The features that both classification and box regression read."""

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn


def reader_of_shared_features(model: nn.Module) -> nn.Module | None:
    """The module whose first argument are the features; None for a detector that is not known.

    Of a one-stage detector it is the head, which takes the feature maps. Of an R-CNN it is the box
    predictor, which takes the box head's features of each proposal; a cascade has several.
    """
    if isinstance(model, DenseDetector):
        return model.head
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    return predictor if isinstance(predictor, FastRCNNOutputLayers) else None
