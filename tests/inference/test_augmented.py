"""Test-time augmentation: what is found on copies of an image is brought back to it and merged."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ghm_d2.config import load_config
from ghm_d2.inference.augmented import enable_augmentation, with_augmentation
from ghm_d2.register import register_all

DENSE = ("retinanet_focal", "fcos", "ssd", "yolov3")
LOOSE = ("RETINANET", "ROI_HEADS", "YOLOV3", "SSD", "FCOS")  # an untrained one finds something


def config(name: str, sizes: str, flip: bool):
    words = ["MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "20", "MODEL.TIMM.PRETRAINED", ""]
    words += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.FLIP", str(flip)]
    words += [w for g in LOOSE for w in (f"MODEL.{g}.SCORE_THRESH_TEST", "0.0")]
    return load_config(f"quick/{name}.yaml", words)


def picture(height: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height, "width": width}


class FindsWhatIsBright:
    """Knows the class of a bright rectangle by its colour; less sure of it in smaller pictures."""

    def __init__(self):
        self.sizes = []

    def __call__(self, batch):
        return [{"instances": self._find(item["image"])} for item in batch]

    def _find(self, image):
        height, width = image.shape[1:]
        self.sizes.append((height, width))
        found = Instances((height, width))
        boxes = []
        for channel in image:
            ys, xs = torch.where(channel > 128)
            boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        found.scores = torch.full((3,), width / 1000)
        found.pred_classes = torch.arange(3)
        return found


def test_boxes_of_all_copies_come_back_to_the_image_and_are_merged():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    truth = torch.tensor([[4, 6, 24, 36], [40, 10, 70, 50], [10, 30, 30, 56]])
    for channel, (x0, y0, x1, y1) in enumerate(truth.tolist()):
        image[channel, y0:y1, x0:x1] = 255
    detector = FindsWhatIsBright()
    detect = with_augmentation(detector, config("retinanet_focal", "(60, 90, 120)", flip=True))
    # the image was 120 x 160 px before it was resized
    (output,) = detect([{"image": image, "height": 120, "width": 160}])
    found = output["instances"]
    assert sorted(set(detector.sizes)) == [(60, 80), (90, 120), (120, 160)]
    assert len(detector.sizes) == 6
    assert found.image_size == (120, 160) and len(found) == 3
    order = found.pred_classes.argsort()
    torch.testing.assert_close(found.pred_boxes.tensor[order], 2.0 * truth, atol=2, rtol=0)
    assert found.scores.tolist() == pytest.approx([0.16] * 3)  # of the copies that are most sure


@pytest.mark.parametrize("name", (*DENSE, "mask_rcnn"))
@torch.no_grad()
def test_the_image_itself_as_the_only_copy_changes_nothing(name):
    register_all()
    torch.manual_seed(0)
    cfg = config(name, "(128,)", flip=False)
    model = build_model(cfg).eval()
    item = picture(128, 128)
    plain, merged = (d([item])[0]["instances"] for d in (model, with_augmentation(model, cfg)))
    assert len(plain) == len(merged) > 0
    assert merged.image_size == plain.image_size
    torch.testing.assert_close(merged.scores, plain.scores)
    torch.testing.assert_close(merged.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert torch.equal(merged.pred_classes, plain.pred_classes)
    assert merged.has("pred_masks") == (name == "mask_rcnn")


def test_copies_without_a_detection_give_none():
    found = Instances((60, 80), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    found.pred_classes = torch.zeros(0, dtype=torch.int64)
    detect = with_augmentation(
        lambda batch: [{"instances": found} for _ in batch], config("ssd", "(60,)", flip=True)
    )
    assert len(detect([picture(60, 80)])[0]["instances"]) == 0


@pytest.mark.parametrize(
    ("trained", "asked", "mirrored"),
    [("horizontal", True, True), ("none", True, False), ("horizontal", False, False)],
)
def test_copies_are_mirrored_only_for_a_detector_trained_with_flips(trained, asked, mirrored):
    words = ["INPUT.RANDOM_FLIP", trained, "TEST.AUG.FLIP", str(asked)]
    cfg = load_config("quick/ssd.yaml", words)
    enable_augmentation(cfg)
    assert cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.FLIP is mirrored


def test_without_the_key_the_detector_is_left_alone():
    model = object()
    assert with_augmentation(model, load_config("quick/ssd.yaml")) is model
