"""SSD's default boxes, as a Detectron2 anchor generator."""

import math

import torch
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    DefaultAnchorGenerator,
)
from torch import Tensor

from ghm_d2.errors import UsageError


@ANCHOR_GENERATOR_REGISTRY.register()
class GHMDefaultBoxes(DefaultAnchorGenerator):
    """The default boxes of SSD (section 2.2, "Choosing scales and aspect ratios").

    MODEL.ANCHOR_GENERATOR.SIZES holds two sizes in px for each level, its own scale s_k and the
    next level's, s_k+1. .ASPECT_RATIOS holds ratios a > 1; their inverses are added. A cell has
    squares with sides s_k and sqrt(s_k s_k+1), and for each ratio a box of s_k sqrt(a) by
    s_k / sqrt(a) and its transpose. DSSD's 1.6, 2 and 3 ("Training") give eight boxes.
    """

    def generate_cell_anchors(self, sizes, aspect_ratios) -> Tensor:
        """Return the default boxes x0 y0 x1 y1 around (0, 0): (2 + 2 * len(aspect_ratios), 4).

        Raises:
            UsageError: there are not two ascending sizes, or a ratio is not above 1.
        """
        if len(sizes) != 2 or not 0 < sizes[0] < sizes[1]:
            raise UsageError(
                "MODEL.ANCHOR_GENERATOR.SIZES must give SSD two sizes per level, the level's own "
                f"and the larger one of the next level, not {sizes}"
            )
        if any(ratio <= 1 for ratio in aspect_ratios):
            raise UsageError(
                "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS must be above 1 for SSD, which adds their "
                f"inverses itself, not {aspect_ratios}"
            )
        small, large = sizes
        sides = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in aspect_ratios:
            long, short = small * math.sqrt(ratio), small / math.sqrt(ratio)
            sides += [(long, short), (short, long)]
        return torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sides])


def check_sizes(sizes, num_levels: int) -> None:
    """Raise UsageError unless there are sizes for each level."""
    if len(sizes) != num_levels:
        raise UsageError(
            f"MODEL.ANCHOR_GENERATOR.SIZES has sizes for {len(sizes)} levels, but "
            f"MODEL.SSD.NUM_LEVELS is {num_levels}; give two sizes for each level"
        )
