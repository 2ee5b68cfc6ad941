"""Runs detectors on image files, and draws their detections."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from PIL import Image

from ghm_d2.data.images import read_image
from ghm_d2.data.loading.augment import build_augmentations
from ghm_d2.data.registered import category_ids
from ghm_d2.data.show import contact_sheet
from ghm_d2.errors import DataError
from ghm_d2.files import write_atomically
from ghm_d2.inference.augmented import with_augmentation
from ghm_d2.inference.evaluation.confusion import best_detections
from ghm_d2.inference.formats import Found
from ghm_d2.progress import Progress


class Predictor:
    """Resizes a picture and runs a detector on it; with TEST.AUG.ENABLED on several copies."""

    def __init__(self, model, cfg, threshold: float = 0.0):
        """
        Args:
            model: in evaluation mode.
            threshold: the least score to report, in [0, 1].
        """
        self._detect, self._cfg, self._threshold = with_augmentation(model, cfg), cfg, threshold
        (self._resize,) = build_augmentations(cfg, False)

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, image_id: int = 0, name: str = "the picture"):
        """Return detections in COCO's result format, best first.

        Args:
            picture: (height, width, 3) RGB, uint8.
            name: the picture's name in errors.

        Returns:
            a list of {"image_id", "category_id": index of the class, "bbox": [x, y, width, height]
            in px, "score"}; from a detector with masks also "segmentation", an RLE.

        Raises:
            DataError: the picture is so long that its shorter side would be resized to 0 px.
        """
        keys = self._cfg.INPUT
        height, width = picture.shape[:2]
        longest = keys.MAX_SIZE_TEST if keys.RESIZE == "shortest_edge" else float("inf")
        if min(height, width) * longest < max(height, width):
            raise DataError(
                f"{name}: an image of {width} x {height} px is too elongated to be resized; crop it"
            )
        image = convert_PIL_to_numpy(Image.fromarray(picture), keys.FORMAT)
        image = self._resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(image.transpose(2, 0, 1).copy())
        item = {"image": tensor, "height": height, "width": width}
        instances = self._detect([item])[0]["instances"]
        detections = instances_to_coco_json(instances.to("cpu"), image_id)
        return [d for d in detections if d["score"] >= self._threshold]


def predict(
    detect: Callable,
    files: Sequence[Path],
    progress: Progress,
    on_error: Callable[[Path, DataError], None] | None = None,
) -> Iterator[Found]:
    """Run a `Predictor`, or a `slices.SlicedPredictor`, on each image, and yield its detections.

    "image_id" of a detection is the number of images yielded before.

    Args:
        on_error: is called with an image that cannot be used and the reason; unless it raises, the
            image is left out. None raises the reason.

    Raises:
        DataError: an image cannot be read, or is too elongated.
    """
    number = 0
    for file in progress.track(files, "predicting", len(files)):
        try:
            picture = read_image(file)
            detections = detect(picture, number, str(file))
        except DataError as error:
            if on_error is None:
                raise
            on_error(file, error)
            continue
        number += 1
        yield Found(file, (picture.shape[1], picture.shape[0]), detections)


def draw_detections(image: Found, names: Sequence[str], file: Path) -> None:
    """Write a PNG of an image with its detections.

    Raises:
        DataError: the image cannot be read again.
        OutputError: the PNG cannot be written.
    """
    caption = f"{image.file.name}: {len(image.detections)} detections"
    shown = [(image.file, caption, image.detections)]
    _write_png(contact_sheet(shown, dict(enumerate(names)), columns=1, cell=1000), file)


def _write_png(picture: Image.Image, file: Path) -> None:
    """Write a picture, whole or not at all; OutputError if it cannot be written."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(str(file), lambda out: out.write(buffer.getvalue()))


def draw_beside_truth(
    dataset_name: str, detections: Sequence[dict], file: Path, count: int = 8
) -> None:
    """Draw the data set's first images, each with its ground truth beside its detections.

    The best detections are drawn, as many as the data set has boxes, because the level of a
    detector's scores depends on its training loss.

    Args:
        dataset_name: registered with Detectron2.
        detections: in COCO's result format, of the whole data set.
        file: the PNG to write.
        count: number of images to draw.

    Raises:
        DataError: an image cannot be decoded.
        OutputError: the PNG cannot be written.
    """
    items = DatasetCatalog.get(dataset_name)
    best = best_detections(items, detections)
    least = best[-1]["score"] if best else 1.0
    notes = [f"detections, scores from {least:.2f}"] * count
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_png(sheet_beside_truth(dataset_name, items[:count], best, notes), file)


def sheet_beside_truth(
    dataset_name: str,
    items: Sequence[dict],
    detections: Sequence[dict],
    notes: Sequence[str],
    cell: int = 320,
) -> Image.Image:
    """Return a contact sheet of images, each with its ground truth beside its detections.

    Masks are drawn if the detections have any.

    Args:
        dataset_name: registered with Detectron2.
        items: the images' data set dicts.
        detections: in COCO's result format; those of other images are not drawn.
        notes: a caption for each image's detections.
        cell: longest side of a picture on the sheet, in px.

    Raises:
        DataError: a picture cannot be decoded.
    """
    metadata = MetadataCatalog.get(dataset_name)
    to_dataset_id = {number: own for own, number in category_ids(dataset_name).items()}
    names = {to_dataset_id[i]: name for i, name in enumerate(metadata.thing_classes)}
    masks = any("segmentation" in d for d in detections)
    pictures = []
    for item, note in zip(items, notes, strict=False):
        path = Path(item["file_name"])
        truth = [a | {"category_id": to_dataset_id[a["category_id"]]} for a in item["annotations"]]
        for annotation in truth:
            annotation["bbox"] = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            if not masks:
                annotation.pop("segmentation", None)
        found = [d for d in detections if d["image_id"] == item["image_id"]]
        pictures += [(path, f"{path.name}: ground truth", truth), (path, note, found)]
    return contact_sheet(pictures, names, columns=4, cell=cell)
