"""The cost of a detector: operations per image, and the time that its losses take."""

import copy
import statistics
import time
import warnings

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from ghm_d2.analysis.loss_inputs import (
    can_capture,
    capture,
    read_batches,
    training_copy,
    training_items,
)
from ghm_d2.data.loading.loaders import build_test_loader, raise_on_bad_image

_WARM_UP, _REPEATS = 3, 5  # fvcore's focal loss is compiled in its first runs


def measure(cfg, model: nn.Module) -> dict[str, float | None]:
    """Return `gflops` and `loss_ms` for a run's record; None if one cannot be measured.

    Raises:
        DataError: an image cannot be read.
    """
    return {"gflops": gflops(cfg, model), "loss_ms": loss_ms(cfg, model)}


def gflops(cfg, model: nn.Module) -> float | None:
    """Return `count_gflops` for the first image of DATASETS.TEST; None if it cannot be counted.

    Raises:
        DataError: the image cannot be read.
    """
    (item,) = raise_on_bad_image(next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0]))))
    try:
        return count_gflops(model, item["image"])
    except Exception:  # tracing a model can fail in any way
        return None


@torch.no_grad()
def count_gflops(model: nn.Module, image: torch.Tensor) -> float:
    """Return the billions of operations in a forward pass of `image`, (3, H, W).

    A multiplication with its addition counts as one operation, as in fvcore. Most operators other
    than convolutions and matrix products count as none. In two-stage detectors the number depends
    on how many proposals the image has.
    """
    model = copy.deepcopy(model).eval()  # tracing changes the model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = FlopCountAnalysis(model, [{"image": image}])
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return count.tracer_warnings("none").total() / 1e9


def loss_ms(cfg, model: nn.Module) -> float | None:
    """Return the milliseconds that the losses of one training batch take, forward and backward.

    The result is the median of five measurements, or None if `can_capture` rejects the model. A
    two-stage detector's losses are those of its box predictor. The backward pass ends at the
    predictions.

    Raises:
        DataError: an image cannot be read.
    """
    if not can_capture(model):
        return None
    model = training_copy(model)
    items = training_items(cfg, cfg.SOLVER.IMS_PER_BATCH)
    samples = capture(model, next(read_batches(cfg, items)))
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        logits = [x.detach().requires_grad_() for x in samples.logits]
        deltas = [x.detach().requires_grad_() for x in samples.deltas]
        _wait(model.device)
        start = time.perf_counter()
        sum(samples.losses(logits, deltas).values()).backward()
        _wait(model.device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[_WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
