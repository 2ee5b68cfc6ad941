"""Pascal VOC folders: what an import keeps, drops by name, and refuses."""

import json

import pytest
from import_judge import details, load, load_all

from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError


def test_voc_boxes_lose_one_pixel_at_the_top_left_and_classes_are_sorted(voc, tmp_path):
    report = import_folder(voc, tmp_path / "out", split=0.5)
    assert load_all(tmp_path / "out")[1] == [("a.jpg", 2, 0, 0, 10, 20), ("b.jpg", 1, 4, 5, 60, 43)]
    assert report["names"] == ["cat", "dog"]
    assert sum(s["background"] for s in report["splits"].values()) == 1
    assert "became val" in report["notes"][0]


def test_voc_splits_come_from_image_sets(voc, tmp_path):
    sets = voc / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a\nb\n")
    (sets / "val.txt").write_text("c -1\nmissing\n")
    report = import_folder(voc, tmp_path / "out")
    assert [i["file_name"] for i in load(tmp_path / "out", "train")[0]["images"]] == [
        "a.jpg",
        "b.jpg",
    ]
    assert [i["file_name"] for i in load(tmp_path / "out", "val")[0]["images"]] == ["c.jpg"]
    assert details(report) == ["ImageSets/Main/val.txt: no annotation file missing.xml"]


def test_voc_classes_follow_a_label_file_and_others_are_unknown(voc, tmp_path):
    (voc / "labels.txt").write_text("zebra\ndog\n")
    report = import_folder(voc, tmp_path / "out")
    assert report["names"] == ["zebra", "dog"]
    assert details(report) == ["Annotations/b.xml: object 1: unknown category 'cat'"]


def test_voc_difficult_objects_keep_their_mark(voc, build, tmp_path):
    build.voc_image(voc, "d", build.voc_object("cat", more="<difficult>1</difficult>"))
    import_folder(voc, tmp_path / "out")
    marks = [a.get("difficult") for a in load_all(tmp_path / "out")[0]]
    assert sorted(marks, key=str) == [1, None, None]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((30, 6, 20, 30), r"\(30, 6, 20, 30\) is inverted or empty"),
        ((7, 8, 7, 8), r"\(7, 8, 7, 8\) is inverted or empty"),
        (("nan", 6, 20, 30), "not finite"),
        ((5, 6, "inf", 30), "not finite"),
        ((70, 6, 90, 30), "outside the image of 64 x 48"),
    ],
)
def test_a_bad_box_is_dropped_and_named_or_refused(voc, build, tmp_path, box, words):
    build.voc_image(voc, "bad", build.voc_object("cat"), build.voc_object("dog", box))
    report = import_folder(voc, tmp_path / "out")
    (dropped,) = details(report)
    with pytest.raises(DataError, match=words):
        raise DataError(dropped)
    assert dropped.startswith("Annotations/bad.xml: object 2: ")
    assert json.loads((tmp_path / "out" / "import_report.json").read_text()) == report
    with pytest.raises(DataError, match=rf"bad\.xml: object 2: .*{words}"):
        import_folder(voc, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "bad.xml:1: not valid XML"),
        ("<annotation><object></annotation>", "bad.xml:1: not valid XML"),
        (
            '<!DOCTYPE a [<!ENTITY b "b"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>',
            "declares XML entities",
        ),
        (
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>',
            "declares XML entities",
        ),
        ("<?xml version='1.0' encoding='nonsense'?><a/>", "not valid XML"),
    ],
)
def test_malformed_xml_is_refused_with_its_name(voc, tmp_path, text, words):
    (voc / "Annotations" / "bad.xml").write_text(text)
    with pytest.raises(DataError) as error:
        import_folder(voc, tmp_path / "out")
    assert words in str(error.value) and "bad.xml" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voc"]


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg"])
def test_voc_names_cannot_leave_the_folder(voc, build, tmp_path, name):
    path = build.voc_image(voc, "bad", image=False)
    path.write_text(path.read_text().replace("bad.jpg", name))
    build.picture(tmp_path / "secret.jpg")
    report = import_folder(voc, tmp_path / "out")
    assert "points outside the image folder" in details(report)[0] and len(details(report)) == 1
