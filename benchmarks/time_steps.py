"""Times whole training steps of a RetinaNet with each choice of losses.

    python benchmarks/time_steps.py --output steps.json
    python benchmarks/time_steps.py --config coco/retinanet_R_50_FPN_1x.yaml --images 16 \
        --size 800 1333 --amp float16
    torchrun --standalone benchmarks/time_steps.py --sides GHM-C+GHM-R

The sides differ only in their losses. All start with random weights from the same seed, and take
the same random images in turn. A step is the trainer's own: copying the batch to the device,
forward, backward, clipping, optimizer; no loading, evaluation or schedule. Under torchrun, even
with a single process, the model is in DistributedDataParallel. A batch that does not fit into the
GPU's memory is halved until it fits.
"""

import argparse
import gc
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from measure import environment, figures, measure_in_turn, peak_bytes, write_result

from ghm_d2.config import load_config
from ghm_d2.register import register_all
from ghm_d2.training.distributed import process_group
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.trainer import GHMTrainer

ARCH = "MODEL.META_ARCHITECTURE"
CLS, REG = "MODEL.RETINANET.CLS_LOSS_TYPE", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE"
SIDES = {
    "CE+SL1": (CLS, "ce", REG, "smooth_l1"),
    "Detectron2 focal+SL1": (ARCH, "RetinaNet", CLS, "focal", REG, "smooth_l1"),  # its own class
    "focal+SL1": (CLS, "focal", REG, "smooth_l1"),
    "GHM-C+SL1": (CLS, "ghm_c", REG, "smooth_l1"),
    "GHM-C+GHM-R": (CLS, "ghm_c", REG, "ghm_r"),
}
# Nothing is downloaded, as weights are random. The learning rate is so small that no step diverges.
# Pixels of unit variance keep float16 activations finite where batch norm is frozen.
FIXED = ("SOLVER.BASE_LR", "1e-9", "MODEL.PIXEL_STD", "(58.0, 58.0, 58.0)", "SEED", "0")
OBJECTS = 7  # per image, as in COCO


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quick/retinanet_ghm.yaml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=4, help="images per batch")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("H", "W"))
    parser.add_argument(
        "--amp", choices=("float16", "bfloat16"), help="autocast dtype; default: float32"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=20, help="timed steps per side")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: stdout")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    return parser.parse_args(words)


def benchmark(args: argparse.Namespace) -> dict:
    """The results, ready for JSON; "images" is the batch that fitted."""
    register_all()
    images = args.images
    while True:
        try:
            results = _measure(args, images)
            break
        except torch.OutOfMemoryError:
            if images == 1:
                raise
        images //= 2
        gc.collect()  # frees the models of the failed try
        torch.cuda.empty_cache()
    return {
        "what": "steps",
        "config": args.config,
        "device": args.device,
        "amp": args.amp,
        "images_wanted": args.images,
        "images": images,
        "size": list(args.size),
        "distributed": f"{dist.get_backend()}, 1 process" if dist.is_initialized() else None,
        **environment(torch.device(args.device)),
        "results": results,
    }


def _measure(args, images: int) -> list[dict]:
    trainers = {name: make_trainer(args, images, name) for name in args.sides}
    runs = {name: lambda trainer=trainer: step(trainer) for name, trainer in trainers.items()}
    for run in runs.values():
        run()  # an optimizer makes its state in the first step
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    memory = {name: peak_bytes(run, device) if on_gpu else None for name, run in runs.items()}
    times = measure_in_turn(runs, args.steps)
    return [
        {
            "name": name,
            "overrides": list(SIDES[name]),
            **figures(times[name]),
            "images_per_second": images / times[name].median,
            "memory_bytes": memory[name],  # a step's peak, above weights and optimizer
            "last_losses": {k: v.latest() for k, v in trainers[name].storage.histories().items()},
        }
        for name in args.sides
    ]


def make_trainer(args, images: int, side: str) -> GHMTrainer:
    """A trainer with random weights and images; `step` makes a step with it."""
    overrides = [*FIXED, ARCH, "GHMRetinaNet", *SIDES[side], "MODEL.DEVICE", args.device]
    if args.amp:
        overrides += ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", args.amp]
    cfg = load_config(args.config, [*overrides, *args.overrides])
    torch.manual_seed(0)
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = ""
    model = build_model(cfg).train()
    batches = [make_batch(images, *args.size, cfg.MODEL.RETINANET.NUM_CLASSES) for _ in range(2)]
    trainer = GHMTrainer(cfg, model, itertools.cycle(batches), build_optimizer(cfg, model))
    if dist.is_initialized():  # with one process the trainer would not wrap it
        wrap = torch.nn.parallel.DistributedDataParallel
        trainer.model = wrap(model, broadcast_buffers=False)
    # at 0, and multiples of 20, Detectron2 logs the foreground, for which it waits
    trainer.iter, trainer.storage = 0, EventStorage(1)
    return trainer


def make_batch(images: int, height: int, width: int, classes: int) -> list[dict]:
    """Random pictures with random boxes, in Detectron2's format."""
    batch = []
    for _ in range(images):
        corner = torch.rand(OBJECTS, 2) * torch.tensor([width, height]) * 0.7
        side = (torch.rand(OBJECTS, 2) * 0.25 + 0.02) * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], 1))
        instances.gt_classes = torch.randint(classes, (OBJECTS,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def step(trainer: GHMTrainer) -> None:
    """One training step.

    Raises:
        DivergedError: a loss is NaN or infinite.
    """
    with trainer.storage:
        trainer.run_step()


def show(result: dict) -> None:
    """Print a table on stderr."""
    for row in result["results"]:
        line = (
            f"{row['name']:22} {1000 * row['median']:9.1f} ms a step (IQR {1000 * row['iqr']:.1f})"
        )
        memory = f", {row['memory_bytes'] / 2**30:.1f} GiB" if row["memory_bytes"] else ""
        print(f"{line}, {row['images_per_second']:.1f} images/s{memory}", file=sys.stderr)


if __name__ == "__main__":
    arguments = parse_args()
    with process_group(arguments.device):
        found = benchmark(arguments)
        show(found)
        write_result(found, arguments.output)
