"""Compares how well our scores, cleanlab's and hotcoco's find known errors in annotations.

    python benchmarks/rank_suspects.py suspects/ --output found.json
    python benchmarks/rank_suspects.py suspects/ --clean clean.json --output found.json

The folders are those that `ghm data suspects` wrote, with folds. The errors are known from the
annotations themselves (digits with noise: `noise`, `missing_annotations`), or from a second, clean
JSON of the same images. All scores use the same detections. The peers are used if they are
installed (`pip install --no-deps cleanlab hotcoco`).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score

from ghm_d2.analysis.suspects import (
    MATCH,
    NEAR,
    SCORES,
    Evidence,
    box_iou,
    kind_scores,
    missing,
)
from ghm_d2.data.coco_json import by_image

FIRST = (100, 500, 1000)
OF_DIGITS = {"class": "class", "shift": "box", "none": ""}
GOOD = 0.75  # least IoU of a good box with the clean one


@dataclass
class Image:
    """An image with its annotations, its detections, and the known errors.

    Attributes:
        annotations: in COCO's format.
        detections: in COCO's result format, best first.
        errors: one per annotation: "class", "box", "extra", or "" for none.
        missing: the annotations that were left out.
    """

    annotations: list[dict]
    detections: list[dict]
    errors: list[str] = field(default_factory=list)
    missing: list[dict] = field(default_factory=list)


def read_folder(folder: Path, clean: dict | None) -> list[Image]:
    """Read all images of the folds, with the errors in each."""
    images = []
    configs = [f.parent / "config.yaml" for f in folder.glob("runs/*/detections.json")]
    truth, seen = by_name(clean) if clean else {}, set()
    for config in sorted(configs):
        (json_file,) = yaml.safe_load(config.read_text())["DATASETS"]["TEST"]
        coco = json.loads(Path(json_file).read_text())
        detections = json.loads((config.parent / "detections.json").read_text())
        found, annotated = by_image(detections), by_image(coco["annotations"])
        absent = by_image(coco.get("missing_annotations", []))
        names = {c["id"]: c["name"] for c in coco["categories"]}
        for entry in coco["images"]:
            number = entry["id"]
            if number in seen:
                raise SystemExit(
                    f"{folder}: image {number} was judged twice; the folder must hold only runs of "
                    "one seed and one number of folds"
                )
            seen.add(number)
            best_first = sorted(found.get(number, []), key=lambda d: -d["score"])
            own = [a for a in annotated.get(number, []) if not a.get("iscrowd")]
            image = Image(own, best_first)
            if clean:
                compare_with_clean(image, with_ids(truth[entry["file_name"]], names))
            else:
                image.errors = [OF_DIGITS[a.get("noise", "none")] for a in image.annotations]
                image.missing = absent.get(number, [])
            images.append(image)
    return images


def by_name(coco: dict) -> dict[str, list[dict]]:
    """Annotations by the file name of their image, each with its class's "name"."""
    names = {c["id"]: c["name"] for c in coco["categories"]}
    named = [a | {"name": names[a["category_id"]]} for a in coco["annotations"]]
    annotated = by_image(named)
    return {image["file_name"]: annotated.get(image["id"], []) for image in coco["images"]}


def with_ids(annotations: list[dict], names: dict[int, str]) -> list[dict]:
    """The annotations with another JSON's category ids for the same class names."""
    ids = {name: number for number, name in names.items()}
    return [a | {"category_id": ids[a["name"]]} for a in annotations]


def compare_with_clean(image: Image, clean: list[dict]) -> None:
    """Enter the errors of `image`: boxes are paired from the highest IoU down to 0.1."""
    overlaps = box_iou(image.annotations, clean)
    image.errors, left = ["extra"] * len(image.annotations), set(range(len(clean)))
    order = np.dstack(np.unravel_index(np.argsort(-overlaps, axis=None), overlaps.shape))[0]
    paired: set[int] = set()
    for i, j in order.tolist() if overlaps.size else []:
        if overlaps[i, j] < NEAR or i in paired or j not in left:
            continue
        paired.add(i)
        left.remove(j)
        same = image.annotations[i]["category_id"] == clean[j]["category_id"]
        good = overlaps[i, j] >= GOOD
        image.errors[i] = "class" if not same else "" if good else "box"
    image.missing = [clean[j] for j in sorted(left)]


