"""Folders, patterns, videos and slices: what `ghm predict` looks at."""

import resource
import sys
import wave
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ghm_d2.errors import DataError, OutputError, UsageError
from ghm_d2.inference.slices import SlicedPredictor
from ghm_d2.inference.sources import find_sources
from ghm_d2.inference.video import predict_video, predict_videos
from ghm_d2.progress import Progress


def test_folders_and_patterns_name_images_and_videos_once(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "clip.mp4", "in/c.png", "d.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images, videos, named = find_sources([str(tmp_path), str(tmp_path / "a.jpg")])
    assert [f.name for f in images] == ["a.jpg", "b.PNG"]  # a GIF cannot be decoded
    assert [f.name for f in videos] == ["clip.mp4"] and named == {tmp_path / "a.jpg"}
    images, _, named = find_sources([str(tmp_path / "**" / "*.png")])
    assert [f.name for f in images] == ["c.png"] and not named
    (tmp_path / "odd.raw").touch()
    assert find_sources([str(tmp_path / "odd.raw")])[0]  # who names a file means it
    for wrong in (tmp_path / "none", tmp_path / "*.webm"):
        with pytest.raises(DataError, match="no image or video"):
            find_sources([str(wrong)])


def test_a_folder_of_folders_tells_the_pattern_to_give(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"no image or video found: \S+$"):
        find_sources([str(tmp_path)])
    (tmp_path / "train" / "a.jpg").touch()
    with pytest.raises(DataError) as caught:
        find_sources([str(tmp_path)])
    pattern = str(caught.value).split("'")[1]
    assert [f.name for f in find_sources([pattern])[0]] == ["a.jpg"]


def squares(picture: np.ndarray, image_id: int = 0, name: str = "") -> list[dict]:
    """A detector of bright pixels: one box around each of at most one patch a picture."""
    bright = picture.max(2) > 128
    if not bright.any():
        return []
    rows, columns = np.nonzero(bright)
    x, y = int(columns.min()), int(rows.min())
    box = [float(x), float(y), float(columns.max() - x + 1), float(rows.max() - y + 1)]
    return [{"image_id": image_id, "category_id": 0, "bbox": box, "score": 0.75}]


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="av is not installed (ghm_d2[video])")


def write_video(av, file: Path) -> Path:
    """A patch that moves 10 px in each of six frames."""
    with av.open(str(file), "w") as target:
        stream = target.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(6):
            picture = np.zeros((64, 96, 3), np.uint8)
            picture[20:40, 10 * i : 10 * i + 20] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return file


def test_each_frame_of_a_video_has_its_boxes_drawn(av, tmp_path):
    out = tmp_path / "out.mp4"
    found = predict_video(squares, write_video(av, tmp_path / "in.mp4"), out, ["patch"], Progress())
    assert [f.file.name for f in found] == [f"in.mp4#{i}" for i in range(6)]
    assert [round(f.detections[0]["bbox"][0] / 10) for f in found] == [0, 1, 2, 3, 4, 5]
    with av.open(str(out)) as file:
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in file.decode(video=0)]
    assert len(frames) == 6 and frames[0].shape == (64, 96, 3)
    spread = [np.ptp(frame, axis=2).max() for frame in frames]  # the frame's colour on grey
    assert min(spread) > 60


def test_what_is_no_video_is_told_and_leaves_nothing(av, tmp_path):
    (tmp_path / "in.mp4").write_bytes(b"not a video" * 99)
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    for name in ("in.mp4", "sound.mp4"):
        with pytest.raises(DataError, match="cannot be read as a video"):
            predict_video(squares, tmp_path / name, tmp_path / "out.mp4", ["patch"], Progress())
        assert not (tmp_path / "out.mp4").exists()


def test_the_other_videos_of_a_folder_are_read(av, tmp_path):
    good, bad = write_video(av, tmp_path / "b.mp4"), tmp_path / "a.mp4"
    bad.write_bytes(b"not a video" * 99)
    told = []
    found = predict_videos(
        squares, [bad, good], tmp_path, ["patch"], Progress(), lambda *what: told.append(what)
    )
    assert [f.file.name for f in found] == [f"b.mp4#{i}" for i in range(6)]
    assert [file for file, _ in told] == [bad]
    assert (tmp_path / "b_detections.mp4").exists() and not (tmp_path / "a_detections.mp4").exists()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_the_number_of_frames_is_estimated_if_it_is_not_stored(av, tmp_path, suffix):
    totals = []

    class Noting(Progress):
        def track(self, items, description, total):
            totals.append(total)
            yield from items

    video = write_video(av, tmp_path / f"in.{suffix}")
    found = predict_video(squares, video, tmp_path / "out.mp4", ["patch"], Noting())
    assert totals == [6] == [len(found)]


@contextmanager
def file_size_limit(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_video_that_cannot_be_written_is_told_as_such(av, tmp_path):
    video, out = write_video(av, tmp_path / "in.mp4"), tmp_path / "out.mp4"
    with file_size_limit(100), pytest.raises(OutputError, match=r"out\.mp4 cannot be written"):
        predict_video(squares, video, out, ["patch"], Progress())
    assert not out.exists()


def test_an_error_of_the_detector_is_not_laid_to_the_video(av, tmp_path):
    def fails(*_):
        raise IndexError("a bug")

    video = write_video(av, tmp_path / "in.mp4")
    with pytest.raises(IndexError, match="a bug"):
        predict_video(fails, video, tmp_path / "out.mp4", ["patch"], Progress())
    assert not (tmp_path / "out.mp4").exists()


def test_slices_find_what_the_whole_picture_hides():
    pytest.importorskip("sahi", reason="sahi is not installed (ghm_d2[slices])")
    picture = np.zeros((120, 200, 3), np.uint8)
    picture[10:20, 10:20] = picture[90:100, 180:190] = 255

    def one_slice(image, *arguments):
        return squares(image, *arguments) if max(image.shape) <= 100 else []

    found = SlicedPredictor(one_slice, 100, ["patch"], 0.5)(picture, 7)
    assert sorted(tuple(d["bbox"]) for d in found) == [(10, 10, 10, 10), (180, 90, 10, 10)]
    assert all(d["image_id"] == 7 and d["score"] == 0.75 for d in found)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    for name in ("sahi.models.base", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="pip install sahi"):
        SlicedPredictor(squares, 100, ["patch"])
    with pytest.raises(UsageError, match="pip install av"):
        predict_video(squares, tmp_path / "a.mp4", tmp_path / "b.mp4", [], Progress())
