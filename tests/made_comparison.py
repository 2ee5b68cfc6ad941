"""A comparison's folder as training and analysis leave it, with numbers made up."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ghm_d2.files import write_json, write_text
from ghm_d2.records import AP_COLUMNS, ComparedSide, Comparison, Pair, RunRecord, Trial

NETWORK = "tf_efficientnet_lite0-FPN"
SL1, GHM_R = "Faster R-CNN CE + SL1", "Faster R-CNN CE + GHM-R"
FOCAL, GHM = "RetinaNet focal + SL1", "RetinaNet GHM-C + GHM-R"
# AP by seed: GHM-R is better in each by about 2; GHM and focal cannot be told apart
AP = {
    SL1: (50.0, 51.0, 50.5),
    GHM_R: (52.0, 53.2, 52.4),
    FOCAL: (47.0, 49.0, 48.0),
    GHM: (48.0, 47.0, 49.5),
}
PAIRS = (
    (GHM_R, SL1, "what GHM changes within each family"),
    (GHM, FOCAL, "what GHM changes within each family"),
    (SL1, FOCAL, "how the families compare"),
)
# a comparison that is quicker to report on
SMALL = {name: AP[name] for name in (FOCAL, GHM)}
SMALL_PAIRS = PAIRS[1:2]
# what a name may hold: markup, Markdown, a quote, a formula, matplotlib's mathematics
HOSTILE = '<script>document.title="hit"</script> | "> <img src=x onerror=alert(1)> **b** $x^$ &amp;'


def build(
    root: Path,
    ap: dict[str, Sequence[float | None]] = AP,
    pairs: Sequence[tuple[str, str, str] | Pair] = PAIRS,
    *,
    analysis: bool = True,
    noise: bool = False,
    labels: Sequence[str] = ("RBC", "WBC", "Platelets"),
    **changes,
) -> Path:
    """Makes the folders of a comparison and of its runs below `root`; gives the former.

    Args:
        ap: AP by side, a value a seed; None is a run that is not done.
        pairs: (side, reference, question).
        analysis: whether runs have analysis.json and worst.jpg; noise: with weights of noise.
        labels: names of the classes.
        changes: of the comparison.
    """
    folder = root / "comparison"
    folder.mkdir(exist_ok=True)
    seeds = list(range(1, 1 + max(map(len, ap.values()))))
    sides = []
    for i, (name, values) in enumerate(ap.items()):
        names = [f"../runs/{i}_{seed}" for seed in seeds]
        sides.append(ComparedSide(name, f"quick/side{i}.yaml", ["SOLVER.MAX_ITER", "300"], names))
        for seed, run, value in zip(seeds, names, values, strict=False):
            if value is not None:
                per_class = dict.fromkeys(labels, value)
                write_run(folder / run, i, name, seed, value, per_class=per_class)
                if analysis:
                    write_analysis(folder / run, i, seed, noise, labels)
    known = {
        "name": "two-stage vs one-stage",
        "question": "Does GHM carry over from one-stage to two-stage detectors?",
        "dataset": "bccd",
        "budget": "quick",
        "seeds": seeds,
        "sides": sides,
        "pairs": [pair if isinstance(pair, Pair) else Pair(*pair) for pair in pairs],
        "command": "ghm compare two-stage vs one-stage --dataset bccd --seeds 3",
        "search": [Trial(next(iter(ap)), ["SOLVER.BASE_LR", "0.01"], 40.0, chosen=True)],
    }
    Comparison(**known | changes).write(folder)
    return folder


def write_run(folder: Path, side: int, method: str, seed: int, ap: float, **changes) -> None:
    """Write run.json, metrics.jsonl and density.jsonl of 300 iterations that reached `ap`."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = dict(zip(AP_COLUMNS, (ap, ap + 30, ap - 5, None, ap - 8, ap + 6), strict=True))
    known = {
        "method": method,
        "network": NETWORK,
        "dataset": "bccd",
        "config_hash": f"hash{side}",
        "seed": seed,
        "iterations": 300,
        "device": "cpu (x86_64, 2 threads)",
        "code_version": "0.1.0",
        "packages": {"torch": "2.14.1"},
        "parameters": 4_000_000 + side,
        "s_per_iter": 0.5 + side / 100,
        "ms_per_image": 40.0 + seed,
        "peak_memory_mb": 1500.0,
        "train_seconds": 150.0,
        "metrics": metrics,
        "per_class": {"RBC": ap, "WBC": ap + 2},
        "objects": {"APs": 1, "APm": 2100, "APl": 0},
        "gflops": 3.2,
        "loss_ms": 25.0,
        "loss_variation": 0.1 + side / 50,
        "grad_ratio_cls_box": 2.0 + side,
        "weight_variation": {"ghm_c": 0.3 + seed / 10} if "GHM-C" in method else {},
    }
    RunRecord(**known | changes).write(folder)
    rows = []
    for i in range(0, 300, 20):
        loss = (2 + side) * math.exp(-i / 90) + 0.05 * (1 + math.sin(i + seed))
        rows.append({"iteration": i, "loss_cls": loss, "total_loss": loss * 2, "lr": 0.01})
        rows[-1] |= {"grad_ratio_cls_box": (1 + side) * math.exp(i / 300)} if i % 40 else {}
    for i in (99, 199, 300):
        rows.append({"iteration": i, "bbox/AP": ap * (1 - math.exp(-i / 80))})
    write_text(folder / "metrics.jsonl", "".join(map(_line, rows)))
    if "GHM" in method:
        write_text(folder / "density.jsonl", "".join(map(_line, _density(method))))


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def _density(method: str) -> list[dict]:
    names = {"ghm_r.density": 10} | ({"ghm_c.density": 30} if "GHM-C" in method else {})
    return [
        {
            "iteration": i,
            "density": name,
            "ema": [[2e4 * math.exp(-12 * k / bins) * (1 + i / 100) + k for k in range(bins)]],
        }
        for i in range(9, 300, 30)
        for name, bins in names.items()
    ]


