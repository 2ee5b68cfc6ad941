"""An importer turns any annotation files into a sound data set, or an error of one line."""

import copy
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from import_judge import SOUND, WORDS, judge_import, make_folder
from json_places import places

FILES = [(kind, name) for kind, files in SOUND.items() for name in files]
COCO = json.loads(SOUND["coco"]["train.json"])
thorough = settings(max_examples=25, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Imports a sound folder with other contents of some files, or without those that are None;
    judges what comes of it, and tells whether it was a data set."""
    work = tmp_path_factory.mktemp("import")

    def run(kind: str, changed: dict[str, bytes | None]) -> bool:
        sound = {name: text.encode() for name, text in SOUND[kind].items()}
        contents = {n: content for n, content in (sound | changed).items() if content is not None}
        with tempfile.TemporaryDirectory(dir=work) as folder:
            source = make_folder(kind, Path(folder) / "source", contents)
            return judge_import(source, kind)

    return run


odd_texts = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
odd_numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**30), 2**63, 1e308, 2**53 + 1])
)
scalars = st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts)
keys = ("id", "image_id", "category_id", "bbox", "size", "counts", "segmentation", "name", "")
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(keys) | odd_texts, inner, max_size=4)
    ),
    max_leaves=12,
)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


contents = st.one_of(
    st.binary(max_size=40),
    st.text().map(encoded),
    st.text().map(lambda text: text.encode("utf-16", "surrogatepass")),
    json_values.map(json.dumps).map(str.encode),
)


@pytest.mark.parametrize("kind", SOUND)
def test_sound_folders_are_imported(imported, kind):
    assert imported(kind, {})


@pytest.mark.parametrize(("kind", "name"), FILES)
@thorough
@given(content=contents)
def test_any_file(imported, kind, name, content):
    imported(kind, {name: content})


@st.composite
def damaged(draw, text: str) -> bytes:
    """A text with some of its words (or brackets, or spaces) replaced, left out or repeated."""
    words = re.findall(r"[\w.+]+|\s+|.", text)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(words) - 1))
        words[place] = draw(st.one_of(st.just(""), st.just(words[place] * 2), odd_texts))
    return encoded("".join(words))


@pytest.mark.parametrize(("kind", "name"), FILES)
@thorough
@given(data=st.data())
def test_a_file_with_other_words(imported, kind, name, data):
    imported(kind, {name: data.draw(damaged(SOUND[kind][name]))})


@st.composite
def changed_json(draw, sound) -> bytes:
    """A JSON value with other values at up to three places, or without them."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(list(places(value)) or [()])) or [None]
        inner = value
        for key in path:
            inner = inner[key]
        if draw(st.booleans()):
            inner[last] = draw(json_values)
        elif last is not None:
            del inner[last]
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@settings(thorough, max_examples=100)
@given(content=changed_json(COCO))
def test_a_coco_json_with_other_values(imported, content):
    imported("coco", {"train.json": content})


@st.composite
def yaml_of_values(draw) -> bytes:
    """A data.yaml of the right keys with any values; JSON is YAML."""
    names = st.lists(odd_texts, max_size=4) | st.dictionaries(scalars.map(str), json_values)
    folders = st.sampled_from(["images", "val.txt", "./", "..", "labels", "/", "images/../images"])
    split = folders | st.lists(folders, max_size=3) | json_values
    values = {"names": names | json_values, "path": folders | json_values, "train": split}
    values |= {"val": split, "valid": split, "test": split, "kpt_shape": json_values}
    return json.dumps(draw(st.fixed_dictionaries({}, optional=values))).encode()


@thorough
@given(content=yaml_of_values())
def test_a_data_yaml_with_any_values(imported, content):
    imported("yolo", {"data.yaml": content})


@thorough
@given(lines=st.lists(st.lists(st.one_of(odd_numbers.map(str), odd_texts), max_size=9), max_size=4))
def test_yolo_labels_of_any_numbers(imported, lines):
    text = "\n".join(" ".join(line) for line in lines)
    imported("yolo", {"labels/a.txt": encoded(text)})


xml_texts = st.one_of(odd_numbers.map(str), odd_texts, st.sampled_from(["cat", "5", ""]))


@st.composite
def xml_of_values(draw) -> bytes:
    """A VOC file whose elements hold any text, or are left out."""

    def element(name, content):
        return f"<{name}>{content}</{name}>" if draw(st.integers(0, 9)) else ""

    def text(name):
        return element(name, draw(xml_texts).replace("<", "&lt;").replace("&", "&amp;"))

    def several(name, *children):
        return element(name, "".join(text(child) for child in children))

    box = several("bndbox", "xmin", "ymin", "xmax", "ymax")
    thing = element("object", text("name") + text("difficult") + box)
    head = text("filename") + several("size", "width", "height")
    return encoded(element("annotation", head + thing * draw(st.integers(0, 2))))


@thorough
@given(content=xml_of_values())
def test_a_voc_file_with_any_values(imported, content):
    changed = {"Annotations/a.xml": content, "labels.txt": None, "ImageSets/Main/train.txt": None}
    imported("voc", changed)


PICTURE = """{"images": [{"id": %s, "file_name": "%s"}], "annotations": [],
 "categories": [{"id": 1, "name": "%s"}]}"""
XML = """<annotation><object><name>%s</name>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"""
FOUND_BY_FUZZING = [
    ("coco", {"train.json": PICTURE % ("false", "a.png", "cat")}),
    ("coco", {"train.json": PICTURE % ("-1", "a.png", "cat")}),
    ("coco", {"train.json": PICTURE % ("1", ".", "cat")}),
    ("coco", {"train.json": PICTURE % ("1", "a\\u001b", "cat")}),
    ("coco", {"train.json": PICTURE % ("1", "a.png", "\\ud800")}),
    ("voc", {"ImageSets/Main/train.txt": "a\n././/"}),
    ("voc", {"ImageSets/Main/train.txt": "\x02ba"}),
    ("voc", {"Annotations/a.xml": XML % "cat\ndog"}),
    ("yolo", {"data.yaml": "names: [a]\nval: val.txt", "val.txt": "oejb\x08<>"}),
    ("yolo", {"data.yaml": 'names: [a]\nval: "a\\eb"', "val.txt": ""}),
]


@pytest.mark.parametrize(("kind", "changed"), FOUND_BY_FUZZING)
def test_files_that_once_did_harm(imported, kind, changed):
    imported(kind, {name: text.encode() for name, text in changed.items()})
