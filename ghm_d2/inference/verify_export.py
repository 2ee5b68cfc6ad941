"""An exported detector beside the one it was made from."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor

from ghm_d2.data.catalog import apply_to_config
from ghm_d2.data.loaders import build_test_loader, raise_on_bad_image
from ghm_d2.errors import DataError, UsageError
from ghm_d2.inference.export import INPUT, detections_of, example_size
from ghm_d2.progress import Progress

Detections = tuple[Tensor, Tensor, Tensor]  # boxes (n, 4), scores (n,), classes (n,)
# Rounding stays far below these, and what matters to a detection is far above them
MOST_PX, MOST_SCORE = 0.1, 1e-3
# share of a two-stage detector's detections: rounding decides which of two proposals NMS keeps
LEFT_OUT = 0.02


@dataclass
class Agreement:
    """The largest differences from PyTorch, over the detections of all images.

    See `differences`; those of detections at the threshold, or at the end of a full list, are left
    out, and of two-stage detectors the LEFT_OUT that differ most.
    """

    images: int
    detections: int  # of PyTorch
    compared: int  # of these, those that are not left out
    px: float
    score: float

    @property
    def holds(self) -> bool | None:
        """Whether nothing but rounding sets the two apart; None where nothing was compared."""
        if not self.compared and not self.px:  # px is infinite where the file alone has some
            return None
        return self.px <= MOST_PX and self.score <= MOST_SCORE


def can_run(form: str) -> bool:
    """Whether what runs files of this format is installed."""
    return form != "onnx" or find_spec("onnxruntime") is not None


def load_exported(data: bytes, form: str) -> Callable[[Tensor], Detections]:
    """A function from an image (3, H, W), float32, to detections, that runs the file on the CPU."""
    if form == "torchscript":
        import torchvision  # noqa: F401  the operator nms is its

        return torch.jit.load(io.BytesIO(data), map_location="cpu")
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Detections:
        return tuple(torch.from_numpy(x) for x in session.run(None, {INPUT: image.numpy()}))

    return run


def check_images(cfg, count: int) -> tuple[str, list[Tensor]]:
    """Where they come from, and `count` images (3, H, W) of 0 to 255, resized, float32.

    They are the first ones of DATASETS.TEST; noise of several sizes where there is no such data.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    try:
        apply_to_config(cfg, need_train=False)
        name = cfg.DATASETS.TEST[0]
        batches = islice(build_test_loader(cfg, name), count)
        return name, [raise_on_bad_image(batch)[0]["image"].float() for batch in batches]
    except (UsageError, DataError, OSError):  # Detectron2's loaders let the last one through
        return "noise", noise(cfg, count)


def noise(cfg, count: int) -> list[Tensor]:
    """Images (3, H, W), float32; all of one size where INPUT.RESIZE is "square"."""
    generator = torch.Generator().manual_seed(0)
    height, width = example_size(cfg)
    step = 0 if cfg.INPUT.RESIZE == "square" else 17
    sizes = [(height, width + step * (i % 8)) for i in range(count)]
    return [torch.randint(0, 256, (3, *size), generator=generator).float() for size in sizes]


@torch.no_grad()
def compare(
    model, run: Callable[[Tensor], Detections], images: Sequence[Tensor], progress: Progress
) -> Agreement:
    """How far `run` is from `model`, which is in evaluation mode, on images (3, H, W), float32."""
    total, compared, apart = 0, 0, []
    most, threshold = limits(model)
    for image in progress.track(images, "checking", len(images)):
        expected, found = detections_of(model, image)[:3], run(image)[:3]
        full = [s.min().item() for _, s, _ in (expected, found) if 0 < most <= len(s)]
        least = max([threshold, *full])
        apart.append(_distances(expected, found, least))
        total += len(expected[1])
        compared += int(_counts(expected, least).sum())
    left_out = LEFT_OUT if isinstance(model, GeneralizedRCNN) else 0.0
    return Agreement(len(images), total, compared, *_largest(torch.cat(apart), left_out))


def limits(model) -> tuple[int, float]:
    """The most detections of an image, and the least score of one."""
    if isinstance(model, GeneralizedRCNN):
        predictor = model.roi_heads.box_predictor
        return predictor.test_topk_per_image, predictor.test_score_thresh
    return model.max_detections_per_image, model.test_score_thresh


def differences(
    expected: Detections, found: Detections, least: float = -math.inf
) -> tuple[float, float]:
    """Of boxes in px and of scores, the largest between a detection and the nearest of its class.

    Infinite where a detection has no such counterpart. The order does not count: that of equal
    scores is rounding; and so is which side has a detection whose score is within MOST_SCORE of
    `least`, the score from which detections are given out.
    """
    return _largest(_distances(expected, found, least))


def _distances(expected: Detections, found: Detections, least: float) -> Tensor:
    """(n, 2): of each detection of either side that counts, px and score to the nearest."""
    px = (expected[0][:, None] - found[0]).abs().amax(-1)
    score = (expected[1][:, None] - found[1]).abs()
    other = expected[2][:, None] != found[2]
    px, score = px.masked_fill(other, math.inf), score.masked_fill(other, math.inf)
    rows = [px.new_zeros(0, 2)]
    for here, x, y in (expected, px, score), (found, px.T, score.T):
        counts = _counts(here, least)
        if not x.shape[1]:
            rows.append(px.new_full((int(counts.sum()), 2), math.inf))
            continue
        nearest = torch.maximum(x, y)[counts].argmin(1, keepdim=True)
        rows.append(torch.cat([z[counts].gather(1, nearest) for z in (x, y)], dim=1))
    return torch.cat(rows)


def _largest(distances: Tensor, left_out: float = 0.0) -> tuple[float, float]:
    """The largest px and score of all but a share of the detections."""
    if not len(distances):
        return 0.0, 0.0
    order = distances.amax(1).argsort()
    kept = distances[order[: len(order) - int(left_out * len(order))]]
    return kept[:, 0].max().item(), kept[:, 1].max().item()


def _counts(detections: Detections, least: float) -> Tensor:
    """(n,) bool: which are not where rounding decides whether they are given out."""
    return detections[1] > least + MOST_SCORE
