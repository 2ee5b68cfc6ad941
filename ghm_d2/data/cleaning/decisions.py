"""Reads a person's decisions about suspect annotations, from a table or Label Studio's export.

Other programs and people have edited both files. Anything that cannot be understood is a DataError
that says where.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ghm_d2.data.coco_json import (
    box_fault,
    by_image,
    clipped,
    image_name,
    iou,
    load_json,
    read_bytes,
)
from ghm_d2.errors import DataError, UsageError
from ghm_d2.files import spreadsheet_cell

DECISIONS = ("", "keep", "drop", "accept")
_NEEDED = ("decision", "kind", "image_id", "annotation_id", "seen_class")
_SAME = 0.99  # least IoU of a box that a person left unchanged: tools round
# Fields in which the generated digits record an error; a corrected annotation loses them
_ERROR_FIELDS = ("noise", "true_category_id", "true_bbox")


@dataclass
class Changes:
    """Changes of a data set's annotations.

    Attributes:
        dropped: ids of annotations to drop.
        changed: id of an annotation -> fields that replace its own.
        added: new annotations, without an id.
    """

    dropped: set = field(default_factory=set)
    changed: dict[Any, dict] = field(default_factory=dict)
    added: list[dict] = field(default_factory=list)

    def apply(self, coco: dict) -> dict:
        """Return a copy of `coco` with the changes; `coco` itself is not modified."""
        there = [a for a in coco["annotations"] if a["id"] not in self.dropped]
        kept = [_changed(a, self.changed[a["id"]]) if a["id"] in self.changed else a for a in there]
        numbers = [a["id"] for a in coco["annotations"] if isinstance(a["id"], int)]
        first = max(numbers, default=0) + 1
        added = [
            {"id": i, "iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3]} | a
            for i, a in enumerate(self.added, first)
        ]
        return coco | {"annotations": [*kept, *added]}


def _changed(annotation: dict, fields: dict) -> dict:
    """Replace fields of an annotation; a moved box loses its mask, which fitted the old box."""
    moved = "bbox" in fields
    lost = (*_ERROR_FIELDS, "segmentation") if moved else _ERROR_FIELDS
    kept = {k: v for k, v in annotation.items() if k not in lost}
    area = {"area": fields["bbox"][2] * fields["bbox"][3]} if moved else {}
    return kept | fields | area


def read_decisions(file: Path, coco: dict, root: Path, drop: int = 0, add: int = 0) -> Changes:
    """Return the changes of a data set that a file's decisions ask for.

    Args:
        file: the table of `ghm data suspects`, whose column "decision" says drop or accept (what
            the model sees), or a JSON that Label Studio exported.
        coco: the data set.
        root: the folder that its file names are relative to.
        drop: number of annotations to drop, from the start of the table, among those without a
            decision.
        add: number of missing annotations to accept, likewise.

    Raises:
        UsageError: `drop` or `add` with an export, which has no order.
        DataError: the file is neither of the two, or does not belong to the data set.
    """
    if file.suffix.lower() == ".json":
        if drop or add:
            raise UsageError(f"{file}: --drop and --add need the table suspects.csv, not an export")
        return _of_label_studio(load_json(file), file, coco, root)
    return _of_table(file, coco, drop, add)


def _of_table(file: Path, coco: dict, drop: int, add: int) -> Changes:
    annotations = {str(a["id"]): a for a in coco["annotations"]}
    images = {str(image["id"]): image["id"] for image in coco["images"]}
    classes = {spreadsheet_cell(c["name"]): c["id"] for c in coco["categories"]}
    changes, left = Changes(), {"annotation": drop, "missing": add}
    for line, row in read_table(file):

        def fault(what: str, line=line) -> DataError:
            return DataError(f"{file}:{line}: {what}")

        decision = row["decision"].strip().lower()
        if decision not in DECISIONS:
            raise fault(f"decision must be {', '.join(DECISIONS[1:])} or empty, not {decision!r}")
        is_missing = row["kind"] == "missing"
        what = "missing" if is_missing else "annotation"
        if not decision and left[what]:
            decision, left[what] = ("accept" if is_missing else "drop"), left[what] - 1
        if decision in ("", "keep") or (is_missing and decision == "drop"):
            continue
        if row["image_id"] not in images or not (is_missing or row["annotation_id"] in annotations):
            raise fault("the data set has no such image or annotation; is this its table?")
        if decision == "drop":
            changes.dropped.add(annotations[row["annotation_id"]]["id"])
            continue
        if row["seen_class"] not in classes:
            raise fault("seen_class is not a class of the data set; decide drop or keep here")
        fields = {"category_id": classes[row["seen_class"]]}
        if is_missing:
            place = {"image_id": images[row["image_id"]], "bbox": _seen_box(row, fault)}
            changes.added.append(fields | place)
        else:
            box = {} if row["kind"] == "class" else {"bbox": _seen_box(row, fault)}
            changes.changed[annotations[row["annotation_id"]]["id"]] = fields | box
    return changes


def read_table(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a table of suspects with their line numbers.

    Spreadsheets may have changed the separator.

    Raises:
        DataError: the file cannot be read, or is not such a table.
    """
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8 text; save it as UTF-8") from None
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(table.line_num, {k: v or "" for k, v in row.items() if k}) for row in table]
    except csv.Error as error:
        raise DataError(f"{file}: is not a CSV table ({error})") from None
    lacking = [name for name in _NEEDED if name not in (table.fieldnames or ())]
    if lacking:
        raise DataError(f"{file}: lacks the column {lacking[0]!r}; `ghm data suspects` writes one")
    return rows


