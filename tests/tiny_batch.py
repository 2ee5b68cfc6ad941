"""Made-up images to try a model on for a step."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances


def tiny_batch(num_classes: int, size: tuple[int, int] = (64, 64)) -> list[dict]:
    """Two images, one of them without an object."""
    height, width = size
    batch = []
    for boxes in ([[4.0, 4.0, width / 2, height / 2]], []):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.full((len(boxes),), num_classes - 1)
        instances.gt_masks = BitMasks(torch.ones(len(boxes), height, width, dtype=torch.bool))
        image = torch.full((3, height, width), 127, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch
