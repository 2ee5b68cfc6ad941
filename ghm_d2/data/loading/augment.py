"""Augmentation and resizing of pictures, as published with SSD and YOLOv3.

All are Detectron2 augmentations, so boxes and masks follow the picture. They draw from NumPy's
global generator, except the crop, which draws from PyTorch's; the loader seeds both for each image.
"""

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import BoxMode
from PIL import Image
from torchvision.transforms.v2 import RandomIoUCrop
from torchvision.tv_tensors import BoundingBoxes

from ghm_d2.errors import UsageError

AUGMENTATIONS = ("", "ssd", "yolo")
RESIZES = ("shortest_edge", "square")
FORMATS = ("RGB", "BGR", "L")  # formats with pixel values 0 to 255


def build_augmentations(cfg, is_train: bool) -> list[T.Augmentation]:
    """Return the augmentations of pictures: INPUT.AUGMENTATION, INPUT.RESIZE, then a flip.

    Pixel values are 0 to 255. An evaluation only resizes. A training begins with INPUT.CROP, as in
    Detectron2's mapper. The values "" and "shortest_edge" give Detectron2's `build_augmentation`.
    "ssd" needs the boxes: see `AugmentationsWithBoxes`.

    Raises:
        UsageError: an unknown INPUT.AUGMENTATION or INPUT.RESIZE; an INPUT.FORMAT that cannot be
            augmented.
    """
    keys = cfg.INPUT
    _check("AUGMENTATION", keys.AUGMENTATION, AUGMENTATIONS)
    _check("RESIZE", keys.RESIZE, RESIZES)
    resize, *flip = build_augmentation(cfg, is_train)
    if keys.RESIZE == "square":
        sizes = keys.MIN_SIZE_TRAIN if is_train else (keys.MIN_SIZE_TEST,)
        resize = ResizeSquare(sizes, keys.MIN_SIZE_TRAIN_SAMPLING if is_train else "choice")
    if not is_train:
        return [resize]
    crop = [T.RandomCrop(keys.CROP.TYPE, keys.CROP.SIZE)] if keys.CROP.ENABLED else []
    return [*crop, *_published(cfg), resize, *flip]


def _published(cfg) -> list[T.Augmentation]:
    if not cfg.INPUT.AUGMENTATION:
        return []
    if cfg.INPUT.FORMAT not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(
            f"INPUT.AUGMENTATION {cfg.INPUT.AUGMENTATION} works only with INPUT.FORMAT {known}; "
            "change the format, or set INPUT.AUGMENTATION ''"
        )
    if cfg.INPUT.AUGMENTATION == "ssd":
        return [SSDColour(), Expand(tuple(cfg.MODEL.PIXEL_MEAN)), IoUCrop()]
    return [Place(max(*cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)), YOLOColour()]


def _check(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"INPUT.{key} must be one of {', '.join(map(repr, known))}, not {value!r}")


class AugmentationsWithBoxes(T.AugmentationList):
    """Passes the boxes to the augmentations too, which Detectron2's mapper does not.

    Attributes:
        boxes: (N, 4) XYXY in px, to be set before each picture.
    """

    boxes: np.ndarray | None = None

    def __call__(self, aug_input):
        aug_input.boxes = self.boxes
        return super().__call__(aug_input)


def boxes_of(annotations: list[dict]) -> np.ndarray:
    """Return the boxes of Detectron2's annotation dicts: (N, 4) float32, XYXY in px."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.asarray(boxes, dtype=np.float32).reshape(-1, 4)


def visible(annotations: list[dict], width: float, height: float) -> list[dict]:
    """Return the annotations whose box has an area inside the picture, with boxes clipped to it.

    Detectron2 clips only after its augmentations, none of which enlarges a picture. On a canvas, a
    box outside the picture would become an object.
    """
    left = []
    for annotation in annotations:
        x0, y0, x1, y1 = BoxMode.convert(
            list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
        )
        box = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
        if box[2] > box[0] and box[3] > box[1]:
            whole = box == [x0, y0, x1, y1]
            cut = {} if whole else {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
            left.append(annotation | cut)
    return left


def centred(annotations: list[dict], transforms: T.TransformList, size: tuple[int, int]):
    """Return the annotations whose box centre is inside the picture after `transforms`.

    SSD (section 2.2) keeps only these objects of a crop. The transforms that follow the crop do
    not change which they are.

    Args:
        annotations: annotations of a data set dict, before `transforms`.
        transforms: the transforms applied to the picture.
        size: (height, width) of the picture after them, in px.
    """
    corners = boxes_of(annotations).astype(float).reshape(-1, 2, 2)
    centres = transforms.apply_coords(corners.mean(1))
    inside = ((centres > 0) & (centres < size[::-1])).all(1)
    return [a for a, keep in zip(annotations, inside, strict=True) if keep]


class ResizeSquare(T.Augmentation):
    """Resize a picture of any shape to a square; the arguments are those of `T.ResizeShortestEdge`.

    SSD does so (weiliu89/caffe, examples/ssd: Resize.WARP). A size of 0 changes nothing.
    """

    def __init__(self, sizes: tuple[int, ...], sample_style: str = "choice"):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        if self.sample_style == "range":
            size = np.random.randint(self.sizes[0], self.sizes[1] + 1)
        else:
            size = np.random.choice(self.sizes)
        return T.Resize(int(size)).get_transform(image) if size else T.NoOpTransform()


class SSDColour(T.Augmentation):
    """SSD's colour distortion; each part is applied with probability 0.5.

    Source: SSD, arXiv 1512.02325, section 2.2; figures and order: weiliu89/caffe, ssd_coco.py
    (`distort_param`) and `ApplyDistort`.
    """

    def get_transform(self, image):
        brightness = self._sometimes(-32, 32, 0)
        contrast = T.BlendTransform(0.0, 0.0, self._sometimes(0.5, 1.5, 1))
        saturation = self._sometimes(0.5, 1.5, 1)
        hue = self._sometimes(-18, 18, 0) / 180  # OpenCV's unit: 180 is a full turn
        steps = [T.ColorTransform(lambda x: adjust_hsv(x, hue, saturation, 1))]
        steps.insert(int(self._rand_range() < 0.5), contrast)
        return T.TransformList([T.BlendTransform(1.0, brightness, 1.0), *steps])

    def _sometimes(self, low: float, high: float, otherwise: float) -> float:
        return float(self._rand_range(low, high)) if self._rand_range() < 0.5 else otherwise


class Expand(T.Augmentation):
    """With probability 0.5, place the picture at random on a canvas up to 4 times as wide and high.

    Source: SSD, section 3.6; weiliu89/caffe, ssd_coco.py (`expand_param`).

    Args:
        colour: colour of the canvas, one number per channel.
        longest: longest side of the canvas in px; a picture that would need a larger one is shrunk
            first, so that a large photograph does not take sixteen times its memory.
    """

    def __init__(self, colour: tuple[float, ...], longest: int = 4096):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        if self._rand_range() >= 0.5:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        ratio = self._rand_range(1, 4)
        scale = min(1.0, self.longest / (ratio * max(height, width)))
        new_h, new_w = max(1, int(scale * height)), max(1, int(scale * width))
        left, right = _margins(new_w, int(new_w * ratio))
        top, bottom = _margins(new_h, int(new_h * ratio))
        canvas = Canvas(left, top, right, bottom, pad_value=self.colour)
        if scale == 1:
            return canvas
        return T.TransformList([T.ResizeTransform(height, width, new_h, new_w), canvas])


class Canvas(T.PadTransform):
    """A `T.PadTransform` whose `pad_value` has one number per channel."""

    def apply_image(self, img):
        height, width = img.shape[:2]
        shape = height + self.y0 + self.y1, width + self.x0 + self.x1, *img.shape[2:]
        canvas = np.empty(shape, img.dtype)
        canvas[:] = np.rint(self.pad_value).astype(img.dtype)
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class IoUCrop(T.Augmentation):
    """SSD's crop: its IoU with some object is at least 0, 0.1, 0.3, 0.5, 0.7 or 0.9; or no crop.

    A side is 0.3 to 1 of the picture's, the crop's aspect ratio is 0.5 to 2, and some object's
    centre is inside. A picture without objects stays whole. `centred` then drops the objects whose
    centre is outside.

    Source: SSD, section 2.2, as torchvision draws it.
    """

    def __init__(self):
        super().__init__()
        self._crop = RandomIoUCrop()

    def get_transform(self, image, boxes):
        height, width = image.shape[:2]
        # torchvision finds no crop without objects, and divides by int(0.3 * side), 0 below 4 px
        if not len(boxes) or min(height, width) < 4:
            return T.NoOpTransform()
        boxes = torch.as_tensor(boxes, dtype=torch.float32)
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        crop = self._crop.make_params([boxes])
        if not crop:
            return T.NoOpTransform()
        return T.CropTransform(crop["left"], crop["top"], crop["width"], crop["height"])


class YOLOColour(T.Augmentation):
    """YOLOv3's colour distortion: hue by up to 0.1 of a turn, saturation and value by up to 1.5.

    Source: pjreddie/darknet, cfg/yolov3.cfg and `random_distort_image`.
    """

    def get_transform(self, image):
        hue = self._rand_range(-0.1, 0.1)
        saturation, value = self._scale(1.5), self._scale(1.5)
        return T.ColorTransform(lambda x: adjust_hsv(x, hue, saturation, value))

    def _scale(self, most: float) -> float:
        scale = self._rand_range(1, most)
        return scale if self._rand_range() < 0.5 else 1 / scale


class Place(T.Augmentation):
    """YOLOv3's jitter: scale each side by 0.7 to 1.3, and place at random on a grey square.

    The picture just fits into the square and is not cropped, unlike in YOLOv2. The square's side is
    the picture's longer side, at most `longest` px.

    Source: pjreddie/darknet, cfg/yolov3.cfg (jitter .3) and `load_data_detection`.
    """

    def __init__(self, longest: int, jitter: float = 0.3):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        side = min(max(height, width), self.longest)
        jittered = self._rand_range(1 - self.jitter, 1 + self.jitter, 2) * (width, height)
        new_w, new_h = np.maximum(1, np.rint(side * jittered / jittered.max())).astype(int).tolist()
        (left, right), (top, bottom) = _margins(new_w, side), _margins(new_h, side)
        resize = T.ResizeTransform(height, width, new_h, new_w)
        return T.TransformList([resize, T.PadTransform(left, top, right, bottom, pad_value=127)])


def _margins(length: int, whole: int) -> tuple[int, int]:
    """Return the margins before and after a part of `length` placed at random within `whole`."""
    before = np.random.randint(whole - length + 1)
    return before, whole - length - before


def adjust_hsv(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Change the hue, saturation and value of a picture; of a grey picture only the value.

    Args:
        image: (height, width, 3 or 1) uint8. If red and blue are swapped, the hue turns the other
            way.
        hue: hue to add, in turns.
        saturation, value: factors, at least 0; results are clipped at 255.
    """
    levels = np.arange(256)
    turned = (levels + round(256 * hue)) % 256
    tables = [turned, *(np.minimum(levels * f, 255).astype(int) for f in (saturation, value))]
    if image.shape[2] == 1:
        return tables[2].astype(np.uint8)[image]
    hsv = Image.fromarray(image).convert("HSV").point(np.concatenate(tables).tolist())
    return np.asarray(hsv.convert("RGB"))
