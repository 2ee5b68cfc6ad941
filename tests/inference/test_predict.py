"""Detections on image files, and pictures of them, beside the truth or alone."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from ghm_d2.data.catalog import resolve
from ghm_d2.errors import DataError, OutputError
from ghm_d2.inference.formats import Found
from ghm_d2.inference.predict import (
    draw_beside_truth,
    draw_detections,
    predict,
    sheet_beside_truth,
)
from ghm_d2.progress import Progress


def test_true_masks_are_drawn_where_the_detections_have_some(digits_folder):
    name = resolve(digits_folder, "val")
    items = DatasetCatalog.get(name)[:1]
    mask = items[0]["annotations"][0]["segmentation"]
    bare = [{k: v for k, v in a.items() if k != "segmentation"} for a in items[0]["annotations"]]
    found = {"image_id": items[0]["image_id"], "category_id": 1, "score": 0.5}
    found["bbox"] = [2.0, 2.0, 9.0, 9.0]

    def truth(items, *detections):
        sheet = np.asarray(sheet_beside_truth(name, items, detections, ["found"]))
        return sheet[:, : sheet.shape[1] // 2]

    boxes = truth([items[0] | {"annotations": bare}], found)
    assert np.array_equal(truth(items, found), boxes)
    assert not np.array_equal(truth(items, found | {"segmentation": mask}), boxes)
    assert items[0]["annotations"][0]["segmentation"] == mask


def numbered(picture: np.ndarray, image_id: int, name: str) -> list[dict]:
    """A detector that refuses narrow pictures."""
    if picture.shape[1] < 10:
        raise DataError(f"{name}: too narrow")
    return [{"image_id": image_id, "category_id": 0, "bbox": [1, 1, 5, 5], "score": 0.5}]


def test_an_unusable_image_is_left_out_or_an_error(tmp_path):
    files = [tmp_path / f"{name}.png" for name in ("broken", "a", "narrow", "b")]
    for file in files:
        Image.new("RGB", (5 if file.stem == "narrow" else 40, 30)).save(file)
    files[0].write_bytes(b"no image")
    faults = {}
    found = predict(numbered, files, Progress(), faults.__setitem__)
    assert next(found).file == files[1] and list(faults) == [files[0]]  # one after another
    (last,) = found
    assert last.file == files[3] and last.size == (40, 30)
    assert last.detections[0]["image_id"] == 1
    assert "cannot be decoded" in str(faults[files[0]]) and "narrow" in str(faults[files[2]])
    with pytest.raises(DataError, match="cannot be decoded"):
        list(predict(numbered, files, Progress()))


def test_a_picture_that_cannot_be_written_is_told(digits_folder, tmp_path):
    taken = tmp_path / "folder.png"
    taken.mkdir()
    image = Found(next(Path(digits_folder).rglob("val/*.png")), (80, 64), [])
    with pytest.raises(OutputError, match="cannot be written"):
        draw_detections(image, ["1"], taken)
    with pytest.raises(OutputError, match="cannot be written"):
        draw_beside_truth(resolve(digits_folder, "val"), [], taken, count=1)
    assert list(tmp_path.iterdir()) == [taken]