def our_annotations(images: list[Image]) -> dict[str, np.ndarray]:
    """Return all of our scores of annotations by name, (A,) each."""
    evidence = Evidence()
    for image in images:
        evidence.add(image.annotations, image.detections)
    scores = {name: score(evidence) for name, score in SCORES.items()}
    return scores | {f"kind {k}": values for k, values in kind_scores(evidence).items()}


def our_missing(images: list[Image]) -> list[tuple[int, dict, float]]:
    """Return (index of the image, detection, score) of each missing annotation."""
    return [
        (i, detection, score)
        for i, image in enumerate(images)
        for detection, score in missing(image.annotations, image.detections)
    ]


def confident_missing(images: list[Image]) -> list[tuple[int, dict, float]]:
    """Detections with an IoU below 0.5 with every annotation, ranked by their score alone."""
    found = []
    for i, image in enumerate(images):
        free = (box_iou(image.annotations, image.detections) < MATCH).all(0)
        kept = zip(image.detections, free, strict=True)
        found += [(i, d, d["score"]) for d, is_free in kept if is_free]
    return found


def cleanlab_scores(images: list[Image]):
    """cleanlab's ObjectLab (arXiv 2309.00832): its scores of boxes and of overlooked objects."""
    from cleanlab.object_detection import rank

    ids = sorted({e["category_id"] for x in images for e in (*x.annotations, *x.detections)})
    number = {category: i for i, category in enumerate(ids)}
    labels, predictions = [], []
    for image in images:
        boxes = np.array([corners(a) for a in image.annotations]).reshape(-1, 4)
        classes = np.array([number[a["category_id"]] for a in image.annotations], dtype=int)
        labels.append({"bboxes": boxes, "labels": classes})
        rows: list[list] = [[] for _ in ids]
        for d in image.detections:
            rows[number[d["category_id"]]].append([*corners(d), d["score"]])
        predictions.append([np.array(r).reshape(-1, 5) for r in rows])
    ordered = [[d for c in ids for d in x.detections if d["category_id"] == c] for x in images]
    best = np.sort([d["score"] for detections in ordered for d in detections])[::-1]
    total, scores, found = sum(len(x.annotations) for x in images), {}, []
    # its own thresholds are made for detectors whose scores are probabilities
    fitted = best[min(total, len(best)) - 1], best[min(total // 4, len(best) - 1)]
    for name, (low, high) in {"cleanlab": (0.5, 0.95), "cleanlab fitted": fitted}.items():
        own = {"labels": labels, "predictions": predictions}
        swap = rank.compute_swap_box_scores(**own, high_probability_threshold=high)
        off = rank.compute_badloc_box_scores(**own, low_probability_threshold=low)
        scores[name] = 1 - np.fmin(np.concatenate(swap), np.concatenate(off))
        scores["kind class"] = 1 - np.concatenate(swap)
        scores["kind box"] = 1 - np.concatenate(off)
        overlooked = rank.compute_overlooked_box_scores(**own, high_probability_threshold=low)
        found = [
            (i, d, 1 - float(score))
            for i, rows in enumerate(zip(ordered, overlooked, strict=True))
            for d, score in zip(*rows, strict=True)
            if not np.isnan(score)
        ]
    return scores, found  # kinds and overlooked objects: with fitted thresholds


def hotcoco_scores(images: list[Image]):
    """Return hotcoco's report of label errors: wrong classes, and missing annotations."""
    from hotcoco import COCO, COCOeval

    coco: dict = {"images": [], "annotations": [], "categories": []}
    results, numbered = [], []
    for i, image in enumerate(images):
        coco["images"].append({"id": i + 1, "width": 10_000, "height": 10_000})
        for a in image.annotations:
            numbered.append((i, a))
            own = {"id": len(numbered), "image_id": i + 1, "iscrowd": 0}
            coco["annotations"].append(a | own)
        results += [d | {"image_id": i + 1} for d in image.detections]
    used = {e["category_id"] for e in (*coco["annotations"], *results)}
    coco["categories"] = [{"id": c, "name": str(c)} for c in sorted(used)]
    truth = COCO(coco)
    evaluation = COCOeval(truth, truth.load_res(results), "bbox")
    evaluation.evaluate()
    errors = evaluation.image_diagnostics(iou_thr=MATCH, score_thr=0.01)["label_errors"]
    wrong = np.zeros(len(numbered))
    found = []
    for error in errors:
        if error["type"] == "wrong_label":
            row = error["gt_id"] - 1
            wrong[row] = max(wrong[row], error["dt_score"])
        else:
            i = error["image_id"] - 1
            detection = results[error["dt_id"] - 1]
            found.append((i, detection, error["dt_score"]))
    return {"hotcoco": wrong, "kind class": wrong}, found


def corners(entry: dict) -> list[float]:
    """Return [x0, y0, x1, y1] of a COCO box."""
    x, y, width, height = entry["bbox"]
    return [x, y, x + width, y + height]


def judge_annotations(scores: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Average precision and AUROC for finding errors, and the precision of the first ranks."""
    if not wrong.any() or wrong.all():
        return {}
    order = np.argsort(-scores, kind="stable")
    found = {"AP": average_precision_score(wrong, scores), "AUROC": roc_auc_score(wrong, scores)}
    return found | {f"precision at {n}": wrong[order[:n]].mean() for n in FIRST if n <= len(wrong)}


def judge_missing(found: list[tuple[int, dict, float]], images: list[Image]) -> dict[str, float]:
    """AP, precision and recall; a detection of any class finds a missing annotation, once."""
    total = sum(len(image.missing) for image in images)
    if not total:
        return {}
    ordered, taken, hits = sorted(found, key=lambda row: -row[2]), set(), []
    for i, detection, _ in ordered:
        overlaps = box_iou(images[i].missing, [detection])[:, 0]
        free = [j for j in np.argsort(-overlaps) if overlaps[j] >= MATCH and (i, j) not in taken]
        hits.append(bool(free))
        if free:
            taken.add((i, free[0]))
    right = np.cumsum(hits) if hits else np.zeros(1)
    precision = right / np.arange(1, len(right) + 1)
    result = {"AP": float((precision * np.array(hits or [0])).sum() / total)}
    result |= {f"precision at {n}": float(right[min(n, len(right)) - 1] / n) for n in FIRST}
    return result | {f"recall at {n}": float(right[min(n, len(right)) - 1] / total) for n in FIRST}


PEERS: dict[str, Callable] = {"cleanlab": cleanlab_scores, "hotcoco": hotcoco_scores}


def rank(images: list[Image]) -> dict:
    """The figures of all scores; "absent" names the peers that are not installed."""
    errors = np.array([e for image in images for e in image.errors])
    result: dict = {"images": len(images), "annotations": len(errors), "absent": []}
    result["errors"] = {k: int((errors == k).sum()) for k in ("class", "box", "extra")}
    result["errors"]["missing"] = sum(len(image.missing) for image in images)
    methods = {"ours": (our_annotations(images), our_missing(images))}
    for name, peer in PEERS.items():
        try:
            methods[name] = peer(images)
        except ImportError:
            result["absent"].append(name)
    methods["confidence"] = ({}, confident_missing(images))
    for name, (scores, found) in methods.items():
        rows = {}
        for score, values in scores.items():
            kind = score.removeprefix("kind ")
            wrong = errors == kind if score.startswith("kind ") else errors != ""
            rows[score] = judge_annotations(values, wrong)
        result[name] = {k: v for k, v in rows.items() if v} | {
            "missing": judge_missing(found, images)
        }
    return result


def main() -> None:
    """Print and write the figures of each folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clean", type=Path, help="COCO JSON without errors of the same images")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    clean = json.loads(options.clean.read_text()) if options.clean else None
    results = {folder.name: rank(read_folder(folder, clean)) for folder in options.folders}
    text = json.dumps(results, indent=2, default=lambda x: round(float(x), 4))
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
