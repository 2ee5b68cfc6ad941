"""Find the module that reads the features shared by classification and box regression."""

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn


def reader_of_shared_features(model: nn.Module) -> nn.Module | None:
    """Return the module whose first argument is the features; None for an unknown detector.

    In a one-stage detector it is the head, which takes the feature maps. In an R-CNN it is the box
    predictor, which takes the box head's features of each proposal. A cascade has several: None.
    """
    if isinstance(model, DenseDetector):
        return model.head
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    return predictor if isinstance(predictor, FastRCNNOutputLayers) else None
