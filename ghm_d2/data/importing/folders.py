"""`ghm data import`: a COCO, Pascal VOC or YOLO folder becomes clean COCO JSON and images.

A reader (read_coco, read_voc, read_yolo) returns what the files say. Here every image is decoded
and every box is checked; what cannot be used is dropped and reported.
"""

import math
import os
import shutil
from collections import Counter
from pathlib import Path

from ghm_d2.data import images
from ghm_d2.data.coco_json import box_fault, outside, show_box, write_json
from ghm_d2.data.importing.coco import find_coco, read_coco
from ghm_d2.data.importing.images import Images
from ghm_d2.data.importing.listing import list_folder
from ghm_d2.data.importing.nothing import nothing_found
from ghm_d2.data.importing.source import Box, Dropped, Item, Source
from ghm_d2.data.importing.splits import with_val
from ghm_d2.data.importing.voc import find_voc, read_voc
from ghm_d2.data.importing.yolo import find_yolo, read_yolo
from ghm_d2.data.masks import mask_fault, usable_polygons
from ghm_d2.data.output import IMPORT_REPORT, new_folder
from ghm_d2.errors import DataError, UsageError

FORMATS = ("coco", "voc", "yolo")


def import_folder(
    source: str | Path,
    output: str | Path,
    *,
    kind: str = "auto",
    split: float = 0.8,
    seed: int = 0,
    copy: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    image_folder: str | Path | None = None,
    all_classes: bool = False,
    track=None,
) -> dict:
    """Import `source` into `output`, which then holds {train,val,test}.json and images/.

    kind: "auto", "coco", "voc" or "yolo". split: share of the images that stay in train if the
    source has no val, 0..1 exclusive, drawn with `seed`. copy: copy the images instead of linking
    them. strict: raise an error, instead of dropping what cannot be used. image_folder: the folder
    of the images, if they are elsewhere or in several places. all_classes: keep the classes of COCO
    JSON that no annotation uses. track: as in `check.check`.

    Category ids are those of COCO JSON, else 1..K in the order of the class names; boxes are
    [x, y, w, h] in px, clipped to the image. A mask that cannot be used is dropped, and its box
    kept. An image without boxes is kept as background. The same source gives the same output.

    Returns the report, which is also written to `import_report.json`: format, layout (what was
    recognised), names, splits (images, boxes, background images), dropped (split, what, file,
    detail), clipped (boxes that left the image by more than a pixel), notes.
    Raises: DataError if a file is malformed (it is not dropped, because its content is unknown), if
    nothing usable remains, if it is unclear which files belong together, or, with `strict`, for any
    fault; UsageError for a wrong argument or an output folder that is in use.
    """
    source, output = Path(source), Path(output)
    if not 0 < split < 1:
        raise UsageError(f"--split is {split}; it must be between 0 and 1, both excluded")
    if not source.is_dir():
        remedy = "; unpack it first" if source.suffix.lower() in (".zip", ".tar", ".gz") else ""
        raise DataError(f"{source}: is not a folder{remedy}")
    if source.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{output}: contains the source data; choose another --output")
    # Absolute from here on: the source may itself name its images by absolute paths.
    images_at = Path(os.path.abspath(image_folder)) if image_folder else None
    content = _read(Path(os.path.abspath(source)), kind, images_at, all_classes)
    with_val(content, split, seed)
    with new_folder(output, overwrite) as draft:
        report = _write(content, draft, copy, strict, track)
        report = {"source": str(source)} | report
        write_json(draft / IMPORT_REPORT, report)
    return report


def _read(folder: Path, kind: str, image_folder: Path | None, all_classes: bool) -> Source:
    if kind not in ("auto", *FORMATS):
        raise UsageError(f"--format is {kind!r}; it must be auto, {', '.join(FORMATS)}")
    listing = list_folder(folder)
    images = Images(listing, image_folder)
    found = {
        "yolo": find_yolo(listing, images),
        "voc": find_voc(listing),
        "coco": find_coco(listing),
    }
    kinds = [name for name, files in found.items() if files]
    if kind == "auto" and len(kinds) > 1:
        why = "; ".join(f"{name}: {next(iter(found[name])) or 'XML files'}" for name in kinds)
        raise UsageError(
            f"{folder}: looks like {' and '.join(kinds)} ({why}); choose one with --format"
        )
    if kind not in kinds and (kind != "auto" or not kinds):
        raise nothing_found(listing, images, kind)
    kind = kinds[0] if kind == "auto" else kind
    if kind == "coco":
        return read_coco(listing, images, all_classes)
    return {"voc": read_voc, "yolo": read_yolo}[kind](listing, images)


def _write(content: Source, folder: Path, copy: bool, strict: bool, track) -> dict:
    dropped, clipped, splits = list(content.dropped), [], {}
    placed: dict[str, Path] = {}
    for split, items in content.splits.items():
        coco = _coco(content, split)
        for item, probe in _probes(items, split, track):
            if isinstance(probe, str):
                dropped.append(Dropped(split, "image", item.where, probe))
                continue
            image, annotations = _convert(item, probe, split, dropped, clipped)
            for annotation in annotations:
                annotation["category_id"] = content.ids[annotation["category_id"]]
            _link(item, folder, placed, copy)
            coco["images"].append(image)
            coco["annotations"].append(annotations)
        if strict and dropped:
            more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
            raise DataError(f"{dropped[0]}{more}; without --strict, unusable data are dropped")
        if not coco["images"]:
            reasons = [d for d in dropped if d.split == split] or ["the split lists no images"]
            if split == "train" or len(content.splits) == 1:
                raise DataError(f"no usable image in the {split} split: {reasons[0]}")
            content.notes.append(
                f"no usable image in the {split} split, which is left out: {reasons[0]}"
            )
            continue
        if _number(coco) and content.kind == "coco":
            content.notes.append(
                f"the image ids of the {split} split are replaced by 1, 2, ...: in the source some "
                "are not integers from 0, or occur twice"
            )
        write_json(folder / f"{split}.json", coco)
        splits[split] = _summary(coco)
    if not splits:
        raise DataError(f"no split has a usable image: {content.notes[-1]}")
    return {
        "format": content.kind,
        "layout": content.layout,
        "names": content.names,
        "splits": splits,
        "dropped": [d._asdict() for d in dropped],
        "clipped": clipped,
        "notes": content.notes,
    }


