"""Detects objects in videos and draws them into each frame, with PyAV."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from ghm_d2.data.show import draw_boxes
from ghm_d2.errors import DataError, OutputError, UsageError
from ghm_d2.inference.formats import Found, distinct_stems
from ghm_d2.progress import Progress

CODECS = ("libx264", "mpeg4")  # the first one that PyAV has is used


def predict_videos(
    detect: Callable,
    files: Sequence[Path],
    folder: Path,
    names: Sequence[str],
    progress: Progress,
    on_error: Callable[[Path, DataError], None],
) -> list[Found]:
    """Run `predict_video` on each file, into `folder`, as NAME_detections.mp4.

    Args:
        on_error: is called with a video that cannot be read and the reason; unless it raises, the
            video is left out.

    Raises:
        UsageError, OutputError: as `predict_video`.
    """
    found: list[Found] = []
    for file, stem in zip(files, distinct_stems(files), strict=True):
        try:
            found += predict_video(detect, file, folder / f"{stem}_detections.mp4", names, progress)
        except DataError as error:
            on_error(file, error)
    return found


def predict_video(
    detect: Callable, file: Path, output: Path, names: Sequence[str], progress: Progress
) -> list[Found]:
    """Detect objects in each frame, and write an MP4 with the boxes drawn to `output`.

    Args:
        detect: a `Predictor` or a `SlicedPredictor`.

    Returns:
        one `Found` per frame; its file is "FILE#NUMBER", counted from 0.

    Raises:
        UsageError: PyAV is not installed, or has no encoder for videos.
        DataError: the video cannot be read.
        OutputError: the MP4 cannot be written.
    """
    try:
        import av
    except ImportError:
        raise UsageError("videos need PyAV: pip install av (or 'ghm_d2[video]')") from None
    found: list[Found] = []
    labels = dict(enumerate(names))
    with _opened(av, file) as source, _writing(av, output, source.streams.video[0]) as add:
        pictures = _pictures(av, file, source)
        tracked = progress.track(pictures, f"predicting {file.name}", _frame_count(av, source))
        for number, picture in enumerate(tracked):
            detections = detect(picture, number, f"{file}, frame {number}")
            size = (picture.shape[1], picture.shape[0])
            found.append(Found(Path(f"{file}#{number}"), size, detections))
            image = Image.fromarray(picture)
            draw_boxes(image, detections, labels)
            add(image)
    return found


def _opened(av, file: Path):
    """Open a video for reading; DataError if it is none."""
    try:
        source = av.open(str(file))
    except av.FFmpegError as error:
        raise _unreadable(file, error) from None
    if not source.streams.video:
        source.close()
        raise _unreadable(file, "it has no pictures")
    return source


def _pictures(av, file: Path, source) -> Iterator[np.ndarray]:
    """Yield each frame as (height, width, 3) RGB, uint8; DataError if one cannot be decoded."""
    try:
        for frame in source.decode(source.streams.video[0]):
            yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, reason) -> DataError:
    return DataError(f"{file}: cannot be read as a video ({reason})")


def _frame_count(av, source) -> int:
    """Return the number of frames; where it is not stored, duration times rate; 0 if unknown."""
    stream = source.streams.video[0]
    if stream.frames:
        return stream.frames
    rate = stream.average_rate or stream.guessed_rate
    seconds = Fraction(source.duration or 0, av.time_base)
    return max(0, round(seconds * rate)) if rate else 0


@contextmanager
def _writing(av, file: Path, source):
    """Open an MP4, and give a function that adds a picture; after an error no file is left.

    Raises:
        OutputError: the MP4 cannot be encoded or written.
    """
    try:
        with av.open(str(file), "w") as target:
            drawn = _stream(av, target, source)

            def add(picture: Image.Image) -> None:
                even = picture.crop((0, 0, drawn.width, drawn.height))
                for packet in drawn.encode(av.VideoFrame.from_image(even)):
                    target.mux(packet)

            yield add
            for packet in drawn.encode():
                target.mux(packet)
    except Exception as error:
        file.unlink(missing_ok=True)
        if isinstance(error, av.FFmpegError):  # decoding has its own handler, so it is ours
            raise OutputError.of(file, error) from None
        raise


def _stream(av, target, source):
    """Add a stream of the source's size and rate, with even sides, as the codecs require."""
    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UsageError(
            f"the installed PyAV cannot write videos, because it lacks the codecs "
            f"{', '.join(CODECS)}; install it from PyPI: pip install --force-reinstall av"
        )
    drawn = target.add_stream(codec, rate=source.average_rate or 25)
    drawn.width, drawn.height = (max(2, side - side % 2) for side in (source.width, source.height))
    drawn.pix_fmt = "yuv420p"
    return drawn
