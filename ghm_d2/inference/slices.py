"""Finds small objects in large pictures, by detection on overlapping slices merged by sahi."""

from collections.abc import Callable, Sequence

import numpy as np

from ghm_d2.errors import UsageError

OVERLAP = 0.2  # overlap of neighbouring slices, as a share of their side


class SlicedPredictor:
    """A `Predictor` that detects on slices of a picture and on the whole picture.

    Two boxes of one class are merged if one covers at least half of the other. With a threshold
    below 0.1 sahi applies NMS instead. Masks are left out.

    Raises:
        UsageError: sahi is not installed.
    """

    def __init__(self, detect: Callable, side: int, names: Sequence[str], threshold: float = 0.0):
        """
        Args:
            detect: a `Predictor`.
            side: the side of a slice, in px of the picture.
            names: the classes' names.
            threshold: the least score that `detect` reports.
        """
        try:
            from sahi.models.base import DetectionModel
            from sahi.prediction import ObjectPrediction
        except ImportError:
            raise UsageError("--slice needs sahi: pip install sahi (or 'ghm_d2[slices]')") from None

        class Adapter(DetectionModel):
            def set_model(self, model):
                self.model = model

            def perform_inference(self, image):
                self._original_predictions = self.model(np.ascontiguousarray(image))

            def _create_object_prediction_list_from_original_predictions(
                self, shift_amount_list=None, full_shape_list=None
            ):
                shift, full = (_of_one(x) for x in (shift_amount_list, full_shape_list))
                self._object_prediction_list_per_image = [
                    [
                        ObjectPrediction(
                            bbox=_corners(d["bbox"]),
                            category_id=d["category_id"],
                            category_name=names[d["category_id"]],
                            score=d["score"],
                            shift_amount=shift or [0, 0],
                            full_shape=full,
                        )
                        for d in self._original_predictions
                        if min(d["bbox"][2:]) > 0
                    ]
                ]

        self._model = Adapter(model=detect, device="cpu", confidence_threshold=threshold)
        self._side = side

    def __call__(self, picture: np.ndarray, image_id: int = 0, name: str = "") -> list[dict]:
        """Detect with the arguments and the result of `Predictor`, but without masks."""
        from sahi.predict import get_sliced_prediction

        result = get_sliced_prediction(
            picture,
            self._model,
            slice_height=self._side,
            slice_width=self._side,
            overlap_height_ratio=OVERLAP,
            overlap_width_ratio=OVERLAP,
            verbose=0,
        )
        found = [
            {
                "image_id": image_id,
                "category_id": p.category.id,
                "bbox": [float(v) for v in p.bbox.to_xywh()],
                "score": float(p.score.value),
            }
            for p in result.object_prediction_list
        ]
        return sorted(found, key=lambda d: -d["score"])


def _corners(box: Sequence[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]


def _of_one(value):
    """Return one image's [x, y], which sahi gives as [x, y] or [[x, y]]."""
    return value[0] if value and isinstance(value[0], list | tuple) else value
