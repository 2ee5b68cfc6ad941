"""Finds annotations that are likely wrong, with detections of a model that has not seen them.

The *norm* of an annotation, from 0 to 1, measures how strongly it contradicts the model, like the
gradient norm g of a sample in GHM (Li, Liu, Wang, arXiv 1811.05181, section 3). Small objects have
large norms even if their annotations are right. A norm is therefore compared with those of
annotations of about the same size: its *tail* is the share of them with a smaller norm.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask

MATCH = 0.5  # IoU from which a detection shows an annotation's object
NEAR = 0.1  # IoU from which it may show that object, with the annotation's box off
NEIGHBOURS = 200  # number of annotations of about the same size to compare with


@dataclass(frozen=True)
class Suspect:
    """An annotation that may be wrong, or a detection where one may be missing.

    Attributes:
        image_id: the image's id in the data set.
        annotation: in COCO's format; None for one that may be missing.
        kind: "class" (it is wrong), "box" (it is off), "extra" (there is no such object) or
            "missing" (an object has no annotation).
        score: in [0, 1], higher is more suspect. Annotations and missing ones cannot be compared.
        proposal: the detection that contradicts the annotation, in COCO's result format; None if
            nothing was detected.
    """

    image_id: int | str
    annotation: dict | None
    kind: str
    score: float
    proposal: dict | None


@dataclass
class Evidence:
    """The detections for and against the annotations of all images, one list entry per annotation.

    Attributes:
        area: area of the annotation's box, px^2.
        support: the highest score of its class at an IoU of 0.5 or more; 0 if there is none.
        other: the highest score of any other class at an IoU of 0.5 or more; 0 if there is none.
        overlap: the IoU with the best detection of its class, by score times IoU, among those with
            an IoU of 0.1 or more that belong to no other annotation; 0 if there is none.
        rivals, places: the detections behind `other` and `overlap`; None if there is none.
    """

    annotations: list[dict] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    support: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    rivals: list[dict | None] = field(default_factory=list)
    places: list[dict | None] = field(default_factory=list)

    def add(self, annotations: Sequence[dict], detections: Sequence[dict]) -> None:
        """Add an image's annotations, without crowds, and its detections, best first."""
        overlaps = box_iou(annotations, detections)
        scores = np.array([d["score"] for d in detections])
        classes = np.array([d["category_id"] for d in detections])
        claimed = overlaps >= MATCH
        for row, annotation in enumerate(annotations):
            own, there = classes == annotation["category_id"], claimed[row]
            elsewhere = claimed.any(0) & ~there
            rival = _first(there & ~own)
            near = own & (overlaps[row] >= NEAR) & ~elsewhere
            # by score alone it could be an unannotated neighbour, by IoU alone a weak guess
            place = _first(near, scores * overlaps[row])
            self.annotations.append(annotation)
            self.area.append(annotation["bbox"][2] * annotation["bbox"][3])
            self.support.append(scores[there & own].max(initial=0.0))
            self.other.append(0.0 if rival is None else scores[rival])
            self.overlap.append(0.0 if place is None else overlaps[row, place])
            self.rivals.append(None if rival is None else detections[rival])
            self.places.append(None if place is None else detections[place])

    def norms(self) -> dict[str, np.ndarray]:
        """Return how strongly each annotation contradicts the model: arrays (A,) in [0, 1].

        "class": 1 - `support`, GHM-C's norm of a foreground sample. "other": `other` times its
        share of `support` + `other`. "box": 1 - `overlap`. "extra": 1 - the larger one of `support`
        and `other`.
        """
        support, other = np.array(self.support), np.array(self.other)
        share = other / np.maximum(support + other, 1e-9)
        return {
            "class": 1 - support,
            "other": other * share,
            "box": 1 - np.array(self.overlap),
            "extra": 1 - np.maximum(support, other),
        }

    def kinds(self) -> list[str]:
        """Return the kind of error that each annotation would have: "class", "box" or "extra"."""
        rows = zip(self.support, self.other, self.places, strict=True)
        return ["class" if o > s else "box" if place else "extra" for s, o, place in rows]


def box_iou(annotations: Sequence[dict], detections: Sequence[dict]) -> np.ndarray:
    """Return the IoU of boxes [x, y, width, height]: (annotations, detections), in [0, 1]."""
    shape = len(annotations), len(detections)
    if not all(shape):
        return np.zeros(shape)
    rows, columns = ([a["bbox"] for a in boxes] for boxes in (annotations, detections))
    found = mask.iou(np.array(rows, float), np.array(columns, float), [0] * shape[1])
    return np.asarray(found).reshape(shape)


