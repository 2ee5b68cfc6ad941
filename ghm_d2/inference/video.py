"""Detects objects in videos and draws them into each frame, with PyAV."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ghm_d2.data.show import draw_boxes
from ghm_d2.errors import DataError, UsageError
from ghm_d2.inference.formats import Found
from ghm_d2.progress import Progress

CODECS = ("libx264", "mpeg4")  # the first one that PyAV has is used


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
    """
    try:
        import av
    except ImportError:
        raise UsageError("videos need PyAV: pip install av (or 'ghm_d2[video]')") from None
    found: list[Found] = []
    labels = dict(enumerate(names))
    try:
        with av.open(str(file)) as source, av.open(str(output), "w") as target:
            stream = source.streams.video[0]
            drawn = _stream(av, target, stream)
            frames = progress.track(source.decode(stream), f"predicting {file.name}", stream.frames)
            for number, frame in enumerate(frames):
                picture = frame.to_ndarray(format="rgb24")
                detections = detect(picture, number, f"{file}, frame {number}")
                size = (picture.shape[1], picture.shape[0])
                found.append(Found(Path(f"{file}#{number}"), size, detections))
                image = Image.fromarray(picture)
                draw_boxes(image, detections, labels)
                even = image.crop((0, 0, drawn.width, drawn.height))
                for packet in drawn.encode(av.VideoFrame.from_image(even)):
                    target.mux(packet)
            for packet in drawn.encode():
                target.mux(packet)
    except (av.FFmpegError, IndexError) as error:
        output.unlink(missing_ok=True)
        raise DataError(f"{file}: cannot be read as a video ({error})") from None
    return found


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
