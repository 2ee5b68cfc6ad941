"""Writes suspects to files: a table for decisions, and files for annotation tools."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.analysis.suspects import Suspect
from ghm_d2.data.cleaning.decisions import read_table
from ghm_d2.data.coco_json import by_image, clipped
from ghm_d2.errors import DataError
from ghm_d2.files import spreadsheet_cell, write_json, write_text
from ghm_d2.inference.formats import Found, write_label_studio

SUSPECTS_TABLE, SUSPECTS_COCO = "suspects.csv", "suspects.json"
COLUMNS = (
    "decision", "kind", "score", "file", "class", "x", "y", "width", "height",
    "seen_class", "seen_score", "seen_x", "seen_y", "seen_width", "seen_height",
    "image_id", "annotation_id",
)  # fmt: skip


def write_table(suspects: Sequence[Suspect], coco: dict, file: Path) -> None:
    """Write a CSV file with one row per suspect; the first column is for a person's decision.

    Args:
        suspects: in the order of the rows.
        coco: the data set that they are from.

    Raises:
        OutputError: it cannot be written.
    """
    files = {image["id"]: spreadsheet_cell(image["file_name"]) for image in coco["images"]}
    names = {c["id"]: spreadsheet_cell(c["name"]) for c in coco["categories"]}
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for suspect in suspects:
        own, seen = suspect.annotation, suspect.proposal
        row = ["", suspect.kind, f"{suspect.score:.5f}", files[suspect.image_id]]
        row += [names[own["category_id"]], *_box(own)] if own else [""] * 5
        row += (
            [names[seen["category_id"]], f"{seen['score']:.4f}", *_box(seen)] if seen else [""] * 6
        )
        table.writerow([*row, suspect.image_id, own["id"] if own else ""])
    write_text(file, text.getvalue())


def _box(found: dict) -> list[str]:
    return [f"{round(value, 2) + 0.0:.2f}" for value in found["bbox"]]  # + 0.0 turns -0.0 into 0.0


def has_decisions(file: Path) -> bool:
    """Return whether a table of suspects contains any decision; True if it cannot be read."""
    if not file.is_file():
        return False
    try:
        return any(row["decision"].strip() for _, row in read_table(file))
    except DataError:
        return True  # a person's work may be in it


def write_coco(suspects: Sequence[Suspect], coco: dict, file: Path) -> None:
    """Write the images of suspects as a COCO data set that marks the suspect annotations.

    Suspects get the fields "suspect_kind" and "suspect_score". Missing annotations are added as the
    model detects them, with a "score".

    Raises:
        OutputError: it cannot be written.
    """
    fields = {s.annotation["id"]: _fields(s) for s in suspects if s.annotation}
    images = {s.image_id for s in suspects}
    there = [a for a in coco["annotations"] if a["image_id"] in images]
    annotations = [a | fields.get(a["id"], {}) for a in there]
    last = max((a["id"] for a in coco["annotations"]), default=0)
    for number, suspect in enumerate((s for s in suspects if not s.annotation), last + 1):
        seen = suspect.proposal or {}
        area = seen["bbox"][2] * seen["bbox"][3]
        annotations.append({"id": number, "iscrowd": 0, "area": area} | seen | _fields(suspect))
    kept = [image for image in coco["images"] if image["id"] in images]
    write_json(file, coco | {"images": kept, "annotations": annotations})


def _fields(suspect: Suspect) -> dict:
    return {"suspect_kind": suspect.kind, "suspect_score": round(suspect.score, 5)}


def write_tasks(suspects: Sequence[Suspect], coco: dict, images: Path, folder: Path) -> None:
    """Write Label Studio's tasks for the suspects' images, the most suspect image first.

    Each task has its image's annotations as predictions, with a score of 1, or of 1 minus that
    of their suspect, and the detections for which an annotation may be missing.

    Args:
        images: the folder that file names in the data set are relative to.

    Raises:
        OutputError: they cannot be written.
    """
    entries = {image["id"]: image for image in coco["images"]}
    number = {c["id"]: i for i, c in enumerate(coco["categories"])}
    left = {s.annotation["id"]: 1 - s.score for s in suspects if s.annotation}
    annotations = by_image(coco["annotations"])
    absent = by_image(s.proposal for s in suspects if s.proposal and not s.annotation)
    tasks = []
    for image_id in dict.fromkeys(suspect.image_id for suspect in suspects):
        entry = entries[image_id]
        size = entry["width"], entry["height"]
        there = [a for a in annotations.get(image_id, []) if clipped(a["bbox"], *size)]
        scored = [a | {"score": left.get(a["id"], 1.0)} for a in there]
        boxes = [*scored, *absent.get(image_id, [])]
        shown = [box | {"category_id": number[box["category_id"]]} for box in boxes]
        tasks.append(Found(images / entry["file_name"], size, shown))
    write_label_studio(tasks, [c["name"] for c in coco["categories"]], folder)