def tails(norms: np.ndarray, area: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Return the share of annotations of about the same size with a smaller norm; ties count half.

    Args:
        norms: (A,), the shape of the result.
        area: (A,) in px^2.
        neighbours: number of annotations to compare with, around each one in the order of size.
    """
    order = np.argsort(area, kind="stable")
    ordered, found = norms[order], np.empty(len(norms))
    last = max(0, len(norms) - neighbours)
    for i, norm in enumerate(ordered):
        start = min(max(0, i - neighbours // 2), last)
        window = ordered[start : start + neighbours]
        found[order[i]] = (np.mean(window < norm) + np.mean(window <= norm)) / 2
    return found


def _by_tail(evidence: Evidence) -> np.ndarray:
    """Return 1 - (1 - t) (1 - u): t is the tail of "class", u the larger of "box" and "other"."""
    norms, area = evidence.norms(), np.array(evidence.area)
    by_norm = {name: tails(norms[name], area) for name in ("class", "box", "other")}
    either = np.maximum(by_norm["box"], by_norm["other"])
    return 1 - (1 - by_norm["class"]) * (1 - either)


def _by_loss(evidence: Evidence) -> np.ndarray:
    """Return 1 - exp(-l), l the cross entropy of the annotated class plus the box's 1 - IoU."""
    support = np.maximum(np.array(evidence.support), 1e-2)
    return 1 - support * np.exp(-evidence.norms()["box"])


def _by_inverse_density(evidence: Evidence) -> np.ndarray:
    """Return the norm "class" over its density, as GHM's 1 / R(g), in 10 regions by 3 sizes."""
    norms, area = evidence.norms()["class"], np.array(evidence.area)
    region = np.minimum((norms * 10).astype(int), 9)
    sizes = np.argsort(np.argsort(area)) * 3 // max(1, len(area))
    counts = np.zeros((3, 10))
    np.add.at(counts, (sizes, region), 1)
    return norms / counts[sizes, region]


# Ways to score annotations: each returns (A,), higher is more suspect
SCORES: dict[str, Callable[[Evidence], np.ndarray]] = {
    "tail": _by_tail,
    "norm": lambda evidence: evidence.norms()["class"],
    "inverse density": _by_inverse_density,
    "loss": _by_loss,
    "confidence": lambda evidence: evidence.norms()["extra"],
}


def kind_scores(evidence: Evidence) -> dict[str, np.ndarray]:
    """Return a score for each kind of error alone, (A,) in [0, 1], from the tails."""
    area, has_place = np.array(evidence.area), np.array(evidence.overlap) > 0
    by_norm = {name: tails(norm, area) for name, norm in evidence.norms().items()}
    return {
        "class": by_norm["other"] * by_norm["class"],
        "box": by_norm["box"] * by_norm["extra"] * has_place,
        "extra": by_norm["extra"] * ~has_place,
    }


def missing(annotations: Sequence[dict], detections: Sequence[dict]) -> list[tuple[dict, float]]:
    """Return an image's detections that no annotation explains, with their suspicion in [0, 1].

    An annotation explains detections from an IoU of 0.5. An IoU of 0.1 suffices if the classes are
    equal and no detection with an IoU of 0.5 has an equal or higher score: the box is then off.
    A detection with an IoU of 0.5 to a better one of any class is dropped. The suspicion is the
    score times (1 - o)^4, with o the largest IoU with an annotation.

    Args:
        annotations: including crowds, within which nothing is missing.
        detections: in COCO's result format, best first.
    """
    scores = np.array([d["score"] for d in detections])
    overlaps = box_iou(annotations, detections)
    support = np.where(overlaps >= MATCH, scores, 0).max(1, initial=0.0)
    classes, seen = (
        np.array([entry["category_id"] for entry in entries], dtype=np.int64)
        for entries in (annotations, detections)
    )
    same = classes[:, None] == seen
    near = same & (overlaps >= NEAR) & (support[:, None] < scores)
    explained = near.any(0) | (overlaps >= MATCH).any(0) | _in_crowds(annotations, detections)
    between = box_iou(detections, detections)
    found, kept = [], np.zeros(len(detections), dtype=bool)
    for i in range(len(detections)):
        if between[i, kept].max(initial=0.0) >= MATCH:
            continue
        kept[i] = True
        if not explained[i]:
            most = overlaps[:, i].max(initial=0.0)
            found.append((detections[i], float(scores[i] * (1 - most) ** 4)))
    return found


def _in_crowds(annotations: Sequence[dict], detections: Sequence[dict]) -> np.ndarray:
    crowds = [a["bbox"] for a in annotations if a.get("iscrowd")]
    if not crowds or not detections:
        return np.zeros(len(detections), dtype=bool)
    boxes = np.array([d["bbox"] for d in detections], float)
    inside = mask.iou(boxes, np.array(crowds, float), [1] * len(crowds))
    return (np.asarray(inside) >= MATCH).any(1)


def find_suspects(
    images: Iterable[tuple[Sequence[dict], Sequence[dict]]],
    most: int | None = None,
    score: str = "tail",
) -> tuple[list[Suspect], list[Suspect]]:
    """Return all annotations, and detections whose annotation may be missing, most suspect first.

    Args:
        images: annotations of an image in COCO's format (crowds are not judged), and detections
            in COCO's result format by a model that has not seen it; both with the same ids.
        most: how many of the missing ones to keep; None keeps all.
        score: a name in SCORES.
    """
    evidence = Evidence()
    found = _missing_of(images, evidence)
    absent = list(found) if most is None else heapq.nlargest(most, found, key=lambda s: s.score)
    values = SCORES[score](evidence) if evidence.annotations else []
    columns = (evidence.annotations, evidence.kinds(), values)
    against = zip(*columns, evidence.rivals, evidence.places, strict=True)
    judged = [
        Suspect(own["image_id"], own, kind, float(value), rival if kind == "class" else place)
        for own, kind, value, rival, place in against
    ]
    return _sorted(judged), _sorted(absent)


def _missing_of(images, evidence: Evidence) -> Iterator[Suspect]:
    """Yield missing annotations image by image, and add the images' annotations to `evidence`."""
    for annotations, detections in images:
        ordered = sorted(detections, key=lambda d: -d["score"])
        evidence.add([a for a in annotations if not a.get("iscrowd")], ordered)
        for detection, value in missing(annotations, ordered):
            yield Suspect(detection["image_id"], None, "missing", value, detection)


def _sorted(suspects: list[Suspect]) -> list[Suspect]:
    return sorted(suspects, key=lambda s: -s.score)


def _first(which: np.ndarray, values: np.ndarray | None = None) -> int | None:
    """Return the index of the first True in `which`, or of the True with the largest value."""
    if not which.any():
        return None
    return int(which.argmax() if values is None else np.where(which, values, -1).argmax())
