"""Detections as files that other tools open: to count, to plot, or to correct by hand."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from ghm_d2.files import spreadsheet_cell, write_json, write_text


@dataclass(frozen=True)
class Found:
    """The detections in an image.

    Args:
        file: the image's path, as it was given.
        size: (width, height) in px.
        detections: in COCO's result format, best first.
    """

    file: Path
    size: tuple[int, int]
    detections: list[dict]


def write_coco(images: Sequence[Found], names: Sequence[str], folder: Path) -> None:
    """Write predictions.json: a COCO data set whose annotations have a score."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        width, height = image.size
        entries.append(
            {"id": number, "file_name": str(image.file), "width": width, "height": height}
        )
        for d in image.detections:
            own = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
            area = d["bbox"][2] * d["bbox"][3]
            annotations.append({**d, **own, "category_id": d["category_id"] + 1, "area": area})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    data = {"images": entries, "annotations": annotations, "categories": categories}
    write_json(folder / "predictions.json", data)


def write_yolo(images: Sequence[Found], names: Sequence[str], folder: Path) -> None:
    """Write classes.txt and labels/NAME.txt: class, centre, sides (shares of the image), score."""
    labels = folder / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, distinct_stems([i.file for i in images]), strict=True):
        lines = []
        for d in image.detections:
            x, y, w, h = _relative(d["bbox"], image.size)
            box = " ".join(f"{v:.6f}" for v in (x + w / 2, y + h / 2, w, h))
            lines.append(f"{d['category_id']} {box} {d['score']:.4f}\n")
        write_text(labels / f"{name}.txt", "".join(lines))
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names))


def write_csv(images: Sequence[Found], names: Sequence[str], folder: Path) -> None:
    """Write predictions.csv: one detection per row, with the box [x, y, width, height] in px."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["file", "class", "score", "x", "y", "width", "height"])
    for image in images:
        for d in image.detections:
            box = [f"{v:.2f}" for v in d["bbox"]]
            name = names[d["category_id"]]
            file, name = (spreadsheet_cell(text) for text in (str(image.file), name))
            table.writerow([file, name, f"{d['score']:.4f}", *box])
    write_text(folder / "predictions.csv", text.getvalue())


def write_label_studio(images: Sequence[Found], names: Sequence[str], folder: Path) -> None:
    """Write label_config.xml and label_studio.json: one task per image, its boxes as predictions.

    The images have addresses in Label Studio's local storage: paths relative to its document root
    (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT).
    """
    tasks = []
    for image in images:
        result, (width, height) = [], image.size
        for i, d in enumerate(image.detections):
            x, y, w, h = (100 * v for v in _relative(d["bbox"], image.size))
            value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
            value["rectanglelabels"] = [names[d["category_id"]]]
            where = {"id": f"box{i}", "type": "rectanglelabels", "from_name": "label"}
            where |= {"to_name": "image", "original_width": width, "original_height": height}
            result.append({**where, "image_rotation": 0, "value": value, "score": d["score"]})
        address = f"/data/local-files/?d={quote(image.file.as_posix().lstrip('/'))}"
        scores = [d["score"] for d in image.detections]
        prediction = {"model_version": "ghm_d2", "result": result, "score": min(scores, default=0)}
        tasks.append({"data": {"image": address}, "predictions": [prediction]})
    write_json(folder / "label_studio.json", tasks)
    write_text(folder / "label_config.xml", label_config(names))


def label_config(names: Sequence[str]) -> str:
    """Return Label Studio's labelling interface, as XML, for boxes of these classes."""
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n'
    )


def write_fiftyone(images: Sequence[Found], names: Sequence[str], folder: Path) -> None:
    """Write FiftyOneImageDetectionDataset: labels.json, and data.json with the images' paths."""
    labels, files = {}, {}
    for image, stem in zip(images, distinct_stems([i.file for i in images]), strict=True):
        labels[stem] = [
            {
                "label": names[d["category_id"]],
                "bounding_box": list(_relative(d["bbox"], image.size)),
                "confidence": d["score"],
            }
            for d in image.detections
        ]
        files[stem] = str(image.file.resolve())
    write_json(folder / "labels.json", {"labels": labels})
    write_json(folder / "data.json", files)


FORMATS: dict[str, Callable[[Sequence[Found], Sequence[str], Path], None]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "csv": write_csv,
    "label-studio": write_label_studio,
    "fiftyone": write_fiftyone,
}


OF_FRAMES = ("coco", "csv")  # formats that can list a video's frames, which are not files


def distinct_stems(files: Sequence[Path]) -> list[str]:
    """Return a distinct name for each file, made from its name without folder and suffix."""
    used: set[str] = set()
    return [distinct_stem(file, used) for file in files]


def distinct_stem(file: Path, used: set[str]) -> str:
    """Return a name for the file, as `distinct_stems` does, that is not in `used`; add it there."""
    name, number = file.stem, 1
    while name in used:
        number += 1
        name = f"{file.stem}_{number}"
    used.add(name)
    return name


def _relative(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box [x, y, width, height] in px to the image, and return it as shares of the image."""
    x0, y0 = max(box[0], 0.0) / size[0], max(box[1], 0.0) / size[1]
    x1, y1 = min(box[0] + box[2], size[0]) / size[0], min(box[1] + box[3], size[1]) / size[1]
    return x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)
