"""Our names in Detectron2's registries that were changed, because other projects use the old ones.

The old names are accepted until version 0.3.
"""

import logging
import sys
from functools import cache

_BACKBONES = ("darknet", "ssd_resnet", "timm", "timm_fpn")
# configuration key -> {old name: new name}
RENAMED = {
    "MODEL.META_ARCHITECTURE": {"SSD": "GHMSSD", "YOLOv3": "GHMYOLOv3"},
    "MODEL.BACKBONE.NAME": {f"build_{n}_backbone": f"build_ghm_{n}_backbone" for n in _BACKBONES},
    "MODEL.ANCHOR_GENERATOR.NAME": {"SSDDefaultBoxes": "GHMDefaultBoxes"},
}
# configuration key -> the registry in detectron2.modeling
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": "META_ARCH_REGISTRY",
    "MODEL.BACKBONE.NAME": "BACKBONE_REGISTRY",
    "MODEL.ANCHOR_GENERATOR.NAME": "ANCHOR_GENERATOR_REGISTRY",
}


def current_name(key: str, value):
    """Return the new name if `value` is an old one, and log that once; else return `value`.

    An old name under which another project has registered a class stays as it is.
    """
    new = RENAMED[key].get(value) if key in RENAMED and isinstance(value, str) else None
    modeling = sys.modules.get("detectron2.modeling")  # None: nothing is registered yet
    if new is None or (modeling and value in getattr(modeling, REGISTRIES[key])):
        return value
    tell_renamed(key, value, new)
    return new


@cache
def tell_renamed(key: str, old: str, new: str) -> None:
    """Log that an old name was used, once per name."""
    logging.getLogger(__name__).warning(
        "%s %s is now called %s; the old name works until version 0.3", key, old, new
    )


def use_first_names(plain: dict) -> None:
    """Put the old names into a plain configuration, in place, so that its hash stays the same."""
    for key, names in RENAMED.items():
        *groups, last = key.split(".")
        node = plain
        for group in groups:
            node = node[group]
        node[last] = {new: old for old, new in names.items()}.get(node[last], node[last])
