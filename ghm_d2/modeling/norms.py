"""A check of the norm that a configuration names, before layers are built with it."""

from collections.abc import Iterable

from detectron2.layers import get_norm

from ghm_d2.errors import UsageError


def check_norm(key: str, norm: str, channels: Iterable[int]) -> None:
    """Check that `norm`, the value of `key`, suits layers with these numbers of channels.

    Raises:
        UsageError: it does not.
    """
    for number in channels:
        try:
            get_norm(norm, number)
        except KeyError:
            raise UsageError(
                f'{key} must be "BN", "SyncBN", "FrozenBN", "GN" or "", not {norm!r}'
            ) from None
        except ValueError as error:  # groups that do not divide the channels
            raise UsageError(f"{key} {norm!r} does not fit {number} channels: {error}") from None
