"""Training images made of several: mosaic of four (YOLOv4, arXiv 2004.10934) and mixup of two
(Zhang et al., arXiv 1710.09412), both with boxes and masks.

The images come from the mapper, augmented and resized.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor

LAST_SHARE = 0.1  # share of a training, at its end, without mixing, as in YOLOX (arXiv 2107.08430)
_SCALES = (0.5, 1.0)  # range of the scale of the images in a mosaic
_CENTRE = (0.25, 0.75)  # range of the point where the four meet, as a share of a side
_LEAST_AREA = 0.2  # a cut object counts if this share of its box is left
_BETA = 32.0  # parameter of mixup's beta distribution, as in YOLOX: both images stay visible


class Mixing:
    """Makes a mosaic or mixup of an image, both or neither, drawn with NumPy's global generator."""

    def __init__(self, mosaic: float, mixup: float, fill: tuple[float, ...]):
        """
        Args:
            mosaic, mixup: probabilities; a mosaic may also be mixed with another image.
            fill: colour where no image is.
        """
        self._mosaic, self._mixup, self._fill = mosaic, mixup, fill

    def __call__(self, item: dict, draw: Callable[[], dict]) -> dict:
        """Return the image to train on.

        Args:
            item: "image" (C, H, W) and "instances", as Detectron2's mapper makes them.
            draw: returns another image of the data set.

        Returns:
            `item` with the mixed image and instances, and the "faults" of all images used; or, if
            drawn images have an entry "error", the first of those.
        """
        for probability, number, mix in (
            (self._mosaic, 3, self._four),
            (self._mixup, 1, _blended),
        ):
            if np.random.rand() >= probability:
                continue
            others = [draw() for _ in range(number)]
            for other in others:
                if "error" in other:
                    return other
            faults = [x["faults"] for x in (item, *others) if "faults" in x]
            item = item | mix([item, *others])
            if faults:
                item["faults"] = {file: fault for f in faults for file, fault in f.items()}
        return item

    def _four(self, items: list[dict]) -> dict:
        """Place four images around a point of a canvas of the first one's size."""
        first = items[0]["image"]
        height, width = first.shape[1:]
        fill = torch.tensor(self._fill).to(first.dtype)
        canvas = fill[:, None, None].expand_as(first).clone()
        scale = np.random.uniform(*_SCALES)
        x, y = (round(side * np.random.uniform(*_CENTRE)) for side in (width, height))
        parts = []
        for i, item in enumerate(items):
            image = _resized(item["image"], scale)
            h, w = image.shape[1:]
            left, top = (x if i % 2 else x - w), (y if i // 2 else y - h)
            x0, y0 = max(left, 0), max(top, 0)
            x1, y1 = min(left + w, width), min(top + h, height)
            canvas[:, y0:y1, x0:x1] = image[:, y0 - top : y1 - top, x0 - left : x1 - left]
            factors = w / item["image"].shape[2], h / item["image"].shape[1]
            window = (x0, y0, x1, y1)
            parts.append(_moved(item["instances"], factors, (left, top), window, (height, width)))
        return {"image": canvas, "instances": _together(parts)}


def _blended(items: list[dict]) -> dict:
    """Return the first image blended with the second one, which is scaled to fit into it."""
    (image, other), (instances, others) = (
        [item[key] for item in items] for key in ("image", "instances")
    )
    height, width = image.shape[1:]
    scale = min(height / other.shape[1], width / other.shape[2])
    fitted = _resized(other, scale)
    h, w = min(fitted.shape[1], height), min(fitted.shape[2], width)
    share = np.random.beta(_BETA, _BETA)
    mixed = image.float()
    mixed[:, :h, :w] = share * mixed[:, :h, :w] + (1 - share) * fitted[:, :h, :w].float()
    factors = fitted.shape[2] / other.shape[2], fitted.shape[1] / other.shape[1]
    window = (0, 0, w, h)
    whole = _moved(instances, (1.0, 1.0), (0, 0), (0, 0, width, height), (height, width))
    added = _moved(others, factors, (0, 0), window, (height, width))
    both = _together([whole, added])
    return {"image": mixed.round().to(image.dtype), "instances": both}


def _together(parts: list[Instances]) -> Instances:
    """Concatenate instances; an image without objects gets empty masks if others have masks."""
    if any(part.has("gt_masks") for part in parts):
        for part in parts:
            if not part.has("gt_masks"):
                part.gt_masks = BitMasks(torch.zeros(0, *part.image_size, dtype=torch.bool))
    return Instances.cat(parts)


def _resized(image: Tensor, scale: float) -> Tensor:
    size = [max(1, round(scale * side)) for side in image.shape[1:]]
    found = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    return found.round().to(image.dtype)


def _moved(
    instances: Instances,
    factors: tuple[float, float],
    shift: tuple[int, int],
    window: tuple[int, int, int, int],
    size: tuple[int, int],
) -> Instances:
    """Return instances moved to another canvas: resized, shifted, and clipped to a window.

    Args:
        factors, shift: scale factor and shift in px, each for (x, y).
        window: (x0, y0, x1, y1) on the canvas; nothing outside it is visible.
        size: (height, width) of the canvas.
    """
    scale = torch.tensor([*factors, *factors])
    offset = torch.tensor([*shift, *shift], dtype=torch.float32)
    whole = instances.gt_boxes.tensor * scale + offset
    low, high = torch.tensor(window[:2]), torch.tensor(window[2:])
    corner, end = whole[:, :2].clamp(min=low, max=high), whole[:, 2:].clamp(min=low, max=high)
    boxes = Boxes(torch.cat([corner, end], dim=1).float())
    sides, area = end - corner, Boxes(whole).area()
    kept = (sides > 1).all(1) & (boxes.area() >= _LEAST_AREA * area)
    moved = Instances(size, gt_boxes=boxes[kept], gt_classes=instances.gt_classes[kept])
    if not instances.has("gt_masks"):
        return moved
    masks = _moved_masks(instances.gt_masks[kept], factors, shift, window, size)
    moved.gt_masks = masks
    moved.gt_boxes = masks.get_bounding_boxes()
    return moved[masks.tensor.flatten(1).any(1)]


def _moved_masks(masks, factors, shift, window, size) -> BitMasks:
    """Return polygons or bit masks moved as `_moved` moves instances."""
    height, width = size
    found = torch.zeros(len(masks), height, width, dtype=torch.bool)
    x0, y0, x1, y1 = window
    for i in range(len(masks)):
        if isinstance(masks, PolygonMasks):
            outlines = [p.reshape(-1, 2) * factors + shift for p in masks.polygons[i]]
            mask = torch.from_numpy(
                polygons_to_bitmask([o.reshape(-1) for o in outlines], height, width)
            )
            found[i, y0:y1, x0:x1] = mask[y0:y1, x0:x1].bool()
            continue
        size_now = [round(s * f) for s, f in zip(masks.tensor[i].shape, factors[::-1], strict=True)]
        mask = F.interpolate(masks.tensor[i][None, None].float(), size_now, mode="bilinear")[0, 0]
        mask = mask > 0.5
        left, top = shift
        found[i, y0:y1, x0:x1] = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    return BitMasks(found)
