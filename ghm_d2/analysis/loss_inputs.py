"""The inputs of a detector's losses: its predictions on training images, and their targets."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ghm_d2.data.digits.noise import KINDS
from ghm_d2.data.loading.loaders import GHMDatasetMapper, raise_on_bad_image
from ghm_d2.kernels import reference
from ghm_d2.kernels.dtypes import upcast
from ghm_d2.losses import GHMR, GradientDensity, bce_loss, softmax_ce_loss
from ghm_d2.modeling.dssd.ssd import GHMSSD

# Kinds of wrong annotations; a missing one cannot have a label
NOISE_LABELS = ("none", *(kind for kind in KINDS if kind != "missing"))
# Modules whose `training` decides what they return; all others stay in evaluation mode
_SWITCHES = (DenseDetector, GeneralizedRCNN, RPN, ROIHeads, BaseMaskRCNNHead, BaseKeypointRCNNHead)


@dataclass
class LossInputs:
    """The samples of one batch. A row is an anchor (one-stage) or a sampled proposal.

    Attributes:
        logits: one-stage: for each feature level (N, R_l, K) with sigmoids, or (N, R_l, K + 1) with
            a softmax (SSD). Two-stage: a single (R, K + 1) with a softmax.
        deltas: predicted boxes. One-stage: (N, R_l, 4) for each level. Two-stage: (R, 4 * K) or
            (R, 4).
        labels: (rows,) int64; a class, K background, -1 ignored.
        errors: (F, 4), predicted minus target deltas of the F foreground rows.
        noise: (F,) int64, index in NOISE_LABELS: the noise of the box that a row was matched to.
        losses: returns the detector's own `loss_cls` and `loss_box_reg`, moving averages included,
            for other logits and deltas of the same shapes.
        normalizer: returns the divisor of sums over samples in the last call of `losses`.
        softmax: whether the logits belong to a softmax.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    labels: Tensor
    errors: Tensor
    noise: Tensor
    losses: Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]]
    normalizer: Callable[[], float]
    softmax: bool

    @property
    def foreground(self) -> Tensor:
        """Indices of the rows that were matched to a box, (F,)."""
        classes = self.logits[0].shape[-1] - self.softmax
        return ((self.labels >= 0) & (self.labels < classes)).nonzero().squeeze(1)

    @property
    def foreground_by_class(self) -> Tensor:
        """The number of foreground rows of each class, (K,)."""
        classes = self.logits[0].shape[-1] - self.softmax
        return torch.bincount(self.labels[self.foreground], minlength=classes)

    def rows(self, parts: list[Tensor]) -> Tensor:
        """Return `logits`, `deltas` or the like as one tensor (rows, C), ordered as `labels` is."""
        return torch.cat(parts, dim=-2).flatten(0, -2)

    def norms(self) -> Tensor:
        """Return the gradient norms of all valid classification samples, row by row: (n,)."""
        kind = reference.softmax_samples if self.softmax else reference.sigmoid_samples
        _, norm, valid = kind(upcast(self.rows(self.logits)), self.labels)
        return norm[valid]

    def cross_entropy(self, logits: list[Tensor]) -> Tensor:
        """Return the cross entropy summed over all samples, for comparison with other losses."""
        loss = softmax_ce_loss if self.softmax else bce_loss
        return loss(self.rows(logits), self.labels, reduction="sum")


