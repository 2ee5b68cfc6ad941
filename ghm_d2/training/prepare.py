"""The one way from a configuration's name and a data set to a checked, resolved `cfg`."""

import random
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from torch import nn

from ghm_d2.config import check_config, check_detectron2_keys, load_config
from ghm_d2.data.catalog import apply_to_config, validate
from ghm_d2.data.class_weights import fill_class_weights
from ghm_d2.data.registered import has_annotations
from ghm_d2.errors import DataError, UsageError
from ghm_d2.training.distributed import same_for_all

_COMPILED = ("backbone", "head")  # the parts of a detector that MODEL.COMPILE compiles


def prepare(
    source: str,
    overrides: Sequence[str] = (),
    *,
    dataset: str | None = None,
    device: str = "auto",
    seed: int | None = None,
    output: Path | None = None,
    resume: bool = False,
) -> CfgNode:
    """Return a `cfg` ready for training in one process; `scale_to_group` adapts it to several.

    The data sets are registered and checked, they determine the number of classes, and a seed is
    chosen. All ranks of a group call this function and get the same result.

    Args:
        source: a YAML file, or the name of a shipped configuration.
        overrides: KEY, VALUE, KEY, VALUE, ...
        dataset: as for `apply_to_config`; None takes DATASETS.TRAIN and DATASETS.TEST.
        device: as for `pick_device`.
        seed: None keeps SEED, or draws one if SEED is negative.
        output: OUTPUT_DIR; None keeps the configured folder.
        resume: True if `source` is the configuration of a run to resume; the data must still have
            its classes.

    Raises:
        UsageError: an unknown key, a value out of range, or an unknown data set or device.
        DataError: the data sets cannot be used.
    """
    cfg = prepare_detector(source, overrides, device)
    if output is not None:
        cfg.OUTPUT_DIR = str(output)
    if seed is not None:
        cfg.SEED = seed
    check_config(cfg)
    classes = tuple(cfg.DATASETS.CLASS_NAMES)
    apply_to_config(cfg, dataset)
    fill_class_weights(cfg)
    if resume and tuple(cfg.DATASETS.CLASS_NAMES) != classes:
        data = dataset or cfg.DATASETS.TRAIN[0]
        raise DataError(
            f"{data} has other classes than the run to resume; use the run's data set, or start a "
            "new run"
        )
    for name in cfg.DATASETS.TRAIN:
        validate(name, "training")
    _prepare_tests(cfg)
    choose_seed(cfg)
    return cfg


def prepare_evaluation(
    source: str,
    overrides: Sequence[str] = (),
    *,
    dataset: str | None = None,
    device: str = "auto",
) -> CfgNode:
    """Return a `cfg` for evaluating a trained detector; DATASETS.TEST is registered and checked.

    The training data need not exist, and keys that only a training reads are not checked.

    Arguments and errors are those of `prepare`.
    """
    cfg = prepare_detector(source, overrides, device)
    apply_to_config(cfg, dataset, need_train=False)
    _prepare_tests(cfg)
    return cfg


def _prepare_tests(cfg) -> None:
    """Check DATASETS.TEST, and move the data sets with annotations to its front.

    The record shows the AP on the first data set, which also decides which weights are the best.
    """
    names = cfg.DATASETS.TEST
    for name in names:
        validate(name, "evaluation")
    if len(names) > 1:
        cfg.DATASETS.TEST = tuple(sorted(names, key=lambda name: not has_annotations(name)))


def prepare_detector(source: str, overrides: Sequence[str] = (), device: str = "auto") -> CfgNode:
    """Return a `cfg` for a trained detector that needs no data set, as in `ghm predict`.

    Arguments and errors are those of `prepare`.
    """
    cfg = load_config(source, overrides)
    check_detectron2_keys(cfg)
    cfg.MODEL.DEVICE = pick_device(device)
    return cfg


def pick_device(device: str) -> str:
    """Return the torch device for `device`: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: the device is unknown or not available.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no CUDA device; use --device auto, or see `ghm doctor`")
    count = torch.cuda.device_count()
    if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= count:
        raise UsageError(f"--device {device}: the last GPU of this machine is cuda:{count - 1}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("PyTorch finds no MPS device; use --device auto, or see `ghm doctor`")
    return device


def choose_seed(cfg) -> None:
    """Replace a negative SEED, which means any seed, by a random one, so that it is on record.

    All ranks get the same seed.
    """
    if cfg.SEED < 0:
        cfg.SEED = same_for_all(random.SystemRandom().randrange(2**31))


def scale_to_group(cfg, resume: bool = False) -> tuple[CfgNode, str]:
    """Return `cfg` scaled to the number of processes, and a note for the log ("" for no note).

    With SOLVER.REFERENCE_WORLD_SIZE set, Detectron2 scales batch, learning rate and schedule.
    Without it, and in a resumed run, nothing is scaled.

    Raises:
        UsageError: the batch cannot be divided among the ranks and SOLVER.ACCUMULATE.
    """
    world, before = comm.get_world_size(), cfg.SOLVER
    if not resume:
        with config_errors():
            cfg = DefaultTrainer.auto_scale_workers(cfg, world)
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH % (world * solver.ACCUMULATE):
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of the number of "
            f"processes ({world}) times SOLVER.ACCUMULATE ({solver.ACCUMULATE})"
        )
    return cfg, _scaling_note(before, solver, world)


def _scaling_note(before, after, world: int) -> str:
    shared = f"{world} processes share each batch of {after.IMS_PER_BATCH}; " if world > 1 else ""
    if after is before:
        return shared and f"{shared}BASE_LR {after.BASE_LR:g} is not scaled"
    return shared + (
        f"scaled from SOLVER.REFERENCE_WORLD_SIZE {before.REFERENCE_WORLD_SIZE} to {world}: "
        f"{batch_changes(before, after)}"
    )


def batch_changes(before, after) -> str:
    """Describe for the log how batch, learning rate and schedule of a SOLVER node were scaled."""
    return (
        f"IMS_PER_BATCH {before.IMS_PER_BATCH} -> {after.IMS_PER_BATCH}, BASE_LR "
        f"{before.BASE_LR:g} -> {after.BASE_LR:.3g}, MAX_ITER {before.MAX_ITER} -> {after.MAX_ITER}"
    )


def speed_up(model: nn.Module, cfg) -> nn.Module:
    """Use channels_last memory on a CPU, and compile backbone and head under MODEL.COMPILE.

    The names and values of the weights do not change.
    """
    if cfg.MODEL.DEVICE == "cpu":
        model.to(memory_format=torch.channels_last)  # a step takes a quarter less time
    if cfg.MODEL.COMPILE:
        for name in _COMPILED:
            if (part := getattr(model, name, None)) is not None:
                # one graph for all image sizes, so that a resumed run computes the same
                part.compile(dynamic=True)
    return model


@contextmanager
def config_errors():
    """Turn Detectron2's errors about a configuration into this project's.

    Raises:
        UsageError: the configuration cannot be built.
        DataError: a file that it needs does not exist.
    """
    try:
        yield
    except (KeyError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(f"the configuration is invalid: {_reason(error)}") from error
    except FileNotFoundError as error:
        raise DataError(f"no such file: {error.filename}") from None


def _reason(error: Exception) -> str:
    """Return the first line of the message; a KeyError of a dict has only the key."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    line = text.partition("\n")[0]
    only_a_key = isinstance(error, KeyError) and " " not in line
    return f"the name {line!r} is not known" if only_a_key else line
