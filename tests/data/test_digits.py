import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from ghm_d2.data.checking.check import check
from ghm_d2.data.coco_json import iou
from ghm_d2.data.digits.dataset import DigitsSpec, generate, write

SMALL = DigitsSpec(train=12, val=5, image_size=(96, 128), side=(10, 40))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def annotations(spec, split="train"):
    samples = list(generate(spec, split))
    return [a for s in samples for a in s.annotations], [a for s in samples for a in s.missing]


def test_the_same_spec_leaves_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, spec in (("a", SMALL), ("b", SMALL), ("c", replace(SMALL, seed=1))):
        write(spec, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a").keys() == files(tmp_path / "c").keys()
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_an_image_does_not_depend_on_how_many_there_are():
    few, many = generate(replace(SMALL, train=3), "train"), generate(SMALL, "train")
    for a, b in zip(few, islice(many, 3), strict=True):
        assert np.array_equal(a.image, b.image)
        assert a.annotations == b.annotations


def test_what_is_written_is_what_is_generated_and_passes_the_check(tmp_path):
    from ghm_d2.data.images import read_image

    spec = replace(SMALL, noise=0.5)
    counts = write(spec, tmp_path)
    for split in ("train", "val"):
        coco = json.loads((tmp_path / f"{split}.json").read_text())
        for image, sample in zip(coco["images"], generate(spec, split), strict=True):
            assert np.array_equal(read_image(tmp_path / "images" / image["file_name"]), sample[0])
            own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            assert [a["bbox"] for a in own] == [a["bbox"] for a in sample.annotations]
        assert counts[split]["boxes"] == len(coco["annotations"])
    report = check({s: (tmp_path / f"{s}.json", tmp_path / "images") for s in ("train", "val")})
    assert report.errors == []


def test_train_and_val_share_no_scan():
    spec = replace(SMALL, train=150, val=60)
    scans = [{a["scan"] for a in annotations(spec, split)[0]} for split in ("train", "val")]
    assert min(map(len, scans)) > 100
    assert not scans[0] & scans[1]


def test_boxes_are_inside_apart_and_of_the_asked_sizes():
    spec = replace(SMALL, train=60, side=(12, 48), objects=(2, 4))
    for sample in generate(spec, "train"):
        height, width = sample.image.shape[:2]
        assert 96 <= min(height, width) <= max(height, width) <= 128
        boxes = [a["bbox"] for a in sample.annotations]
        assert 1 <= len(boxes) <= 4
        for i, (x, y, w, h) in enumerate(boxes):
            assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
            assert 11 <= max(w, h) <= 48
            assert all(iou(boxes[i], other) == 0 for other in boxes[:i])
    sides = [max(a["bbox"][2:]) for a in annotations(spec)[0]]
    assert np.median(sides) == pytest.approx(24, rel=0.2)  # log-uniform: the geometric mean


def test_boxes_are_tight_around_the_ink():
    """The difference from the same picture without the digit fills the box and nothing else."""
    spec = replace(SMALL, train=20, objects=(1, 1))
    empty = generate(replace(spec, objects=(0, 0)), "train")
    for sample, without in zip(generate(spec, "train"), empty, strict=True):
        x, y, w, h = sample.annotations[0]["bbox"]
        ink = (sample.image != without.image).any(2)
        assert ink[y : y + h, x : x + w].sum() == ink.sum() > 0
        ink = (np.abs(sample.image - without.image.astype(float)) > 10).any(2)[y : y + h, x : x + w]
        assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()


def test_pictures_and_boxes_are_those_of_the_first_version():
    """Earlier measurements stay comparable: the hash is that of the version without masks."""
    content = hashlib.sha256()
    for split in ("train", "val"):
        for sample in generate(replace(SMALL, noise=0.5), split):
            content.update(sample.image.tobytes())
            content.update(repr([(a["bbox"], a["area"]) for a in sample.annotations]).encode())
    assert content.hexdigest() == "2301fefef34c40d32d521e80d10555ffc8aa882b2e0ab2d36a093a6efa6075da"


def box_of(mask):
    ys, xs = np.nonzero(mask)
    left, top = xs.min(), ys.min()
    return [left, top, xs.max() - left + 1, ys.max() - top + 1]


@pytest.mark.parametrize("noise", [0.0, 0.9])
def test_masks_are_as_large_as_their_boxes(noise):
    """The masks of shifted boxes are too, because they move along."""
    spec = replace(SMALL, train=40, noise=noise)
    for sample in generate(spec, "train"):
        for annotation in sample.annotations + sample.missing:
            assert annotation["segmentation"]["counts"].isascii()
            mask = coco_mask.decode(annotation["segmentation"])
            assert mask.shape == sample.image.shape[:2]
            assert box_of(mask) == annotation["bbox"]


def test_masks_are_the_ink_with_its_holes():
    """One digit per picture is compared with the same picture without it."""
    from scipy import ndimage

    spec = replace(SMALL, train=60, objects=(1, 1), side=(30, 40), clutter=(0, 0))
    empty = generate(replace(spec, objects=(0, 0)), "train")
    holes = {}
    for sample, without in zip(generate(spec, "train"), empty, strict=True):
        (annotation,) = sample.annotations
        x, y, w, h = annotation["bbox"]
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        change = np.abs(sample.image - without.image.astype(float)).max(2)
        opacity = change / change.max()  # the background is nearly even
        assert (mask == (opacity >= 0.4))[y : y + h, x : x + w].mean() > 0.95
        parts = ndimage.label(~mask)[1]  # the surroundings are one
        holes.setdefault(annotation["category_id"] - 1, []).append(parts - 1)
    assert np.mean([n >= 1 for n in holes[0]]) > 0.7
    assert np.mean([n >= 1 for n in holes[1]]) < 0.3


def test_a_wrong_class_keeps_its_mask_and_a_shifted_box_moves_it():
    clean, spoilt = (
        annotations(replace(SMALL, train=30, noise_class=share, noise_shift=share))[0]
        for share in (0.0, 0.5)
    )
    for before, after in zip(clean, spoilt, strict=True):
        same = before["segmentation"] == after["segmentation"]
        assert same == (after["noise"] == "class")
        assert after["area"] == after["bbox"][2] * after["bbox"][3]


def test_every_digit_occurs_and_is_labelled_by_itself_plus_one():
    from sklearn.datasets import load_digits

    truth = load_digits().target
    found = annotations(replace(SMALL, train=80))[0]
    assert {a["category_id"] for a in found} == set(range(1, 11))
    assert all(truth[a["scan"]] + 1 == a["category_id"] for a in found)


def test_noise_changes_annotations_at_its_rates_and_no_picture():
    clean, noisy = replace(SMALL, train=70), replace(SMALL, train=70, noise=0.3)
    for a, b in zip(generate(clean, "train"), generate(noisy, "train"), strict=True):
        assert np.array_equal(a.image, b.image)
        assert len(a.annotations) == len(b.annotations) + len(b.missing)
    kept, missing = annotations(noisy)
    kinds = Counter(a["noise"] for a in kept + missing)
    total = sum(kinds.values())
    for kind in ("class", "shift", "missing"):
        assert kinds[kind] / total == pytest.approx(0.1, abs=0.035)
    assert {a["noise"] for a in missing} == {"missing"}


def test_noise_keeps_the_truth_beside_it():
    truth = {a["scan"]: a["category_id"] for a in annotations(replace(SMALL, train=60))[0]}
    kept, _ = annotations(replace(SMALL, train=60, noise_class=0.5, noise_shift=0.5))
    assert {a["noise"] for a in kept} == {"class", "shift"}
    for a in kept:
        if a["noise"] == "class":
            assert a["true_category_id"] == truth[a["scan"]] != a["category_id"]
        else:
            assert 0 < iou(a["bbox"], a["true_bbox"]) < 0.5
            assert a["category_id"] == truth[a["scan"]]


def test_noise_leaves_val_alone_unless_asked():
    spec = replace(SMALL, val=20, noise=1.0)
    assert {a["noise"] for a in annotations(spec, "val")[0]} == {"none"}
    assert {a["noise"] for a in annotations(replace(spec, noise_val=True), "val")[0]} == {
        "class",
        "shift",
    }


def test_each_kind_of_noise_can_be_set_alone(tmp_path):
    write(replace(SMALL, noise_missing=1.0), tmp_path)
    coco = json.loads((tmp_path / "train.json").read_text())
    assert coco["annotations"] == []
    assert {a["noise"] for a in coco["missing_annotations"]} == {"missing"}
    assert {a["image_id"] for a in coco["missing_annotations"]} <= set(range(1, 13))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise": 1.2}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"noise": 0.9, "noise_class": 0.9}, "sum of the noise rates"),
        ({"noise_shift": -0.1}, "noise_shift"),
        ({"side": (40, 10)}, "side is 40 10"),
        ({"side": (4, 10)}, "from 8 to"),
        ({"side": (10, 500)}, "side"),
        ({"objects": (-1, 2)}, "objects"),
        ({"train": -1}, "train is -1"),
        ({"image_size": (10, 20)}, "image_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train and val"):
        next(generate(SMALL, "test"))
