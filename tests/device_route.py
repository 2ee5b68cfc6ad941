"""Runs a step as an accelerator would, and refuses whatever waits for one.

The meta device has no numbers: `.item()`, `nonzero`, a boolean index, `bincount` or a copy to the
host raise on it. A tensor made from Python numbers does not, but is an upload that waits.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

UPLOADS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class _RefuseUploads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in UPLOADS and not isinstance(args[func is torch.Tensor.new_tensor], torch.Tensor):
            raise RuntimeError(f"{func.__name__} uploads numbers to the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def never_waiting():
    """Refuse code on meta tensors that reads or uploads a number."""
    with _RefuseUploads():
        yield torch.device("meta")
