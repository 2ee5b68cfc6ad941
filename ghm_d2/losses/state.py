"""Modules whose state is averages of counts: kept in full precision and saved in checkpoints."""

import torch
from torch import nn

from ghm_d2.kernels.reference import wide


class CountState(nn.Module):
    """A module whose floating-point buffers stay float32 when a model becomes half precision.

    Counts of millions do not fit half precision.

    Attributes:
        unused: names of buffers that this configuration does not read. A checkpoint that lacks
            them, such as one made before they existed, misses nothing.
    """

    unused: tuple[str, ...] = ()

    def _apply(self, fn, *args, **kwargs):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *args, **kwargs)
        for name, exact in before.items():
            now = getattr(self, name)
            if wide(now.dtype) != now.dtype:
                setattr(self, name, exact.to(now.device, torch.float32))
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *args
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        unused = {prefix + name for name in self.unused}
        missing_keys[:] = [name for name in missing_keys if name not in unused]
