"""A large JSON is checked once for its content, by one of the processes that need it."""

import json
import multiprocessing
import os

import pytest

from ghm_d2.data.checking import validate
from ghm_d2.data.checking.validate import inspect_json, missing_images, validate_json
from ghm_d2.errors import DataError


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """Every file counts as large, in a cache of the test's own; the list grows with each check."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(validate, "REMEMBERED_BYTES", 0)
    done, check = [], validate._check
    monkeypatch.setattr(validate, "_check", lambda *given: done.append(1) or check(*given))
    return done


def start(folder, split="train"):
    """Return the findings at the start of a process that has not asked before."""
    validate._inspect_json.cache_clear()
    return validate_json(str(folder / f"{split}.json"), str(folder / "images"))


def memo(tmp_path):
    (file,) = (tmp_path / "cache" / "ghm_d2" / "checked").iterdir()
    return file


def faulty(build):
    coco = build.coco()
    coco["annotations"][0]["bbox"] = [3, 4, 1.03, 0.0]
    return coco


def test_the_second_start_knows_what_the_first_found(build, tmp_path, checks):
    folder = build.data(tmp_path / "d", train=faulty(build))
    first = start(folder)
    assert len(first) == 1 and "has no area" in first[0]
    (tmp_path / "moved").symlink_to(folder)
    assert start(folder) == first
    assert start(tmp_path / "moved") == [line.replace("/d/", "/moved/") for line in first]
    assert len(checks) == 1
    (folder / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"no such image: .*b\.png"):
        start(folder)


def test_an_edited_file_is_checked_again(build, tmp_path, checks):
    folder = build.data(tmp_path / "d", train=faulty(build))
    start(folder)
    file = folder / "train.json"
    before = file.stat()
    file.write_text(file.read_text().replace("1.03, 0.0", "1.03,-1.0"))  # of the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="inverted or empty"):
        start(folder)


@pytest.mark.parametrize(
    "text", ["", "{", '{"findings": []}', "\n", "x\n{}", "[" * 9999, "\0" * 99]
)
def test_a_damaged_memo_is_ignored_and_replaced(build, tmp_path, checks, text):
    folder = build.data(tmp_path / "d", train=faulty(build))
    first = start(folder)
    memo(tmp_path).write_text(text)
    assert start(folder) == start(folder) == first
    sound = memo(tmp_path).read_bytes()
    memo(tmp_path).write_bytes(sound.replace(b"empty-box", b"other-box"))
    assert start(folder) == first
    assert len(checks) == 3


def test_a_memo_that_others_can_write_is_ignored(build, tmp_path, checks):
    folder = build.data(tmp_path / "d", train=faulty(build))
    first = start(folder)
    sound = memo(tmp_path).read_bytes()
    memo(tmp_path).chmod(0o666)
    assert start(folder) == first and len(checks) == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(sound)
    file = memo(tmp_path)
    file.unlink()
    file.symlink_to(elsewhere)
    assert start(folder) == first and len(checks) == 3


def test_without_a_cache_the_check_is_made_each_time(build, tmp_path, checks):
    folder = build.data(tmp_path / "d", train=faulty(build))
    (tmp_path / "cache").write_text("")  # a file where the folder would be
    assert start(folder) == start(folder)
    assert len(checks) == 2


def test_a_check_that_fails_is_not_remembered(build, tmp_path, checks, monkeypatch):
    folder = build.data(tmp_path / "d", train=faulty(build))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(validate, "_check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    assert len(start(folder)) == len(checks) == 1


def _ask(file, gate, done):
    check = validate._check
    validate.REMEMBERED_BYTES = 0
    validate._check = lambda *given: done.put(1) or check(*given)
    gate.wait()
    inspect_json(file)


def test_of_several_processes_one_checks(build, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "train.json"
    file.write_text(json.dumps(build.coco(tuple(f"{i}.png" for i in range(2000)))))
    context = multiprocessing.get_context("fork")
    gate, done = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=_ask, args=(str(file), gate, done)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert done.get(timeout=10) == 1 and done.empty()


def test_images_are_missed_in_folders_large_and_small(tmp_path):
    names = [f"many/{i}.jpg" for i in range(150)] + ["few/a.jpg", "few/b.jpg", "none/c.jpg"]
    for name in names[:151]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "many" / "7.jpg").unlink()
    (tmp_path / "many" / "8.jpg").unlink()
    (tmp_path / "many" / "8.jpg").mkdir()
    (tmp_path / "many" / "9.jpg").unlink()
    (tmp_path / "many" / "9.jpg").symlink_to("10.jpg")
    gone = ["many/7.jpg", "many/8.jpg", "few/b.jpg", "none/c.jpg"]
    assert missing_images(names, str(tmp_path)) == gone
