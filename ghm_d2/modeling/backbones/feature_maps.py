"""The feature maps that a key IN_FEATURES chooses from a backbone."""

import itertools
from collections.abc import Sequence

from detectron2.layers import ShapeSpec

from ghm_d2.errors import UsageError


def chosen_maps(key: str, names: Sequence[str], shapes: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    """Return the shapes of the maps `names`, the value of `key`, of a backbone with `shapes`.

    Raises:
        UsageError: there is no name, or the backbone lacks one.
    """
    if not names or any(name not in shapes for name in names):
        raise UsageError(f"{key} is {tuple(names)}, but the backbone has {', '.join(shapes)}")
    return [shapes[name] for name in names]


def require_doubling(key: str, names: Sequence[str], maps: Sequence[ShapeSpec], hint="") -> None:
    """Check that each map has twice the stride of the one before it.

    Raises:
        UsageError: names the strides; ends with `hint`.
    """
    strides = [one.stride for one in maps]
    if any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise UsageError(
            f"{key} {tuple(names)} have strides {strides}, but each must be twice the one before "
            f"it{hint}"
        )
