"""Measures the weight of wrong annotations by the number of images that share a density.

    python benchmarks/noise_weights.py noise/runs/*/model_final.pth --images 2 4 8 16 32 64 \
        --output by_batch.json

The checkpoints are those of `ghm compare noise`. Nothing is trained: each model sees the same
training images (at most 400) in batches of each size, and its moving averages continue from the
checkpoint. A weight is the share of the loss's gradient that the anchors matched to such boxes
have, divided by their share of the plain gradient (that of cross entropy or smooth L1).
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from measure import write_result

from ghm_d2.analysis.analyse import measure_gradients
from ghm_d2.inference.load import load_detector
from ghm_d2.progress import Progress
from ghm_d2.records import RunRecord
from ghm_d2.register import register_all
from ghm_d2.training.prepare import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--output", type=Path, help="JSON file to write; default: stdout")
    args = parser.parse_args()
    register_all()
    rows = [row for weights in args.weights for row in rows_of(weights, args.images)]
    show(rows)
    write_result({"what": "noise weights by batch", "results": rows}, args.output)


def rows_of(weights: Path, images: list[int]) -> list[dict]:
    """Return a row for each batch size and kind of noise; none if no annotation is wrong."""
    record, rows = RunRecord.read(weights.parent), []
    for batch in images:
        words = ("SOLVER.IMS_PER_BATCH", str(batch))
        cfg = prepare(str(weights.parent / "config.yaml"), words, device="cpu")
        noise = measure_gradients(cfg, load_detector(cfg, weights), Progress()).get("noise", {})
        clean = noise.get("none", {})
        for kind, found in noise.items():
            if kind != "none" and found["boxes"]:
                rows.append(
                    {"run": weights.parent.name, "method": record.method, "seed": record.seed}
                    | {"data": record.dataset, "images": batch, "kind": kind}
                    | {name: found[name] / clean[name] for name in ("weight", "box_weight")}
                )
        print(weights.parent.name, batch, file=sys.stderr)
    return rows


def show(rows: list[dict]) -> None:
    """Print on stderr the mean ratio of each weight to a clean box's weight, over the seeds."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["data"], row["method"], row["kind"], row["images"]].append(row)
    for (data, method, kind, images), same in sorted(groups.items()):
        cls, box = (mean(row[name] for row in same) for name in ("weight", "box_weight"))
        print(
            f"{data} {method:34} {kind:6} {images:3} images: class {cls:.2f}, box {box:.2f} "
            f"({len(same)} seeds)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
