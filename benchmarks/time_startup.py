"""Times the start of a training on a data set as large as train2017, in ghm_d2 and Detectron2.

    python benchmarks/time_startup.py make big
    python benchmarks/time_startup.py measure big --ranks 1 8

The first command writes a folder with 118,287 identical images and 860,001 annotations, 13 GB less
than COCO itself. The second loads it in 1 and in 8 processes at once, up to where batches could be
drawn: with Detectron2, with ghm_d2 and an empty cache, and with ghm_d2 again.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, ANNOTATIONS, SIDES = 118_287, 860_001, (640, 480)
# COCO's 80 ids from 1 to 90
CATEGORY_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
MOST_LINKS = 30_000  # to one file: file systems limit the number of hard links
WAYS = ("detectron2", "first", "later")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--images", type=int, default=IMAGES)
    make.set_defaults(run=lambda args: write(args.folder, args.images))
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--ranks", type=int, nargs="+", default=[1])
    measuring.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    measuring.set_defaults(run=lambda args: measure(args.folder, args.ranks, args.ways))
    args = parser.parse_args(words)
    args.run(args)


def write(folder: Path, images: int) -> None:
    """Write train.json, val.json (a hundredth of its size), and the folder of their images."""
    rng = np.random.default_rng(0)
    shapes = [_shape(rng) for _ in range(2000)]
    (folder / "images").mkdir(parents=True)
    count = round(ANNOTATIONS / IMAGES * images)
    _write_split(folder, "train", range(1, images + 1), count, shapes, rng)
    few = max(1, images // 100)
    _write_split(folder, "val", range(images + 1, images + 1 + few), 7 * few, shapes, rng)
    for first in range(1, images + few + 1, MOST_LINKS):
        original = folder / "images" / f"{first:012d}.jpg"
        Image.new("RGB", SIDES, (90, 120, 80)).save(original)
        for number in range(first + 1, min(first + MOST_LINKS, images + few + 1)):
            os.link(original, original.with_name(f"{number:012d}.jpg"))


def _write_split(folder, split, numbers, count, shapes, rng) -> None:
    about = {"license": 3, "height": SIDES[1], "width": SIDES[0], "date_captured": "2013-11-14"}
    about |= {"coco_url": "http://images.cocodataset.org/train2017/000000000000.jpg"}
    about |= {"flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg"}
    entries = ({"id": n, "file_name": f"{n:012d}.jpg"} | about for n in numbers)
    categories = [{"id": i, "name": f"class {i}"} for i in CATEGORY_IDS]
    rest = SIDES[0] * SIDES[1] - 28200
    crowd = {"size": [SIDES[1], SIDES[0]], "counts": [9000, *[30, 450] * 40, rest]}
    crowd = f'"segmentation":{json.dumps(crowd)},"area":1200.0,"bbox":[18,360,41,31],"iscrowd":1'
    which, images = rng.integers(len(shapes), size=count), rng.integers(len(numbers), size=count)
    with open(folder / f"{split}.json", "w") as file:
        file.write('{"info":{},"licenses":[],"images":[')
        file.write(",".join(map(json.dumps, entries)))
        file.write(f'],"categories":{json.dumps(categories)},"annotations":[')
        for i in range(count):
            category, image = categories[i % len(categories)]["id"], numbers[images[i]]
            what = crowd if i % 100 == 99 else f'{shapes[which[i]]},"iscrowd":0'
            file.write(",\n" if i else "")
            file.write(f'{{{what},"image_id":{image},"category_id":{category},"id":{i + 1}}}')
        file.write("]}")


def _shape(rng) -> str:
    """A polygon with COCO's number of points, its box and area, as text."""
    points = 4 + rng.geometric(1 / 22)
    low, size = rng.uniform(0, 300, 2), rng.uniform(4, 170, 2)
    corners = (low + size * rng.uniform(0, 1, (points, 2))).round(2)
    box = np.concatenate([corners.min(0), np.ptp(corners, 0)]).round(2).tolist()
    about = {"segmentation": [corners.flatten().tolist()], "area": box[2] * box[3] / 2, "bbox": box}
    return json.dumps(about)[1:-1]


def measure(folder: Path, ranks: list[int], ways: list[str]) -> None:
    """Print a row for each way and number of processes, as Markdown."""
    print("| Processes | Way | s | CPU s a process | Peak RSS a process, MB | PSS in all, MB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    cache = tempfile.mkdtemp()
    for count in ranks:
        for way in ways:
            if way == "first":
                shutil.rmtree(cache, ignore_errors=True)
            rows = _together(count, way, folder, cache)
            most = [max(row[key] for row in rows) for key in ("seconds", "cpu", "peak")]
            figures = [f"{most[0]:.1f}", f"{most[1]:.1f}", f"{most[2]:.0f}"]
            figures.append(f"{sum(row['pss'] for row in rows):.0f}")
            print(f"| {count} | {way} | {' | '.join(figures)} |", flush=True)
    shutil.rmtree(cache, ignore_errors=True)


def _together(count: int, way: str, folder: Path, cache: str) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    arguments = (way, folder.resolve(), cache, barrier, results)
    processes = [context.Process(target=_rank, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    rows = [results.get(timeout=1800) for _ in processes]
    for process in processes:
        process.join()
    return rows


def _rank(way: str, folder: Path, cache: str, barrier, results) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    load = _detectron2(folder) if way == "detectron2" else _ghm(folder)
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    held = load()
    row = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    barrier.wait()
    status = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    figures = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    row |= {k: int(figures[f].split()[0]) / 1024 for k, f in (("peak", "VmHWM"), ("pss", "Pss"))}
    barrier.wait()
    results.put(row)
    del held


def _detectron2(folder: Path):
    from detectron2.data import DatasetFromList, get_detection_dataset_dicts
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("big", {}, str(folder / "train.json"), str(folder / "images"))
    return lambda: DatasetFromList(get_detection_dataset_dicts("big"))


def _ghm(folder: Path):
    from ghm_d2.data.loading.loaders import build_train_loader
    from ghm_d2.training.prepare import prepare

    def load():
        overrides = ["SOLVER.IMS_PER_BATCH", "16", "DATALOADER.NUM_WORKERS", "0"]
        cfg = prepare("coco/retinanet_R_50_FPN_ghm_1x.yaml", overrides, dataset=str(folder))
        return build_train_loader(cfg)

    return load


if __name__ == "__main__":
    sys.exit(main())
