"""Writes a data set with corrected annotations to a new folder; the old one is not changed."""

import os
from pathlib import Path

from ghm_d2.data.catalog import locate
from ghm_d2.data.checking.validate import validate_json
from ghm_d2.data.cleaning.decisions import read_decisions
from ghm_d2.data.coco_json import image_name, load_json, write_json
from ghm_d2.data.output import CLEAN_REPORT, new_folder
from ghm_d2.errors import UsageError


def clean(
    data: str,
    decisions: Path,
    output: Path,
    split: str = "train",
    drop: int = 0,
    add: int = 0,
    overwrite: bool = False,
) -> dict:
    """Write a data set folder with one split changed; the images are linked.

    Args:
        data: a name or folder, as for `locate`.
        decisions, drop, add: as for `read_decisions`.
        output: a new or empty folder.
        split: the split that the decisions are about.

    Returns:
        the report, also written to the folder: numbers of annotations dropped, changed and added.

    Raises:
        UsageError: there is no such split, or `output` may not be overwritten or holds `data`.
        DataError: the data set has faults that stop a training, the decisions do not belong to
            it, or something cannot be read or written.
    """
    splits = locate(data)
    if split not in splits:
        raise UsageError(f"--split is {split!r}, but {data} has only {', '.join(splits)}")
    for file, root in splits.values():
        if any(Path(p).resolve().is_relative_to(Path(output).resolve()) for p in (file, root)):
            raise UsageError(f"{output}: contains the data set itself; choose another --output")
    json_file, root = splits[split]
    validate_json(json_file, root)
    coco = load_json(json_file)
    changes = read_decisions(decisions, coco, Path(os.path.abspath(root)), drop, add)
    report = {
        "data": str(data),
        "decisions": str(decisions),
        "split": split,
        "dropped": len(changes.dropped),
        "changed": len(changes.changed),
        "added": len(changes.added),
    }
    roots = {os.path.realpath(root) for _, root in splits.values()}
    with new_folder(output, overwrite) as draft:
        if len(roots) == 1:
            os.symlink(*roots, draft / "images")
        else:
            (draft / "images").mkdir()
        for name, (file, root) in splits.items():
            coco = load_json(file)
            if name == split:
                coco = changes.apply(coco)
            if len(roots) > 1:  # each split's images get a folder of their own, as in COCO
                os.symlink(os.path.realpath(root), draft / "images" / name)
            below = f"{name}/" if len(roots) > 1 else ""
            coco |= {"images": [_below(below, image) for image in coco["images"]]}
            write_json(draft / f"{name}.json", coco)
        write_json(draft / CLEAN_REPORT, report)
    return report


def _below(folder: str, image: dict) -> dict:
    """Return an image with its name below images/; `folder` is "" or ends with a slash."""
    name = image_name(image)
    if name != image.get("file_name"):  # LVIS's coco_url would be read instead of file_name
        image = {key: value for key, value in image.items() if key != "coco_url"}
    return image | {"file_name": f"{folder}{name}"}
