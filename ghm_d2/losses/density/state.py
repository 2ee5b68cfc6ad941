"""A base module for averages of counts, kept in full precision and saved in checkpoints."""

import torch
from torch import Tensor, nn

from ghm_d2.kernels.dtypes import wide


class CountState(nn.Module):
    """A module whose floating-point buffers stay float32 or wider in a model of any dtype.

    Counts of millions do not fit half precision.

    Attributes:
        unused: names of buffers that this configuration does not read. A checkpoint without
            them, such as an older one, loads without missing keys.
    """

    unused: tuple[str, ...] = ()

    def add_counts(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Register a buffer of zeros."""
        dtype = dtype or wide(torch.get_default_dtype())
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set all counts to 0, for example after `to_empty` of a module built on "meta"."""
        with torch.no_grad():
            for buffer in self.buffers(recurse=False):
                buffer.zero_()

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
        for name, _ in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):  # load_state_dict(assign=True) keeps the saved dtype
                state_dict[prefix + name] = saved.to(wide(saved.dtype))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        unused = {prefix + name for name in self.unused}
        missing_keys[:] = [name for name in missing_keys if name not in unused]
