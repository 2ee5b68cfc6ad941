"""One call that registers every meta-architecture, head and backbone with Detectron2."""

from ghm_d2.config.renamed import REGISTRIES, RENAMED, tell_renamed


def register_all() -> None:
    """Import the modules that register themselves; safe to repeat.

    Data sets are registered when they are named (`ghm_d2.data.catalog.resolve`).
    """
    from detectron2 import modeling

    from ghm_d2.modeling import fcos, retinanet  # noqa: F401
    from ghm_d2.modeling.backbones import timm_backbone  # noqa: F401
    from ghm_d2.modeling.dssd import ssd  # noqa: F401
    from ghm_d2.modeling.two_stage import box_head, rpn  # noqa: F401
    from ghm_d2.modeling.yolov3 import darknet, yolov3  # noqa: F401

    for key, names in RENAMED.items():
        registry = getattr(modeling, REGISTRIES[key])
        if not isinstance(registry._obj_map, _WithOldNames):
            registry._obj_map = _WithOldNames(key, names, registry._obj_map)


class _WithOldNames(dict):
    """The classes of a registry, which are also found under their old names.

    An old name counts as free: if another project registers a class under it, that class is found.
    """

    def __init__(self, key: str, names: dict[str, str], classes: dict):
        super().__init__(classes)
        self._key, self._names = key, names

    def get(self, name, default=None):
        """Return the class of this name, or else the class that used to have it."""
        if name in self._names and name not in self:
            tell_renamed(self._key, name, self._names[name])
            name = self._names[name]
        return super().get(name, default)
