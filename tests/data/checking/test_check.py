"""`check` finds what would silently ruin a training, and nothing in sound data."""

import json

import pytest

from ghm_d2.data.checking.check import check

TRIANGLE = [3, 4, 23, 4, 23, 14]


def run(folder, *splits):
    splits = splits or [s for s in ("train", "val", "test") if (folder / f"{s}.json").is_file()]
    return check({s: (folder / f"{s}.json", folder / "images") for s in splits})


def found(report, kind=None):
    return [(p.kind, p.severity, str(p)) for p in report.problems if kind in (None, p.kind)]


def test_sound_data_have_no_problem_and_are_counted(build, tmp_path):
    report = run(build.data(tmp_path / "d"))
    assert report.problems == []
    assert report.summary["train"] == {
        "images": 2,
        "background": 0,
        "boxes": 2,
        "per_class": {"cat": 1, "dog": 1},
        "sizes": {"tiny": 2, "small": 0, "medium": 0, "large": 0},
    }


@pytest.mark.parametrize(
    ("change", "kind", "severity", "words"),
    [
        ({"bbox": [3, 4, -5, 10]}, "bad-box", "error", "inverted or empty"),
        ({"bbox": [3, 4, 0, -5]}, "bad-box", "error", "inverted or empty"),
        ({"bbox": [3, 4, 1.03, 0.0]}, "empty-box", "warning", "skipped in training"),
        ({"bbox": [3, 4, float("nan"), 10]}, "bad-box", "error", "not finite"),
        ({"bbox": [3, 4, float("inf"), 10]}, "bad-box", "error", "not finite"),
        ({"bbox": [3, 4, True, True]}, "bad-box", "error", "not finite"),
        ({"bbox": [3, 4, 5]}, "bad-box", "error", "not a list of four numbers"),
        ({"bbox": None}, "bad-box", "error", "not a list of four numbers"),
        ({"bbox": [60, 4, 20, 10]}, "outside", "warning", "16 px outside the image of 64 x 48"),
        ({"bbox": [70, 4, 20, 10]}, "outside-box", "warning", "completely outside"),
        ({"category_id": 3}, "unknown-category", "error", "unknown category 3"),
        ({"category_id": [1]}, "unknown-category", "error", "unknown category"),
        ({"ignore": 1}, "ignore-flag", "error", "does not support"),
        ({"iscrowd": None}, "crowd-flag", "error", "None"),
        ({"area": "9"}, "missing-field", "warning", "not a number"),
        ({"segmentation": [[1, 2, 3, 4]]}, "lost-mask", "warning", "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "bad-mask", "warning", "finite"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e6]]}, "bad-mask", "warning", "far outside the image"),
        ({"segmentation": [TRIANGLE, [1, 2, 3, 4]]}, "lost-part", "warning", "three points"),
        ({"segmentation": [[1, 2, 3, 4], [5, 6]]}, "lost-mask", "warning", "three points"),
        ({"segmentation": [TRIANGLE, None]}, "bad-mask", "error", "three points"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, "bad-mask", "warning", "size [9, 9]"),
        ({"segmentation": {"size": [9], "counts": [81]}}, "bad-mask", "error", "size [9]"),
        ({"segmentation": {"size": [48, 64], "counts": "x"}}, "bad-mask", "warning", "add up"),
        ({"segmentation": {"size": [48, 64], "counts": [-1, 9]}}, "bad-mask", "error", "add up"),
        ({"segmentation": 5}, "bad-mask", "error", "neither"),
    ],
)
def test_a_bad_annotation_is_named_with_its_image(build, tmp_path, change, kind, severity, words):
    coco = build.coco()
    coco["annotations"][1] |= change
    report = run(build.data(tmp_path / "d", train=coco), "train")
    problems = [f for f in found(report) if f[0] != "unused-category"]
    assert [(k, s) for k, s, _ in problems] == [(kind, severity)]
    assert problems[0][2].startswith("b.png: annotation 2: ") and words in problems[0][2]


def test_masks_and_their_absence_are_no_problem(build, tmp_path):
    coco = build.coco()
    coco["annotations"][0]["segmentation"] = [[3, 4, 23, 4, 23, 14]]
    coco["annotations"][1]["segmentation"] = []
    assert run(build.data(tmp_path / "d", train=coco), "train").problems == []


@pytest.mark.parametrize(
    ("field", "train", "val"),
    [("area", "warning", "error"), ("id", "error", "error")],
)
def test_a_missing_field_stops_what_needs_it(build, tmp_path, field, train, val):
    coco = build.coco()
    del coco["annotations"][0][field]
    for split, severity in (("train", train), ("val", val)):
        report = run(build.data(tmp_path / "d", **{split: coco}), split)
        (problem,) = found(report, "missing-field")
        assert problem[1] == severity and f"has no {field}" in problem[2]


def test_a_set_without_annotations_can_be_evaluated_but_not_trained_on(build, tmp_path):
    coco = build.coco()
    del coco["annotations"]
    for split, severity in (("train", "error"), ("test", "warning")):
        report = run(build.data(tmp_path / "d", **{split: coco}), split)
        assert ("empty", severity) in [(k, s) for k, s, _ in found(report)]
        assert report.summary[split]["background"] == 2


def test_images_that_are_missing_truncated_or_of_another_size(build, tmp_path):
    coco = build.coco(("gone.png", "cut.jpg", "text.png", "wide.png", "ok.png"))
    coco["images"][3]["width"] = 100
    folder = build.data(tmp_path / "d", train=coco)
    (folder / "images" / "gone.png").unlink()
    (folder / "images" / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    cut = folder / "images" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    assert sorted((p.kind, p.file) for p in run(folder, "train").errors) == [
        ("missing-image", "gone.png"),
        ("size", "wide.png"),
        ("unreadable-image", "cut.jpg"),
        ("unreadable-image", "text.png"),
    ]


def test_a_windows_path_is_missing_as_it_will_be_in_training(build, tmp_path):
    coco = build.coco(("sub/a.png", "b.png"))
    folder = build.data(tmp_path / "d", train=coco)
    coco["images"][0]["file_name"] = "sub\\a.png"
    (folder / "train.json").write_text(json.dumps(coco))
    assert [(p.kind, p.file) for p in run(folder, "train").errors] == [
        ("missing-image", "sub\\a.png")
    ]


def test_a_decompression_bomb_is_a_problem_and_not_a_crash(build, tmp_path, monkeypatch, recwarn):
    from PIL import Image

    folder = build.data(tmp_path / "d")
    for limit in (64 * 48 - 1, 64 * 48 // 3):  # Pillow only warns up to twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        report = run(folder, "train")
        assert [p.kind for p in report.errors] == ["unreadable-image"] * 2
        assert "limit" in report.errors[0].detail
    assert len(recwarn) == 0


def test_leakage_is_an_error_and_a_copy_in_one_split_a_warning(build, tmp_path):
    train, val = build.coco(("a.png", "copy.png")), build.coco(("v.png", "leak.bmp"))
    folder = build.data(tmp_path / "d", train=train, val=val)
    for name in ("copy.png", "leak.bmp"):  # another file format, the same pixels
        build.picture(folder / "images" / name, seed=sum(b"a.png"))
    report = run(folder)
    assert found(report) == [
        (
            "leakage",
            "error",
            "leak.bmp: data leakage: the same image is in train as a.png; remove one",
        ),
        (
            "duplicate-image",
            "warning",
            "copy.png: the image is a copy of a.png; remove one of them",
        ),
    ]


def test_duplicates_in_the_json(build, tmp_path):
    coco = build.coco()
    coco["annotations"].append(coco["annotations"][0] | {"id": 7})
    coco["annotations"].append(coco["annotations"][1] | {"id": 7, "bbox": [1, 1, 5, 5]})
    coco["annotations"].append(coco["annotations"][1] | {"id": 0, "bbox": [1, 1, 6, 6]})
    coco["images"].append(coco["images"][0] | {"id": 3})
    coco["images"].append(coco["images"][0] | {"id": 3, "file_name": "c.png"})
    kinds = {(k, s) for k, s, _ in found(run(build.data(tmp_path / "d", train=coco), "train"))}
    assert kinds == {
        ("duplicate-id", "error"),
        ("duplicate-image", "warning"),
        ("duplicate-annotation", "warning"),
        ("annotation-id", "warning"),
    }


def test_categories_must_agree_and_be_used(build, tmp_path):
    other = build.coco(("v.png",), categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}])
    unused = build.coco()
    unused["annotations"].pop(0)
    folder = build.data(tmp_path / "d", train=unused, val=other)
    assert [(k, s) for k, s, _ in found(run(folder))] == [
        ("categories", "error"),
        ("unused-category", "warning"),
    ]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"images": []}, "empty"),
        ({"annotations": []}, "empty"),
        ({"annotations": None}, "malformed"),
        ({"images": ["a.png"]}, "malformed"),
        ({"categories": []}, "categories"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "categories"),
        ({"categories": [{"id": "x"}, {"id": [1], "name": "b"}]}, "categories"),
        ({"images": [{"id": 1, "file_name": "../../etc/x.png"}]}, "file-name"),
        ({"images": [{"id": 1, "file_name": "/etc/x.png"}]}, "file-name"),
        ({"images": [{"id": 1, "file_name": "C:\\x.png"}]}, "file-name"),
        ({"images": [{"id": [1], "file_name": "a.png"}]}, "malformed"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 9}]}, "malformed"),
        ({"annotations": [{"id": 1}]}, "unknown-image"),
    ],
)
def test_a_json_that_is_not_coco_is_reported(build, tmp_path, change, kind):
    folder = build.data(tmp_path / "d")
    (folder / "train.json").write_text(json.dumps(build.coco() | change))
    assert kind in [p.kind for p in run(folder, "train").errors]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"images": {}}', "\xff"])
def test_a_malformed_json_does_not_hide_the_other_split(build, tmp_path, text):
    folder = build.data(tmp_path / "d")
    (folder / "train.json").write_bytes(text.encode("latin-1"))
    report = run(folder)
    assert [(p.kind, p.split) for p in report.errors] == [("malformed", "train")]
    assert report.summary["val"]["images"] == 1


def test_a_malformed_json_is_reported_with_its_line(build, tmp_path):
    folder = build.data(tmp_path / "d")
    (folder / "train.json").write_text('{"images": [],\n\n"annotations"}')
    (fault,) = run(folder).errors
    assert fault.detail.startswith("line 3: not valid JSON")


def test_progress_is_told_of_every_image(build, tmp_path):
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        return items

    folder = build.data(tmp_path / "d")
    check({"train": (folder / "train.json", folder / "images")}, track)
    assert seen == [("checking train", 2)]


def test_deep_images_are_worth_a_look(build, tmp_path):
    import numpy as np
    from PIL import Image

    folder = build.data(tmp_path / "d")
    pixels = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20
    Image.fromarray(pixels).save(folder / "images" / "a.png")
    assert [(p.kind, p.file) for p in run(folder, "train").problems] == [("bit-depth", "a.png")]