def training_copy(model: nn.Module) -> nn.Module:
    """Return a copy that computes losses, while its layers predict as in evaluation.

    The moving averages of GHM losses continue, but only in the copy.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, (*_SWITCHES, GHMR, GradientDensity)):
            module.training = True
    return model


def can_capture(model: nn.Module) -> bool:
    """Return whether `model` is one for `capture`: RetinaNet, SSD or R-CNN with one predictor."""
    return _head(model) is not None


@torch.no_grad()
def capture(model: nn.Module, batch: list[dict]) -> LossInputs:
    """Run a `training_copy` on a batch of `read_batches`.

    Proposals are drawn as in training, with a fixed seed.
    """
    head = _head(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with _recorded(head) as calls, torch.random.fork_rng(devices), EventStorage():
        torch.manual_seed(0)
        model(batch)
    (arguments,) = calls
    if head is model:
        return _of_dense_detector(model, batch, *arguments)
    return _of_box_predictor(head, *arguments)


def _head(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (RetinaNet, GHMSSD)):
        return model
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    known = isinstance(predictor, FastRCNNOutputLayers)  # a cascade has a list of them
    return predictor if known and not getattr(predictor, "use_sigmoid_ce", False) else None


@contextmanager
def _recorded(head: nn.Module) -> Iterator[list[tuple]]:
    """Put the arguments of `head.losses` into a list instead of computing the losses."""
    calls: list[tuple] = []

    def losses(*arguments):
        calls.append(arguments)
        return {}

    head.losses = losses
    try:
        yield calls
    finally:
        del head.losses


def _of_dense_detector(model, batch, anchors, logits, labels, deltas, boxes) -> LossInputs:
    rows = torch.stack(labels)  # (N, R)
    foreground = (rows >= 0) & (rows != model.num_classes)
    all_anchors = type(anchors[0]).cat(anchors).tensor
    targets = torch.stack([model.box2box_transform.get_deltas(all_anchors, b) for b in boxes])
    # match once more, with each box's noise in place of its class
    labelled = [item["instances"].to(model.device) for item in batch]
    for instances in labelled:
        instances.gt_classes = instances.gt_noise
    noise, _ = model.label_anchors(anchors, labelled)
    softmax = isinstance(model, GHMSSD)

    def losses(logits, deltas):
        with EventStorage():
            return model.losses(anchors, logits, labels, deltas, boxes)

    def normalizer():
        return max(int(foreground.sum()), 1) if softmax else float(model.loss_normalizer)

    return LossInputs(
        logits=logits,
        deltas=deltas,
        labels=rows.flatten(),
        errors=(torch.cat(deltas, dim=1) - targets)[foreground],
        noise=torch.stack(noise)[foreground],
        losses=losses,
        normalizer=normalizer,
        softmax=softmax,
    )


def _of_box_predictor(predictor, predictions, proposals) -> LossInputs:
    scores, deltas = predictions
    labels = torch.cat([p.gt_classes for p in proposals])
    foreground = (labels >= 0) & (labels < predictor.num_classes)
    pred = deltas[foreground]
    if deltas.shape[1] > 4:  # one box per class: take the true class's
        by_class = pred.view(-1, predictor.num_classes, 4)
        pred = by_class[torch.arange(len(pred), device=pred.device), labels[foreground]]
    # proposals of an image without boxes lack the ground truth's fields, and are background
    matched = [p[p.gt_classes < predictor.num_classes] for p in proposals if p.has("gt_boxes")]
    boxes = Boxes.cat([p.proposal_boxes for p in matched]).tensor.to(pred)
    truth = Boxes.cat([p.gt_boxes for p in matched]).tensor.to(pred)

    def losses(logits, deltas):
        with EventStorage():
            return predictor.losses((logits[0], deltas[0]), proposals)

    return LossInputs(
        logits=[scores],
        deltas=[deltas],
        labels=labels,
        errors=pred - predictor.box2box_transform.get_deltas(boxes, truth),
        noise=torch.cat([labels[:0], *(p.gt_noise for p in matched)]),
        losses=losses,
        normalizer=lambda: float(max(labels.numel(), 1)),  # Detectron2 takes the mean
        softmax=True,
    )


def training_items(cfg, count: int) -> list[dict]:
    """Return up to `count` data set dicts of DATASETS.TRAIN, spread evenly over it."""
    items = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    step = max(1.0, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]


def has_noise(items: list[dict]) -> bool:
    """Return whether an annotation is known to be wrong, as some of the generated digits are."""
    wrong = NOISE_LABELS[1:]
    return any(a.get("noise") in wrong for item in items for a in item["annotations"])


def read_batches(cfg, items: list[dict]) -> Iterator[list[dict]]:
    """Yield batches of SOLVER.IMS_PER_BATCH images, resized as in a test, without augmentation.

    The instances also have a field `gt_noise`: an index in NOISE_LABELS.

    Raises:
        DataError: an image cannot be read.
    """
    still = cfg.clone()
    still.defrost()
    still.INPUT.MIN_SIZE_TRAIN, still.INPUT.MAX_SIZE_TRAIN = (
        (cfg.INPUT.MIN_SIZE_TEST,),
        cfg.INPUT.MAX_SIZE_TEST,
    )
    still.INPUT.MIN_SIZE_TRAIN_SAMPLING, still.INPUT.RANDOM_FLIP = "choice", "none"
    still.INPUT.CROP.ENABLED, still.INPUT.AUGMENTATION = False, ""
    mapper = GHMDatasetMapper(still, True)
    size = cfg.SOLVER.IMS_PER_BATCH
    for start in range(0, len(items), size):
        batch = raise_on_bad_image([mapper(_coded(i)) for i in items[start : start + size]])
        for item in batch:
            codes = item["instances"].gt_classes
            item["instances"].gt_classes = codes // len(NOISE_LABELS)
            item["instances"].gt_noise = codes % len(NOISE_LABELS)
        yield batch


def _coded(item: dict) -> dict:
    """Return the item with noise encoded in its annotations' class; mappers keep no other field."""

    def code(annotation):
        noise = annotation.get("noise")  # another data set may use the field otherwise
        kind = NOISE_LABELS.index(noise) if noise in NOISE_LABELS else 0
        return annotation | {"category_id": annotation["category_id"] * len(NOISE_LABELS) + kind}

    return item | {"annotations": [code(a) for a in item["annotations"]]}
