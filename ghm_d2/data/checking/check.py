"""`ghm data check` finds faults that would silently ruin a training or its evaluation."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ghm_d2.data import images
from ghm_d2.data.checking.coco_faults import MASKS_ALONE, NEITHER, Problem, audit
from ghm_d2.data.coco_json import (
    box_fault,
    hashable,
    image_name,
    load_outline,
    read_bytes,
    safe_name,
)
from ghm_d2.errors import DataError

# Upper limits of the area: COCO's for small, medium and large, and one more for tiny.
SIZES = (("tiny", 16**2), ("small", 32**2), ("medium", 96**2), ("large", float("inf")))
# These modes lose their upper bits when Detectron2 converts them to RGB.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")


@dataclass
class CheckReport:
    """`problems`, errors first; `summary`: split -> images, background, boxes, per_class, sizes."""

    problems: list[Problem]
    summary: dict[str, dict] = field(default_factory=dict)

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop or falsify what their split is for."""
        return [p for p in self.problems if p.severity == "error"]


def check(
    splits: Mapping[str, tuple[str | Path, str | Path]],
    track: Callable[[Iterator, str, int], Iterator] | None = None,
) -> CheckReport:
    """Check splits, decoding every image once; images are never held together in memory.

    splits: split -> (COCO JSON, folder that its file names are relative to).
    track: called as `track(iterator, description, total)` to show progress; yields the same items.
    Bad data raise nothing: a file that cannot be read is a problem too.
    """
    problems: list[Problem] = []
    summary: dict[str, dict] = {}
    seen: dict[str, list[tuple[str, str]]] = defaultdict(list)  # content -> (split, file)
    for split, (json_file, root) in splits.items():
        file = Path(json_file).name
        try:
            coco = load_outline(read_bytes(json_file), json_file)
        except DataError as error:
            problems.append(Problem("malformed", split, file, _detail(error, json_file)))
            continue
        found = [p for p in audit(coco, split, file) if p.kind not in MASKS_ALONE]
        problems += found
        if any(p.kind == "malformed" and p.file == file for p in found):
            continue
        summary[split] = _summary(coco)
        for name, result in _look_at_all(coco["images"], split, Path(root), track):
            if isinstance(result, Problem):
                problems.append(result)
            else:
                seen[result].append((split, name))
    problems += _copies(seen)
    problems += _between(summary)
    # A stable sort: within a severity, the order of splits and files stays.
    problems.sort(key=lambda problem: problem.severity != "error")
    return CheckReport(problems, summary)


def _detail(error: DataError, path: str | Path) -> str:
    text = str(error).removeprefix(str(path))
    return f"line {text[1:]}" if re.match(r":\d", text) else text.lstrip(": ")


def _look_at_all(entries: list[dict], split: str, root: Path, track):
    """Yield (file name, digest of its content) for each image, (file name, Problem) per fault."""

    def look(named: tuple[str, dict]) -> tuple[str, list]:
        name, entry = named
        path = root / name
        if not os.path.isfile(path):  # Path.is_file raises if a name is too long
            return name, [Problem("missing-image", split, name, f"no such file: {path}")]
        try:
            probe = images.probe(path)
        except DataError as error:
            return name, [Problem("unreadable-image", split, name, _detail(error, path))]
        return name, [probe.digest, *_disagreements(split, name, entry, probe)]

    by_name: dict[str, dict] = {}
    for entry in entries:
        try:
            safe_name(image_name(entry), "")
            by_name.setdefault(image_name(entry), entry)  # unchanged, as Detectron2 opens it
        except DataError:  # the audit reports it
            continue
    results = images.in_threads(look, list(by_name.items()))
    if track is not None:
        results = track(results, f"checking {split}", len(by_name))
    for name, findings in results:
        for finding in findings:
            yield name, finding


def _disagreements(split: str, name: str, entry: dict, probe: images.Probe) -> Iterator[Problem]:
    claimed, real = (entry.get("width"), entry.get("height")), (probe.width, probe.height)
    if claimed != real:
        why = " (rotated by its EXIF orientation)" if probe.rotated else ""
        size = f"{real[0]} x {real[1]} px{why}"
        detail = f"the image is {size}, but the JSON says {claimed[0]} x {claimed[1]}"
        yield Problem("size", split, name, detail)
    if probe.mode in _DEEP_MODES:
        detail = f"has {probe.mode} pixels, which Detectron2 clips at 255; convert it to 8 bits"
        yield Problem("bit-depth", split, name, detail, NEITHER)


def _copies(seen: dict[str, list[tuple[str, str]]]) -> Iterator[Problem]:
    """Yield duplicate pictures: in one split, or in two, which falsifies the evaluation."""
    for places in seen.values():
        first_split, first = places[0]
        for split, name in places[1:]:
            if split == first_split:
                detail = f"the image is a copy of {first}; remove one of them"
                yield Problem("duplicate-image", split, name, detail, NEITHER)
            else:
                detail = f"data leakage: the same image is in {first_split} as {first}; remove one"
                yield Problem("leakage", split, name, detail)


def _between(summary: dict[str, dict]) -> Iterator[Problem]:
    """Yield categories that differ between the splits, or that have no box in train."""
    first = next(iter(summary), None)
    for split, counts in summary.items():
        if list(counts["per_class"]) != list(summary[first]["per_class"]):
            detail = f"the categories differ from those of {first}; all splits need the same"
            yield Problem("categories", split, f"{split}.json", detail)
    for name, count in summary.get("train", {"per_class": {}})["per_class"].items():
        if not count:
            detail = f"category {name!r} has no box in train"
            yield Problem("unused-category", "train", "train.json", detail, NEITHER)


def _summary(coco: dict) -> dict:
    names = {hashable(c.get("id")): str(c.get("name")) for c in sorted(coco["categories"], key=_id)}
    annotations = coco.get("annotations", [])
    boxes = [a for a in annotations if not box_fault(a.get("bbox"))]
    per_class = dict.fromkeys(names.values(), 0)
    for annotation in boxes:
        name = names.get(hashable(annotation.get("category_id")))
        if name is not None:
            per_class[name] += 1
    areas = Counter(
        next(size for size, limit in SIZES if a["bbox"][2] * a["bbox"][3] < limit) for a in boxes
    )
    annotated = {hashable(a.get("image_id")) for a in annotations}
    return {
        "images": len(coco["images"]),
        "background": sum(hashable(image.get("id")) not in annotated for image in coco["images"]),
        "boxes": len(annotations),
        "per_class": per_class,
        "sizes": {size: areas[size] for size, _ in SIZES},
    }


def _id(category: dict) -> int:
    value = category.get("id")
    return value if isinstance(value, int) else -1
