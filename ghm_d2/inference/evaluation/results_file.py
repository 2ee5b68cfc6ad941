"""Files in COCO's result format: a run's own detections, and results for evaluation servers."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from ghm_d2.data.registered import category_ids, is_lvis, set_name
from ghm_d2.files import write_text
from ghm_d2.run_folder import DETECTIONS_FILE

_COCO_SERVER = "https://cocodataset.org/#upload"


def with_dataset_ids(predictions: list[dict], dataset_name: str) -> list[dict]:
    """Return the detections in Detectron2's `predictions`, with the data set's category ids."""
    detections = list(itertools.chain(*[p["instances"] for p in predictions]))
    to_dataset_id = {number: own for own, number in category_ids(dataset_name).items()}
    for detection in detections:
        detection["category_id"] = to_dataset_id[detection["category_id"]]
    return detections


def keep_detections(folder: Path, detections: Sequence[dict], *, masks: bool = False) -> None:
    """Write detections.json: boxes in COCO's result format, 80 bytes each.

    Boxes are rounded to 0.01 px and scores to 5 decimals, which changes AP by less than 0.1.

    Args:
        detections: in COCO's result format, with the data set's own category ids.
        masks: True writes the masks of detections that have one too.

    Raises:
        OutputError: the file cannot be written.
    """
    kept = ("image_id", "category_id", *(("segmentation",) if masks else ()))
    rows = [
        {name: d[name] for name in kept if name in d}
        | {"bbox": [round(x, 2) for x in d["bbox"]], "score": round(d["score"], 5)}
        for d in detections
    ]
    write_text(folder / DETECTIONS_FILE, json.dumps(rows, separators=(",", ":")) + "\n")


def write_results(
    folder: Path, dataset_name: str, algorithm: str, detections: Sequence[dict]
) -> list[Path]:
    """Write detections_SET_ALGORITHM_results.json for boxes, and one for masks if there are any.

    Each is a list of {"image_id", "category_id", "score"} with "bbox" [x, y, width, height] in
    px or "segmentation", a compressed RLE. SET is the data set's name, such as test-dev2017.

    Args:
        folder: exists.
        dataset_name: registered with Detectron2.
        algorithm: the detector's name; characters other than letters and digits become hyphens.
        detections: in COCO's result format, with the data set's own category ids.

    Raises:
        OutputError: a file cannot be written.
    """
    kinds = {"bbox": "segmentation"}  # what a file holds -> what it leaves out
    if any("segmentation" in detection for detection in detections):
        kinds["segmentation"] = "bbox"
    files = []
    for kind, other in kinds.items():
        suffix = "-masks" if kind == "segmentation" else ""
        name = f"detections_{_slug(_server_name(dataset_name))}_{_slug(algorithm)}{suffix}"
        rows = [{k: v for k, v in d.items() if k != other} for d in detections]
        files.append(folder / f"{name}_results.json")
        # no spaces: COCO's test-dev has two million detections
        write_text(files[-1], json.dumps(rows, allow_nan=False, separators=(",", ":")) + "\n")
    return files


def submission_hint(dataset_name: str, files: Sequence[Path]) -> str:
    """Return one line that says where the results are and what to do with them."""
    listed = " and ".join(map(str, files))
    if not dataset_name.startswith("coco_"):
        return f"{dataset_name} has no annotations, so it gets no AP; detections: {listed}"
    each = "each file into its own" if len(files) > 1 else "the file into a"
    return (
        f"{dataset_name} has no annotations, so it gets no AP; detections: {listed}; to submit "
        f"them, put {each} .zip of the same name, without folders, and upload it to {_COCO_SERVER}"
    )


def _server_name(dataset_name: str) -> str:
    json_file = MetadataCatalog.get(dataset_name).get("json_file", "")
    prefix = "image_info_"
    stem = Path(json_file).stem
    is_info = stem.startswith(prefix) and not is_lvis(dataset_name)
    return stem.removeprefix(prefix) if is_info else set_name(dataset_name)


def _slug(text: str) -> str:
    """Return a name for a part of COCO's file names, which underscores separate."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "ghm"