def _coco(content: Source, split: str) -> dict:
    return {
        "info": {"generator": "ghm data import", "format": content.kind, "split": split},
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(content.ids, content.names, strict=True)
        ],
        "images": [],
        "annotations": [],
    }


def _probes(items: list[Item], split: str, track):
    """Yield each item with its image's `Probe`, or with the reason why it cannot be used."""

    def look(item: Item):
        if item.fault:
            return item, item.fault
        try:
            probe = images.probe(item.image)
        except DataError as error:
            return item, str(error)
        size = (probe.width, probe.height)
        if item.size and item.size != size:
            why = " (rotated by its EXIF orientation)" if probe.rotated else ""
            found = f"{item.image.name} is {size[0]} x {size[1]} px{why}"
            return item, f"{found}, but its annotations say {item.size[0]} x {item.size[1]}"
        return item, probe

    results = images.in_threads(look, items)
    return results if track is None else track(results, f"reading {split}", len(items))


def _convert(item: Item, probe, split: str, dropped: list, clipped: list) -> tuple[dict, list]:
    image = {"id": item.image_id, "file_name": item.name}
    image |= {"width": probe.width, "height": probe.height}
    annotations = []
    for box in item.boxes:
        fault, bbox = _check_box(box, item.relative, probe)
        if fault:
            dropped.append(Dropped(split, "box", item.where, f"{box.where}: {fault}"))
            continue
        if outside(bbox, probe.width, probe.height) > 1:
            clipped.append(f"{item.where}: {box.where}: box {show_box(bbox)}")
        bbox = _clip(bbox, probe)
        entry = {"category_id": box.category, "bbox": bbox, "area": bbox[2] * bbox[3]}
        entry |= {"iscrowd": 0} | box.extra
        if "segmentation" in entry:
            entry["segmentation"], fault = _check_mask(entry["segmentation"], item.relative, probe)
            if fault:
                dropped.append(Dropped(split, "mask", item.where, f"{box.where}: {fault}"))
            if not entry["segmentation"]:
                del entry["segmentation"]
        annotations.append(entry)
    return image, annotations


def _check_mask(mask, relative: bool, probe) -> tuple[list | dict | None, str | None]:
    """Return the usable part of a segmentation, in px, and why the rest of it cannot be used."""
    sides = (probe.width, probe.height)
    if relative:
        mask = [[round(v * sides[i % 2], 3) for i, v in enumerate(outline)] for outline in mask]
    fault = mask_fault(mask, *sides)
    # an object in several parts keeps the valid ones
    return (usable_polygons(mask, *sides) or None, fault) if fault else (mask, None)


def _check_box(box: Box, relative: bool, probe) -> tuple[str | None, list[float]]:
    """Return why the box cannot be used, or None; and the box in px."""
    fault = box.fault or box_fault(box.bbox)
    if fault:
        return fault, box.bbox
    scale = (probe.width, probe.height) * 2 if relative else (1, 1, 1, 1)
    bbox = [v * s for v, s in zip(box.bbox, scale, strict=True)]
    if math.isinf(outside(bbox, probe.width, probe.height)):
        size = f"{probe.width} x {probe.height} px"
        return f"box {show_box(bbox)} lies completely outside the image of {size}", bbox
    return None, bbox


def _clip(bbox: list[float], probe) -> list[float]:
    """Return the part of a box inside the image, rounded to a thousandth of a pixel."""
    left, top = max(bbox[0], 0), max(bbox[1], 0)
    right = min(bbox[0] + bbox[2], probe.width)
    bottom = min(bbox[1] + bbox[3], probe.height)
    sides = (left, top, max(right - left, 1e-3), max(bottom - top, 1e-3))
    return [int(v) if v == int(v) else round(v, 3) for v in sides]


def _link(item: Item, folder: Path, placed: dict[str, Path], copy: bool) -> None:
    if placed.setdefault(item.name, item.image) != item.image:
        raise DataError(
            f"{item.image} and {placed[item.name]} would both become images/{item.name}; rename one"
        )
    target = folder / "images" / item.name
    if target.exists():  # the image is in two splits
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            target.symlink_to(item.image.resolve())
            return
        except OSError:
            pass  # a file system without links
    shutil.copyfile(item.image, target)


def _number(coco: dict) -> bool:
    """Set ids in place, and return whether the images lose their own.

    Annotations count from 1, because COCO's evaluation takes 0 for "unmatched".
    """
    own = [image["id"] for image in coco["images"]]
    # several tasks of an annotation tool each count from 1
    keep = all(isinstance(i, int) for i in own) and len({*own}) == len(own)
    flat = []
    for number, image in enumerate(coco["images"]):
        image["id"] = own[number] if keep else number + 1
        for annotation in coco["annotations"][number]:
            flat.append({"id": len(flat) + 1, "image_id": image["id"]} | annotation)
    coco["annotations"] = flat
    return not keep


def _summary(coco: dict) -> dict:
    boxes = Counter(a["image_id"] for a in coco["annotations"])
    return {
        "images": len(coco["images"]),
        "boxes": len(coco["annotations"]),
        "background": len(coco["images"]) - len(boxes),
    }
