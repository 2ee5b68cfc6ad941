"""darknet's weight files: raw float32 numbers in the order of the cfg file's layers.

The header holds int32 major, minor and revision, and the number of training images seen (int64
from version 0.2 on, int32 before). Each convolution follows with its biases; with batch norm its
weights, running means and running variances; and its kernel (out, in, height, width). Source:
darknet's src/parser.c, load_weights_upto and load_convolutional_weights. The file does not name
its network, so that only its length can be checked.
"""

import os
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ghm_d2.errors import WeightsError
from ghm_d2.files import write_atomically
from ghm_d2.modeling.yolov3.darknet import DarkNet
from ghm_d2.modeling.yolov3.head import YOLOv3Head

# whole models, checkpoints, and DarkNet-53 alone (74 layers, 52 of them convolutions)
ENDINGS = (".weights", ".backup", ".conv.74")
_VERSION = struct.Struct("<3i")
_SEEN, _OLD_SEEN = struct.Struct("<q"), struct.Struct("<i")


def read_darknet_weights(path: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the part of `model`'s state dict in a file: the whole model, or the backbone.

    Args:
        path: a local file.
        model: has a `DarkNet` as `backbone` and, to read a whole model, a `YOLOv3Head` as `head`.

    Raises:
        WeightsError: the model has other layers than darknet's, the file's length fits neither the
            model nor its backbone, a number is NaN or infinite, or a variance is negative.
    """
    backbone, everything = _tensors(model, path)
    try:
        with open(path, "rb") as file:
            header = file.read(_VERSION.size + _SEEN.size)
            start = _header_size(header, path)
            found = os.fstat(file.fileno()).st_size - start
            tensors = _fitting(found, backbone, everything, path)
            file.seek(start)
            numbers = np.frombuffer(file.read(found), dtype="<f4")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    state = _split(numbers, tensors, path)
    # torch's batch norm also has batch counters, which nothing here reads
    counters = {n: b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    return state | {n: b for n, b in counters.items() if _beside(n) in state}


def write_darknet_weights(path: str, model: nn.Module, images_seen: int = 0) -> None:
    """Write a `YOLOv3` with a `DarkNet`, or another detector's `DarkNet` backbone, for darknet.

    Weights that were read are written back bit-identically. The header has version 0.2.

    Args:
        path: the file, which is written atomically.
        model: see `read_darknet_weights`.
        images_seen: number of training images, from which darknet continues to count.

    Raises:
        WeightsError: the model has other layers than darknet's.
    """
    _, tensors = _tensors(model, path)
    header = _VERSION.pack(0, 2, 0) + _SEEN.pack(images_seen)

    def write(file) -> None:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().numpy().astype("<f4").tobytes())

    write_atomically(path, write)


def _tensors(model: nn.Module, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the backbone's tensors, and all tensors, by their names and in the file's order."""
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if not isinstance(backbone, DarkNet):
        raise WeightsError(
            f"{path}: darknet's files need MODEL.BACKBONE.NAME build_ghm_darknet_backbone, but "
            f"this model's backbone is a {type(backbone).__name__}"
        )
    of_backbone = dict(_of_convolutions(backbone, "backbone.", path))
    of_head = {}
    if isinstance(head, YOLOv3Head):
        of_head = dict(_of_convolutions(head, "head.", path))
    return of_backbone, {**of_backbone, **of_head}


def _of_convolutions(part: nn.Module, prefix: str, path: str) -> Iterator[tuple[str, Tensor]]:
    for name, module in part.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        norm = getattr(module, "norm", None)
        if norm is None:
            yield f"{prefix}{name}.bias", module.bias
        elif not hasattr(norm, "running_var"):
            raise WeightsError(
                f"{path}: darknet supports only batch norm, but {prefix}{name} has "
                f"{type(norm).__name__}; set MODEL.DARKNET.NORM and MODEL.YOLOV3.NORM to BN"
            )
        else:
            for kind in ("bias", "weight", "running_mean", "running_var"):
                yield f"{prefix}{name}.norm.{kind}", getattr(norm, kind)
        yield f"{prefix}{name}.weight", module.weight


def _header_size(header: bytes, path: str) -> int:
    if len(header) < _VERSION.size + _OLD_SEEN.size:
        raise WeightsError(
            f"{path} is not a darknet file: {len(header)} bytes are too few for its header"
        )
    major, minor, _ = _VERSION.unpack_from(header)
    wide = major * 10 + minor >= 2 and major < 1000 and minor < 1000
    return _VERSION.size + (_SEEN if wide else _OLD_SEEN).size


def _fitting(found: int, backbone: dict, everything: dict, path: str) -> dict[str, Tensor]:
    """Return all tensors or the backbone's, whichever take up `found` bytes."""
    for tensors in (everything, backbone):
        if found == 4 * _count(tensors):
            return tensors
    whole, part = _count(everything), _count(backbone)
    what = f"{part:,} for the backbone"
    if whole != part:
        what = f"{whole:,} numbers for the whole model or {what}"
    rest = f" and {found % 4} bytes" if found % 4 else ""
    raise WeightsError(
        f"{path} does not fit this model: expected {what}, found {found // 4:,} numbers{rest}; it "
        "is incomplete, or has another network or number of classes (MODEL.YOLOV3.NUM_CLASSES)"
    )


def _count(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def _beside(counter: str) -> str:
    return counter.replace("num_batches_tracked", "running_var")


def _split(numbers: np.ndarray, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    state, start = {}, 0
    for name, tensor in tensors.items():
        part = numbers[start : start + tensor.numel()]
        start += tensor.numel()
        if not np.isfinite(part).all() or (name.endswith("running_var") and part.min() < 0):
            raise WeightsError(
                f"{path} is damaged or not a darknet file: {name} has values that are NaN or "
                "infinite, or variances below 0; fetch it again"
            )
        state[name] = torch.from_numpy(part.astype(np.float32)).view(tensor.shape)
    return state
