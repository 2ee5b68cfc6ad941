"""The description of a run for its record: method, network, versions, memory."""

import json
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ghm_d2 import __version__
from ghm_d2.config import config_hash, get_cfg, plain_config
from ghm_d2.config.detectors import TWO_STAGE, detector_name, loss_keys
from ghm_d2.config.renamed import use_first_names
from ghm_d2.records import RunRecord, Schedule

PACKAGES = ("torch", "torchvision", "detectron2", "fvcore", "faster-coco-eval", "timm", "numpy")
CLS_NAMES = {
    "focal": "focal",
    "ce": "CE",
    "ohem": "OHEM",
    "qfl": "QFL",
    "vfl": "VFL",
    "mining": "mining",
    "ghm_c": "GHM-C",
}
REG_NAMES = {
    "smooth_l1": "SL1",
    "l2": "L2",
    "giou": "GIoU",
    "diou": "DIoU",
    "ciou": "CIoU",
    "asl1": "ASL1",
    "ghm_r": "GHM-R",
}


def describe_run(cfg, model: nn.Module, dataset: str) -> RunRecord:
    """Return a record with everything that is known before the run starts."""
    return RunRecord(
        method=method_name(cfg),
        network=network_name(cfg),
        dataset=dataset,
        config_hash=experiment_hash(cfg),
        seed=cfg.SEED,
        device=device_name(cfg.MODEL.DEVICE),
        code_version=code_version(),
        packages=versions(),
        parameters=sum(p.numel() for p in model.parameters()),
        schedule=schedule_of(cfg),
    )


def schedule_of(cfg) -> Schedule:
    """Return the schedule in SOLVER and INPUT; `decay` is empty without learning rate steps."""
    solver = cfg.SOLVER
    by_steps = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER] if by_steps else []
    sizes = [int(size) for size in cfg.INPUT.MIN_SIZE_TRAIN]
    return Schedule(solver.MAX_ITER, solver.IMS_PER_BATCH, steps, sizes)


def experiment_hash(cfg) -> str:
    """Return a short hash that names the experiment.

    Folder, seed, data sets, device, weights, trackers and kept checkpoints do not count. Only keys
    that differ from their defaults do, so a key added later, with the old behaviour as its default,
    changes no hash. Nor does a renamed class or a key of a GHM loss that the detector does not use.
    """
    plain = plain_config(cfg)
    use_first_names(plain)
    for key in ("OUTPUT_DIR", "SEED", "DATASETS"):
        del plain[key]
    del plain["MODEL"]["DEVICE"], plain["MODEL"]["WEIGHTS"]
    del plain["SOLVER"]["TRACKERS"], plain["SOLVER"]["CHECKPOINTS_KEPT"]
    _drop_unused(plain["MODEL"]["GHM"], cfg)
    return config_hash(json.dumps(_changed(plain, plain_config(get_cfg())), sort_keys=True))


def _drop_unused(ghm: dict, cfg) -> None:
    """Drop the keys of MODEL.GHM that the detector's losses do not read; SYNC and KERNEL stay."""
    keys = loss_keys(cfg)
    if keys is None:
        return
    uses_c, uses_r = _uses_ghm_c(cfg), keys.BBOX_REG_LOSS_TYPE == "ghm_r"
    if not uses_c:
        del ghm["CLS"]
    if not uses_r:
        ghm["REG"] = {"MU": ghm["REG"]["MU"]} if keys.BBOX_REG_LOSS_TYPE == "asl1" else {}
    if not (uses_c or uses_r):
        del ghm["SCOPE"], ghm["NORMALIZER"], ghm["EMA_INIT"]


def _uses_ghm_c(cfg) -> bool:
    """Return whether a classifier of the detector, including objectness, has GHM-C."""
    types = [loss_keys(cfg).CLS_LOSS_TYPE]
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        types.append(cfg.MODEL.RPN.CLS_LOSS_TYPE)
    if cfg.MODEL.META_ARCHITECTURE == "GHMYOLOv3":
        types.append(cfg.MODEL.YOLOV3.OBJ_LOSS_TYPE)
    return "ghm_c" in types


