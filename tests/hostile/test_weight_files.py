"""Weight files that run code, lie about their contents or unpack without end."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from sound_files import CONFIG, ESCAPE, Evil, picture
from traps import Case, each, faults


def weights(tried: str, name: str, write, says: str, config: str = CONFIG, check=None) -> Case:
    """A weight file, through `ghm predict`; write(path, work) makes it."""

    def whole(work: Path) -> None:
        picture(work / "a.png")
        write(work / name, work)

    command = ("predict", "--weights", name, "--config", config, "--output", "out", "a.png")
    return Case(f"weights {Path(name).suffix}", tried, whole, command, says, check=check)


def saved(content: Callable, legacy: bool = False):
    """Writes `content(work)` with torch.save."""

    def write(path: Path, work: Path) -> None:
        torch.save(content(work), path, _use_new_zipfile_serialization=not legacy)

    return write


def pickled(content: Callable, protocol: int = 2):
    """Writes `content(work)` with pickle."""
    return lambda path, work: path.write_bytes(pickle.dumps(content(work), protocol))


def raw(data: bytes):
    """Writes `data`."""
    return lambda path, work: path.write_bytes(data)


def lying_tensor(path: Path, work: Path) -> None:
    """A torch zip whose one tensor says that it has 2**38 numbers, and has four."""
    file, big = io.BytesIO(), b"\x8a\x05" + (2**38).to_bytes(5, "little")
    torch.save({"model": {"a": torch.zeros(4)}}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, data.replace(b"K\x04", big) if "data.pkl" in member else data)


def zip_bomb(path: Path, work: Path) -> None:
    """A torch zip of 1.5 MB that unpacks to 1.5 GB."""
    file = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(4)}}, file)
    with (
        zipfile.ZipFile(file) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, True, 1) as new,
    ):
        for member in old.namelist():
            if member.endswith("data/0"):
                with new.open(member, "w", force_zip64=True) as out:
                    for _ in range(96):
                        out.write(bytes(2**24))
            else:
                new.writestr(member, old.read(member))


def old_tar(path: Path, work: Path) -> None:
    """PyTorch's oldest format, a tar, with a link out of it in the place of the storages."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, str(work.parent / "secret.txt")
            tar.addfile(member)


def many_bytes(path: Path, work: Path) -> None:
    """A torch zip whose pickle calls bytearray(2**36)."""
    call = b"cbuiltins\nbytearray\n\x8a\x05" + (2**36).to_bytes(5, "little") + b"\x85R"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}U\x05model}U\x01a" + call + b"sss.")
        file.writestr("a/version", "3\n")
        file.writestr("a/byteorder", "little")


def modest(output: Path, result) -> list[str]:
    """Reading a pickle takes no more memory than it has contents; the rest is the process."""
    return [f"{result.resident} bytes of memory"] if result.resident > 2**30 else []


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = bytes(16)):
    """Writes a safetensors file with this header, and perhaps another length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    return raw(size + text + data)


CASES = [
    weights("a pickle that runs code", "w.pth", pickled(Evil), "w.pth was refused: .*posix.system"),
    weights("the same within model.a.b, zip", "w.pth",
            saved(lambda work: {"model": {"a": {"b": Evil(work)}}}), "refused: .*posix.system"),
    weights("the same within optimizer, zip", "w.pth",
            saved(lambda work: {"model": {}, "optimizer": Evil(work)}), "refused"),
    weights("the same within trainer, before zip", "w.pth",
            saved(lambda work: {"model": {}, "trainer": [Evil(work)]}, legacy=True), "refused"),
    weights("a pickle that runs code", "w.pkl", pickled(Evil), "w.pkl was refused: .*posix.system"),
    weights("the same within blobs, protocol 4", "w.pkl",
            pickled(lambda work: {"blobs": {"a": Evil(work)}}, 4), "refused"),
    weights("a memo index of 2^31: 32 GiB", "w.pkl",
            raw(b"\x80\x02}r\xf0\xff\xff\x7f."), "has no weights"),
    weights("a memo index of 2^27: 1 GiB", "w.pkl",
            raw(b"\x80\x02]r" + struct.pack("<I", 2**27) + b"."), "has no weights",
            check=modest),
    weights("a bytearray said to have 2^31 bytes", "w.pkl",
            raw(b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**31) + b"abc."),
            "truncated or not", check=modest),
    weights("an array said to have 2^40 bytes", "w.pkl",
            raw(b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"."), "truncated or not"),
    weights("a tensor said to have 2^38 numbers", "w.pth", lying_tensor, "truncated or not"),
    weights("1.5 MB that unpack to 1.5 GB", "w.pth", zip_bomb, "compressed"),
    weights("bytearray(2**36)", "w.pth", many_bytes, "refused: .*bytearray"),
    weights("an old tar with links out of it", "w.pth", old_tar, "truncated or not|refused"),
    weights("offsets beyond the file", "w.safetensors",
            safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}),
            "truncated or not a safetensors"),
    weights("a shape of 2^60 numbers", "w.safetensors",
            safetensors({"a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 16]}}),
            "truncated or not a safetensors"),
    weights("a header of 2^60 bytes", "w.safetensors",
            safetensors(b"{}", 2**60), "truncated or not a safetensors"),
    weights("deep nesting in the header", "w.safetensors",
            safetensors(b"[" * 10**5), "truncated or not a safetensors"),
    weights("a cut header", "w.weights", raw(b"\0" * 7), "header", "coco/yolov3_darknet53.yaml"),
    weights("a count of images of 2^63, and noise", "w.weights",
            raw(struct.pack("<3iq", 0, 2, 0, 2**63 - 1) + b"\xff" * 4001), "does not fit",
            "coco/yolov3_darknet53.yaml"),
    weights("the terminal's escape sequences in names of tensors", "w.pth",
            saved(lambda work: {"model": {ESCAPE: torch.zeros(1)}}), "another model"),
]  # fmt: skip


@each(CASES)
def test_it_is_refused(case, tmp_path):
    assert faults(case, tmp_path) == []
