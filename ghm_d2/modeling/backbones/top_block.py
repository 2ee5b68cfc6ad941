"""The pyramid levels P6 and P7 of RetinaNet and FCOS, in which publications differ."""

from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError


class PlainP6P7(LastLevelP6P7):
    """Detectron2's block without the ReLU between P6 and P7, as in mmdetection."""

    def forward(self, features):
        """Return [P6, P7], computed from the map that P6 reads, (N, C, H, W)."""
        p6 = self.p6(features)
        return [p6, self.p7(p6)]


def fit_top_block(backbone, cfg) -> None:
    """Replace Detectron2's top block by the one that MODEL.FPN.P6_INPUT and P7_RELU choose.

    Raises:
        UsageError: the backbone has no `LastLevelP6P7`, or no level P6_INPUT.
    """
    keys = ghm_keys(cfg, "MODEL.FPN")
    if keys.P7_RELU and not keys.P6_INPUT:
        return
    block = getattr(backbone, "top_block", None)
    if not isinstance(backbone, FPN) or type(block) is not LastLevelP6P7:
        raise UsageError(
            "MODEL.FPN.P6_INPUT and P7_RELU need an FPN with the levels P6 and P7; leave them at "
            "their defaults, '' and True"
        )
    channels, source = block.p6.in_channels, block.in_feature
    if keys.P6_INPUT:
        source = keys.P6_INPUT
        shapes = backbone.output_shape()
        if source not in shapes or source in ("p6", "p7"):
            levels = ", ".join(name for name in shapes if name not in ("p6", "p7"))
            raise UsageError(f"MODEL.FPN.P6_INPUT must be '' or one of {levels}, not {source}")
        channels = shapes[source].channels
    block_type = LastLevelP6P7 if keys.P7_RELU else PlainP6P7
    backbone.top_block = block_type(channels, block.p6.out_channels, source)
