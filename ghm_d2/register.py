"""One call that registers every meta-architecture, head and backbone with Detectron2."""


def register_all() -> None:
    """Import the modules that register themselves; safe to repeat.

    Data sets are registered when they are named (`ghm_d2.data.catalog.resolve`).
    """
    from ghm_d2.modeling import box_head, fcos, retinanet, rpn, timm_backbone  # noqa: F401
    from ghm_d2.modeling.dssd import ssd  # noqa: F401
    from ghm_d2.modeling.yolov3 import darknet, yolov3  # noqa: F401