def _changed(values: dict, defaults: dict) -> dict:
    changed = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _changed(value, default), {}
        if value != default:
            changed[key] = value
    return changed


def method_name(cfg) -> str:
    """Return the detector and its losses, such as "RetinaNet GHM-C + GHM-R (robust)"."""
    name, keys = detector_name(cfg), loss_keys(cfg)
    if keys is None:
        return name
    reg = REG_NAMES.get(keys.BBOX_REG_LOSS_TYPE, keys.BBOX_REG_LOSS_TYPE)
    cls = CLS_NAMES.get(keys.CLS_LOSS_TYPE, keys.CLS_LOSS_TYPE)
    name += " (ATSS)" if keys.get("ASSIGNMENT") == "atss" else ""
    weighted = "class-weighted " if cfg.MODEL.CLASS_WEIGHTING else ""
    return f"{name} {weighted}{cls} + {reg}{_other_loss(cfg)}{_form(cfg)}"


def _form(cfg) -> str:
    """Return " (robust)", with the loss's name if only one of two is robust; "" if none is."""
    ghm = cfg.MODEL.GHM
    robust = []  # (GHM loss in use, whether it is robust)
    if _uses_ghm_c(cfg):
        robust.append(("GHM-C", ghm.CLS.PRIOR > 0))
    if loss_keys(cfg).BBOX_REG_LOSS_TYPE == "ghm_r":
        robust.append(("GHM-R", ghm.REG.PRIOR > 0 or ghm.REG.MU_QUANTILE > 0))
    names = [name for name, is_robust in robust if is_robust]
    if not names:
        return ""
    return " (robust)" if len(names) == len(robust) else f" (robust {names[0]})"


def _other_loss(cfg) -> str:
    """Name the loss of the detector's other classifier if it differs from the first one's."""
    model = cfg.MODEL
    if model.META_ARCHITECTURE == TWO_STAGE and model.RPN.CLS_LOSS_TYPE == "ghm_c":
        return ", RPN GHM-C"
    yolo = model.YOLOV3
    if model.META_ARCHITECTURE == "GHMYOLOv3" and yolo.OBJ_LOSS_TYPE != yolo.CLS_LOSS_TYPE:
        return f", objectness {CLS_NAMES.get(yolo.OBJ_LOSS_TYPE, yolo.OBJ_LOSS_TYPE)}"
    return ""


def network_name(cfg) -> str:
    """Return the network's name, such as "ResNeXt-101-32x8d-FPN"."""
    backbone = cfg.MODEL.BACKBONE.NAME
    if "darknet" in backbone:
        # two convolutions per block, one more per stage, the stem and the classifier
        depths = cfg.MODEL.DARKNET.DEPTHS
        return f"DarkNet-{2 * sum(depths) + len(depths) + 2}"
    fpn = "-FPN" if "fpn" in backbone else ""
    if "timm" in backbone:
        return cfg.MODEL.TIMM.NAME + fpn
    if "resnet" not in backbone:
        return backbone
    resnet = cfg.MODEL.RESNETS
    if resnet.NUM_GROUPS == 1:
        return f"ResNet-{resnet.DEPTH}{fpn}"
    return f"ResNeXt-{resnet.DEPTH}-{resnet.NUM_GROUPS}x{resnet.WIDTH_PER_GROUP}d{fpn}"


def peak_memory_mb(device: str) -> float:
    """Return the peak memory in MiB of the GPU, or of the process (resident set) on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:  # Linux, where getrusage includes the parent process's peak
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def code_version() -> str:
    """Return the version and, in a checkout of the project, the commit."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{found.stdout.strip()}"


def device_name(device: str) -> str:
    """Return the device's name: the GPU model, or the CPU architecture and number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of the packages that results depend on, and of `more`."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