def write_analysis(folder: Path, side: int, seed: int, noise: bool, labels: Sequence[str]) -> None:
    """Write analysis.json and worst.jpg beside a run."""
    found = _gradients() | _detections(side, labels)
    if noise:
        found["noise"] = _noise(side, seed)
    write_json(folder / "analysis.json", found)
    sheet = Image.new("RGB", (640, 400), (24, 26, 30))
    ImageDraw.Draw(sheet).ellipse((100, 100, 300, 300), fill=(200, 60, 60))
    sheet.save(folder / "worst.jpg", quality=85)


def _gradients() -> dict:
    """Return the parts of an analysis that are about gradients."""
    edges = [k / 100 for k in range(101)]
    counts = [round(1e5 * math.exp(-k / 6) + 200 * math.exp(-(100 - k) / 4)) for k in range(100)]
    g = [(k + 0.5) / 100 for k in range(100)]
    d = [k / 50 for k in range(101)]
    return {
        "gradient_norms": {
            "images": 40,
            "cls": {"edges": edges, "counts": counts},
            "reg": {"edges": edges, "counts": counts[::-1], "mu": 0.02},
        },
        "effective_gradient": {
            "cls": {
                "g": g,
                "CE": g,
                "focal": [2 * x**2 for x in g],
                "GHM-C": [3e4 * x / max(c, 1) for x, c in zip(g, counts, strict=True)],
                "GHM-C robust": [9 * x / (1 + c / 3e3) for x, c in zip(g, counts, strict=True)],
            },
            "reg": {
                "mu": 0.02,
                "mu_robust": 0.3,
                "d": d,
                "SL1": [min(9 * x, 1) for x in d],
                "ASL1": [x / math.hypot(x, 0.02) for x in d],
                "GHM-R": [0.5 * x / math.hypot(x, 0.02) / (1 + x) for x in d],
                "GHM-R robust": [0.7 * x / math.hypot(x, 0.3) for x in d],
            },
        },
        "gradient_share": {
            "cls": {
                "edges": edges[::20],
                "CE": [0.6, 0.2, 0.1, 0.05, 0.05],
                "focal": [0.05, 0.15, 0.2, 0.3, 0.3],
                "GHM-C": [0.1, 0.15, 0.2, 0.25, 0.3],
                "GHM-C robust": [0.3, 0.2, 0.2, 0.15, 0.15],
            },
            "reg": {"edges": edges[::50], "SL1": [0.2, 0.8], "GHM-R robust": [0.3, 0.7]},
        },
    }


def _detections(side: int, labels: Sequence[str]) -> dict:
    """Return the parts of an analysis that are about detections."""
    recall = [k / 100 for k in range(101)]
    drop = {"0.5": 8 / (1 + side), "0.75": 3 / (1 + side)}
    return {
        "precision_recall": {
            "recall": recall,
            "precision": {iou: [1 - r**p for r in recall] for iou, p in drop.items()},
        },
        "confusion": {
            "iou": 0.5,
            "score": 0.5,
            "labels": [*labels, "background"],
            "matrix": [[300, 1, 4, 90], [2, 40, 0, 3], [5, 0, 25, 20], [60, 4, 11, 0]],
        },
        "worst": [{"file_name": f"{labels[0]}.jpg", "missed": 5, "false": 2}],
    }


def _noise(side: int, seed: int) -> dict:
    """Return an analysis's weights of clean and of spoilt annotations."""
    return {
        "none": {"boxes": 200, "weight": 2.0, "box_weight": 1.1},
        "class": {
            "boxes": 30,
            "weight": 3.0 / (0.5 + side) + 0.05 * seed,
            "box_weight": 1.0,
        },
        "shift": {"boxes": 40, "weight": 1.8 + 0.1 * seed, "box_weight": 0.6 + side / 10},
    }


def text_of(report, name: str) -> str:
    """Return the text of a written report's file."""
    return (report.files[0].parent / name).read_text(encoding="utf-8")