def _seen_box(row: dict[str, str], fault) -> list[float]:
    try:
        cells = [row[f"seen_{name}"] for name in ("x", "y", "width", "height")]
        box = [float(cell.replace(",", ".")) for cell in cells]  # some spreadsheets write 1,5
    except (KeyError, ValueError):
        raise fault("seen_x, seen_y, seen_width and seen_height must be numbers") from None
    if why := box_fault(box):
        raise fault(f"seen_x to seen_height are not a valid box: {why}")
    return box


def _of_label_studio(tasks: Any, file: Path, coco: dict, root: Path) -> Changes:
    """Read a Label Studio export: corrected images get its annotations, all others keep theirs."""
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DataError(f"{file}: is not an export of Label Studio, which is a JSON list of tasks")
    by_path = {_path(root / image_name(image)): image for image in coco["images"]}
    classes = {c["name"]: c["id"] for c in coco["categories"]}
    annotations, changes, finished = by_image(coco["annotations"]), Changes(), 0
    for number, task in enumerate(tasks):
        where = f"{file}: task {task.get('id', number)}"
        results = _results(task, where)
        if results is None:
            continue
        finished += 1
        image = by_path.get(_address(task, where))
        if image is None:
            raise DataError(f"{where}: the image of this task is not in the data set")
        # a box outside the image cannot be shown, so nobody has decided about it
        old = [
            (a, inside)
            for a in annotations.get(image["id"], [])
            if (inside := clipped(a["bbox"], image["width"], image["height"]))
        ]
        for result in results:
            box, category = _box_of(result, image, classes, where)
            same = _same(old, box, category)
            if same is None:
                changes.added.append(
                    {"image_id": image["id"], "category_id": category, "bbox": box}
                )
            else:
                old.remove(same)
        changes.dropped |= {annotation["id"] for annotation, _ in old}
    if not finished:
        raise DataError(f"{file}: no task is annotated; finish at least one, and export as JSON")
    return changes


def _results(task: dict, where: str) -> list[dict] | None:
    """Return the boxes of a task's last annotation; None if it has none yet."""
    try:
        done = [a for a in task.get("annotations") or [] if not a.get("was_cancelled")]
        if not done:
            return None
        return [r for r in done[-1]["result"] if r["type"] == "rectanglelabels"]
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{where}: the annotations are not in the format of Label Studio") from None


def _address(task: dict, where: str) -> str:
    try:
        address = urlsplit(task["data"]["image"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{where}: has no image address in data.image") from None
    return _path(Path(parse_qs(address.query).get("d", [address.path])[0]))


def _path(file: Path) -> str:
    return file.as_posix().lstrip("/")


def _box_of(result: dict, image: dict, classes: dict, where: str) -> tuple[list[float], Any]:
    """Return the box [x, y, width, height] in px and the category id of Label Studio's result."""
    try:
        value = result["value"]
        shares = [float(value[name]) / 100 for name in ("x", "y", "width", "height")]
        (name,) = map(str, value["rectanglelabels"])
        turned = float(value.get("rotation") or 0)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{where}: a box is not in the format of Label Studio") from None
    if name not in classes:
        raise DataError(f"{where}: the label {name!r} is not a class of the data set")
    if turned:
        raise DataError(f"{where}: a box is rotated, which is not supported; set its rotation to 0")
    sides = (image["width"], image["height"])
    box = [share * sides[i % 2] for i, share in enumerate(shares)]
    if why := box_fault(box):
        raise DataError(f"{where}: {why}")
    return box, classes[name]


def _same(old: Sequence[tuple[dict, list[float]]], box: list[float], category):
    """Return the annotation that a person left unchanged, with its clipped box; None if none is."""
    for annotation, inside in old:
        if annotation["category_id"] == category and iou(inside, box) >= _SAME:
            return annotation, inside
    return None
