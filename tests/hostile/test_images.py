"""Pictures that are none, or are far larger than their files, to import and to predict on."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

from PIL import Image
from sound_files import imported, trained, voc_object
from traps import Case, each, faults


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of zeros; its pixels are compressed row by row, and never held together."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )
    packer = zlib.compressobj(1)
    rows = [packer.compress(bytes(1 + 3 * width)) for _ in range(min(height, 500))]
    return (
        start
        + b"".join(more)
        + chunk(b"IDAT", b"".join(rows) + packer.flush())
        + chunk(b"IEND", b"")
    )


def tiff(width: int, height: int) -> bytes:
    """A TIFF of one strip whose header says that it is large."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1),
            (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, 16)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    strip = zlib.compress(bytes(100))[:16].ljust(16, b"\0")
    return (
        b"II*\0" + struct.pack("<I", 24) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def cut_jpeg() -> bytes:
    """The first half of a JPEG."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


def gif() -> bytes:
    """A GIF whose screen is 65535 x 65535."""
    return (
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02L\x01\x00;"
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 1))

IMAGES = {
    "PNG, 50,000 x 50,000 px": ("a.png", png(50_000, 50_000), "limit"),
    "PNG, 2^31 x 2^31 px": (
        "a.png",
        png(40, 32)[:16] + b"\x7f\xff\xff\xff" * 2 + png(40, 32)[24:],
        "decoded|limit",
    ),
    "PNG with 256 MB of packed text": ("a.png", png(40, 32, TEXT_BOMB), "decoded"),
    "JPEG, cut": ("a.jpg", cut_jpeg(), "decoded"),
    "TIFF, 60,000 x 60,000 px": ("a.tif", tiff(60_000, 60_000), "limit"),
    "GIF, 65535 x 65535 px, named .png": ("a.png", gif(), "decoded"),
    "SVG named .png": ("a.png", SVG, "decoded"),
    "EPS named .png": ("a.png", EPS, "decoded"),
    "a pipe named .png": ("a.png", None, "no image|not a file"),
    "/dev/zero named .png": ("a.png", "/dev/zero", "no image|not a file"),
}
PREDICTED = ("PNG, 50,000 x 50,000 px", "JPEG, cut", "EPS named .png", "a pipe named .png")


def place(path: Path, data) -> None:
    """A file of these bytes, a link to this path, or a pipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        os.mkfifo(path)
    elif isinstance(data, str):
        path.symlink_to(data)
    else:
        path.write_bytes(data)


def image_cases(tried: str, name: str, data, says: str) -> list[Case]:
    """The image in a VOC folder to import, and for some to predict on."""

    def annotated(work: Path) -> None:
        place(work / "source/JPEGImages" / name, data)
        (work / "source/Annotations").mkdir()
        (work / "source/Annotations/a.xml").write_text(voc_object(), encoding="utf-8")

    def beside(work: Path) -> None:
        trained(work)
        place(work / name, data)

    cases = [imported("image", f"{tried}, to import", annotated, says)]
    if tried in PREDICTED:
        command = ("predict", "--weights", "run/model.pth", "--output", "out", "--device", "cpu")
        cases.append(Case("image", f"{tried}, to predict on", beside, (*command, name), says))
    return cases


CASES = [case for tried, row in IMAGES.items() for case in image_cases(tried, *row)]


@each(CASES)
def test_it_is_refused(case, tmp_path):
    assert faults(case, tmp_path) == []
