"""Compares an exported detector with the model that it was made from."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor

from ghm_d2.data.catalog import apply_to_config
from ghm_d2.data.loading.loaders import build_test_loader, raise_on_bad_image
from ghm_d2.errors import DataError, UsageError
from ghm_d2.inference.exporting.export import detections_of, example_size
from ghm_d2.progress import Progress

Detections = tuple[Tensor, Tensor, Tensor]  # boxes (n, 4), scores (n,), classes (n,)
AT_ONCE = 3  # images per call of a file for a batch; the trace saw two


@dataclass(frozen=True)
class Tolerance:
    """The largest differences from PyTorch that a file's detections may have."""

    px: float
    score: float
    left_out: float  # share of the detections, those that differ most, that is ignored


def tolerance_of(model, half: bool = False) -> Tolerance:
    """Return limits far above rounding errors and far below what matters for a detection.

    Rounding decides which of two boxes with nearly the same score NMS keeps. In float32 that
    happens only to the many proposals of two-stage detectors.
    """
    if half:
        return Tolerance(px=1.0, score=0.01, left_out=0.05)
    return Tolerance(0.1, 1e-3, left_out=0.02 if isinstance(model, GeneralizedRCNN) else 0.0)


@dataclass
class Agreement:
    """The largest differences from PyTorch, in px and in score, over the detections of all images.

    They are infinite if a detection has no counterpart. Detections at the threshold or at the end
    of a full list do not count. Among the others, the share `tolerance.left_out` that differs most
    is ignored too.
    """

    images: int
    detections: int  # of PyTorch
    compared: int  # of these, those above the threshold and the end of a full list
    px: float
    score: float
    tolerance: Tolerance

    @property
    def holds(self) -> bool | None:
        """True if only rounding separates the two; None if nothing was compared."""
        if not self.compared and not self.px:  # px is infinite if only the file has detections
            return None
        return self.px <= self.tolerance.px and self.score <= self.tolerance.score


def can_run(form: str) -> bool:
    """Return whether a runtime for files of this format is installed."""
    return form != "onnx" or find_spec("onnxruntime") is not None


def load_exported(data: bytes, form: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function that runs the file on the CPU, from its float32 input to its outputs."""
    if form == "torchscript":
        import torchvision  # noqa: F401  registers the operator nms

        return torch.jit.load(io.BytesIO(data), map_location="cpu")
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    name = session.get_inputs()[0].name

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(x) for x in session.run(None, {name: images.numpy()}))

    return run


def check_images(cfg, count: int) -> tuple[str, list[Tensor]]:
    """Return the images' source, and `count` resized images (3, H, W), float32, 0 to 255.

    They are the first images of DATASETS.TEST, or noise of several sizes if there is no such data.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    try:
        apply_to_config(cfg, need_train=False)
        name = cfg.DATASETS.TEST[0]
        batches = islice(build_test_loader(cfg, name), count)
        return name, [raise_on_bad_image(batch)[0]["image"].float() for batch in batches]
    except (UsageError, DataError, OSError):  # Detectron2's loaders raise OSError
        return "noise", noise(cfg, count)


def noise(cfg, count: int) -> list[Tensor]:
    """Return random images (3, H, W), float32; all of one size if INPUT.RESIZE is "square"."""
    generator = torch.Generator().manual_seed(0)
    height, width = example_size(cfg)
    step = 0 if cfg.INPUT.RESIZE == "square" else 17
    sizes = [(height, width + step * (i % 8)) for i in range(count)]
    return [torch.randint(0, 256, (3, *size), generator=generator).float() for size in sizes]


@torch.no_grad()
def compare(
    model,
    run: Callable[[Tensor], tuple[Tensor, ...]],
    images: Sequence[Tensor],
    progress: Progress,
    *,
    batch: bool = False,
    half: bool = False,
) -> Agreement:
    """Compare `run` with `model`, in evaluation mode, on images (3, H, W), float32.

    `batch` and `half` are as in `export`; for a batch, images are padded to one size.
    """
    total, compared, apart = 0, 0, []
    tolerance, (most, threshold) = tolerance_of(model, half), limits(model)
    images = _one_size(images, model.pixel_mean) if batch else images
    found_by_file = _in_batches(run, images) if batch else map(run, images)
    for image in progress.track(images, "checking", len(images)):
        expected, found = detections_of(model, image)[:3], next(found_by_file)[:3]
        full = [s.min().item() for _, s, _ in (expected, found) if 0 < most <= len(s)]
        least = max([threshold, *full]) + tolerance.score
        apart.append(_distances(expected, found, least))
        total += len(expected[1])
        compared += int((expected[1] > least).sum())
    largest = _largest(torch.cat(apart), tolerance.left_out)
    return Agreement(len(images), total, compared, *largest, tolerance)


def _one_size(images: Sequence[Tensor], pixel_mean: Tensor) -> list[Tensor]:
    """Pad images (3, H, W) to one size, with `pixel_mean` at the right and at the bottom."""
    size = [max(image.shape[i] for image in images) for i in (1, 2)]
    padded = [pixel_mean.to(image).reshape(3, 1, 1).repeat(1, *size) for image in images]
    for whole, image in zip(padded, images, strict=True):
        whole[:, : image.shape[1], : image.shape[2]] = image
    return padded


def _in_batches(run: Callable, images: Sequence[Tensor]) -> Iterator[Detections]:
    """Yield each image's detections, without padding, from a file for a batch."""
    for start in range(0, len(images), AT_ONCE):
        for *padded, count in zip(*run(torch.stack(images[start : start + AT_ONCE])), strict=True):
            yield tuple(x[:count] for x in padded)


def limits(model) -> tuple[int, float]:
    """Return the most detections per image, and the least score of a detection."""
    if isinstance(model, GeneralizedRCNN):
        predictor = model.roi_heads.box_predictor
        return predictor.test_topk_per_image, predictor.test_score_thresh
    return model.max_detections_per_image, model.test_score_thresh


def _distances(expected: Detections, found: Detections, least: float) -> Tensor:
    """Return (n, 2): the distances in px and in score of each detection to its counterpart.

    The counterpart is the nearest detection of its class on the other side; without one the
    distance is infinite. The order is ignored, since rounding decides that of equal scores. A
    detection counts if its score is above `least`.
    """
    px = (expected[0][:, None] - found[0]).abs().amax(-1)
    score = (expected[1][:, None] - found[1]).abs()
    other = expected[2][:, None] != found[2]
    px, score = px.masked_fill(other, math.inf), score.masked_fill(other, math.inf)
    rows = [px.new_zeros(0, 2)]
    for here, x, y in (expected, px, score), (found, px.T, score.T):
        counts = here[1] > least
        if not x.shape[1]:
            rows.append(px.new_full((int(counts.sum()), 2), math.inf))
            continue
        nearest = torch.maximum(x, y)[counts].argmin(1, keepdim=True)
        rows.append(torch.cat([z[counts].gather(1, nearest) for z in (x, y)], dim=1))
    return torch.cat(rows)


def _largest(distances: Tensor, left_out: float = 0.0) -> tuple[float, float]:
    """Return the largest px and score, without the share `left_out` that differs most."""
    if not len(distances):
        return 0.0, 0.0
    order = distances.amax(1).argsort()
    kept = distances[order[: len(order) - int(left_out * len(order))]]
    return kept[:, 0].max().item(), kept[:, 1].max().item()
