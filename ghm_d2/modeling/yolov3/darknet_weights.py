"""darknet's weight files: raw float32 numbers in the order of the cfg file's layers.

After a header (int32 major, minor and revision; the number of training images seen, int64 from
version 0.2 on and int32 before) there are, for each convolution, biases, then with batch norm its
weights, running means and running variances, then the kernel, (out, in, height, width). Source:
darknet's src/parser.c, load_weights_upto and load_convolutional_weights. Nothing in the file
says what it is of: its length is the only thing to check that by.
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

# of whole models, of checkpoints, and of DarkNet-53 alone (74 layers, 52 of them convolutions)
ENDINGS = (".weights", ".backup", ".conv.74")
_VERSION = struct.Struct("<3i")
_SEEN, _OLD_SEEN = struct.Struct("<q"), struct.Struct("<i")


def read_darknet_weights(path: str, model: nn.Module) -> dict[str, Tensor]:
    """The part of `model`'s state dict that a file holds, of the whole model or its backbone.

    Args:
        path: of a local file.
        model: with a `DarkNet` as `backbone`, and for more than that a `YOLOv3Head` as `head`.

    Raises:
        WeightsError: the model has other layers, the file's length is not that of the model or of
            its backbone, or a number in it is not finite or a variance negative.
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
    # torch's batch norm counts batches as well, to no purpose here
    counters = {n: b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    return state | {n: b for n, b in counters.items() if _beside(n) in state}


def write_darknet_weights(path: str, model: nn.Module, images_seen: int = 0) -> None:
    """Write a `YOLOv3` with a `DarkNet`, or of another detector that backbone, for darknet.

    What was read is written back to the bit, of header version 0.2.

    Args:
        path: of the file, which is there whole or not at all.
        model: see `read_darknet_weights`.
        images_seen: in training; darknet goes on counting there.

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
    """The backbone's tensors in the file's order by their names in `model`, and all tensors'."""
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if not isinstance(backbone, DarkNet):
        raise WeightsError(
            f"{path}: darknet's files are for MODEL.BACKBONE.NAME build_ghm_darknet_backbone, and "
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
                f"{path}: darknet has batch norm alone, and {prefix}{name} has "
                f"{type(norm).__name__}; set MODEL.DARKNET.NORM and MODEL.YOLOV3.NORM to BN"
            )
        else:
            for kind in ("bias", "weight", "running_mean", "running_var"):
                yield f"{prefix}{name}.norm.{kind}", getattr(norm, kind)
        yield f"{prefix}{name}.weight", module.weight


def _header_size(header: bytes, path: str) -> int:
    if len(header) < _VERSION.size + _OLD_SEEN.size:
        raise WeightsError(f"{path} is not a darknet file: {len(header)} bytes are no header")
    major, minor, _ = _VERSION.unpack_from(header)
    wide = major * 10 + minor >= 2 and major < 1000 and minor < 1000
    return _VERSION.size + (_SEEN if wide else _OLD_SEEN).size


def _fitting(found: int, backbone: dict, everything: dict, path: str) -> dict[str, Tensor]:
    """Return the tensors, the backbone's or all, that have `found` bytes of numbers."""
    for tensors in (everything, backbone):
        if found == 4 * _count(tensors):
            return tensors
    whole, part = _count(everything), _count(backbone)
    what = f"{part:,} of the backbone"
    if whole != part:
        what = f"{whole:,} numbers of the whole model (whose classes are as many as the file's) or "
        what += f"the {part:,} of the backbone"
    rest = f" and {found % 4} bytes" if found % 4 else ""
    raise WeightsError(
        f"{path} does not fit: expected {what}, found {found // 4:,} numbers{rest}; it is "
        "incomplete, or of another network or number of classes (MODEL.YOLOV3.NUM_CLASSES)"
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
                f"{path} is damaged or no darknet file: {name} has numbers that are not finite, "
                "or variances below 0; fetch it again"
            )
        state[name] = torch.from_numpy(part.astype(np.float32)).view(tensor.shape)
    return state
