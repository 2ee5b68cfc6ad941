"""The imported folder of any format: splits, links, clipped boxes, and the files that it spares."""

import json

import pytest
from import_judge import details, load, load_all

from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError, UsageError


def test_the_output_is_the_same_each_time_and_imports_again(coco, tmp_path):
    for name in ("one", "two"):
        import_folder(coco, tmp_path / name)
    import_folder(tmp_path / "one", tmp_path / "three")
    for split in ("train", "val"):
        texts = {(tmp_path / n / f"{split}.json").read_text() for n in ("one", "two", "three")}
        assert len(texts) == 1


def test_the_split_is_seeded_and_has_the_asked_share(build, tmp_path):
    for i in range(10):
        build.voc_image(tmp_path / "voc", f"{i}", build.voc_object())
    names = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"out{number}"
        report = import_folder(tmp_path / "voc", out, split=0.7, seed=seed)
        assert [s["images"] for s in report["splits"].values()] == [7, 3]
        names.append([i["file_name"] for i in load(out, "val")[0]["images"]])
    assert names[0] == names[1] != names[2]


def test_images_are_linked_or_copied(coco, tmp_path):
    import_folder(coco, tmp_path / "linked")
    import_folder(coco, tmp_path / "copied", copy=True)
    original = coco / "images" / "a.png"
    linked, copied = (tmp_path / f / "images" / "a.png" for f in ("linked", "copied"))
    assert linked.is_symlink() and not copied.is_symlink()
    assert linked.read_bytes() == copied.read_bytes() == original.read_bytes()


def test_boxes_are_clipped_to_the_image_and_told(build, tmp_path):
    found = build.coco()
    found["annotations"][0]["bbox"] = [-5, 40, 20, 30]
    build.data(tmp_path / "coco", train=found)
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    assert load_all(tmp_path / "out")[1][0] == ("a.png", 2, 0, 40, 15, 8)
    assert report["clipped"] == ["train.json: annotation 1: box [-5, 40, 20, 30]"]


def test_an_image_that_exif_turns_must_be_annotated_as_turned(build, tmp_path):
    from PIL import Image

    folder = tmp_path / "voc"
    build.voc_image(folder, "a", build.voc_object())
    for stem in "bcde":
        build.voc_image(folder, stem, build.voc_object())
    path = folder / "JPEGImages" / "a.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.copy().save(path, exif=exif)
    report = import_folder(folder, tmp_path / "out")
    assert "a.jpg is 48 x 64 px (rotated by its EXIF orientation), but" in details(report)[0]


@pytest.mark.parametrize("kind", ["empty", "nothing"])
def test_a_folder_without_data_is_refused(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    with pytest.raises(DataError, match=r"no data set recognised|not a folder"):
        import_folder(folder, tmp_path / "out")


def test_a_folder_of_two_formats_needs_to_be_told_which(yolo, build, tmp_path):
    (yolo / "train.json").write_text(json.dumps(build.coco(("train/a.png",))))
    with pytest.raises(UsageError, match="looks like yolo and coco"):
        import_folder(yolo, tmp_path / "out")
    assert import_folder(yolo, tmp_path / "out", kind="yolo")["format"] == "yolo"


def test_an_import_where_nothing_is_usable_is_refused(build, tmp_path):
    build.voc_image(tmp_path / "voc", "a", build.voc_object(), image=False)
    (tmp_path / "voc" / "JPEGImages").mkdir()
    with pytest.raises(
        DataError, match=r"such as a\.jpg\) is in .*pass their folder with --images"
    ):
        import_folder(tmp_path / "voc", tmp_path / "out")


def test_existing_files_are_safe(coco, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        import_folder(coco, out)
    with pytest.raises(UsageError, match=r"contains thesis\.txt"):
        import_folder(coco, out, overwrite=True)
    with pytest.raises(UsageError, match="contains the source data"):
        import_folder(coco / "images", coco, overwrite=True)
    import_folder(coco, tmp_path / "fine")
    with pytest.raises(UsageError, match="was not written by ghm"):
        import_folder(tmp_path / "fine", coco, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    assert (coco / "images" / "a.png").is_file()


def test_overwrite_replaces_what_ghm_wrote_and_only_when_it_succeeds(coco, build, tmp_path):
    out = tmp_path / "out"
    import_folder(coco, out)
    build.voc_image(tmp_path / "voc", "x", build.voc_object("dog", (9, 9, 1, 1)))
    with pytest.raises(DataError):
        import_folder(tmp_path / "voc", out, overwrite=True, strict=True)
    assert len(load(out, "train")[0]["images"]) == 2
    import_folder(tmp_path / "voc", out, overwrite=True)
    assert [i["file_name"] for i in load(out, "train")[0]["images"]] == ["x.jpg"]
    assert not (out / "val.json").exists()
