"""Every configuration key this project adds, with its default and one comment."""


def add_ghm_config(cfg) -> None:
    """Add this project's keys, with their defaults, to a Detectron2 `CfgNode`, in place."""
    from detectron2.config import CfgNode as CN

    # "focal" | "ce" | "ohem" | "ghm_c"
    cfg.MODEL.RETINANET.CLS_LOSS_TYPE = "focal"
    # MODEL.RETINANET.BBOX_REG_LOSS_TYPE gains "asl1" | "ghm_r"
    # factor on the box loss, whatever its type; the ROI heads' key of this name is Detectron2's
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # "ce" | "ghm_c"
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE = "ce"
    # MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE gains "asl1" | "ghm_r"
    # "ce" | "ghm_c"; read by MODEL.PROPOSAL_GENERATOR.NAME "GHMRPN"
    cfg.MODEL.RPN.CLS_LOSS_TYPE = "ce"

    cfg.MODEL.GHM = CN()
    # What one density spans: "level" (one a feature level, all updating one moving average in
    # turn, as in the authors' code) | "level_ema" (a moving average of its own for each level) |
    # "batch" (one density over all levels, as in the paper's equations)
    cfg.MODEL.GHM.SCOPE = "level"
    # What the loss is divided by: "valid_bins" (unit regions with a sample in this batch) | "bins"
    cfg.MODEL.GHM.NORMALIZER = "valid_bins"
    # How the moving average starts: "zero" (parity; the first losses are up to
    # 1 / (1 - MOMENTUM) too large) | "first" (at the first count) | "debias" (as Adam corrects it)
    cfg.MODEL.GHM.EMA_INIT = "zero"
    # Add up the counts of all processes, those that other losses are divided by too, so that W of
    # them give the gradient of one
    cfg.MODEL.GHM.SYNC = True
    # "auto": the fastest that is there for the device | "torch" (plain PyTorch) | "c" | "triton"
    cfg.MODEL.GHM.KERNEL = "auto"

    cfg.MODEL.GHM.CLS = CN()
    cfg.MODEL.GHM.CLS.BINS = 30  # unit regions M
    cfg.MODEL.GHM.CLS.MOMENTUM = 0.75  # of the moving average, in [0, 1); 0 switches it off
    cfg.MODEL.GHM.CLS.LOSS_WEIGHT = 1.0
    # "unit_regions" | "exact": each sample's own region of width 1 / BINS, no moving average; the
    # paper's yardstick, where classes are sigmoids (RetinaNet, FCOS, YOLOv3, RPN)
    cfg.MODEL.GHM.CLS.DENSITY = "unit_regions"

    cfg.MODEL.GHM.REG = CN()
    cfg.MODEL.GHM.REG.BINS = 10
    cfg.MODEL.GHM.REG.MOMENTUM = 0.7
    cfg.MODEL.GHM.REG.LOSS_WEIGHT = 10.0
    cfg.MODEL.GHM.REG.MU = 0.02  # of ASL1, in box deltas: where it turns from quadratic to linear

    # Where an FPN's levels above the backbone's come from: "LastLevelP6P7" | "LastLevelMaxPool"
    # | "" (none); read by MODEL.BACKBONE.NAME "build_timm_fpn_backbone"
    cfg.MODEL.FPN.TOP_BLOCK = "LastLevelP6P7"
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"  # any timm model with feature maps
    # "" (random) | "timm" (timm's hub) | "pypi" (the package for tf_efficientnet_lite0) | a file
    cfg.MODEL.TIMM.PRETRAINED = ""
    cfg.MODEL.TIMM.STRIDES = (8, 16, 32)  # the feature maps that feed the FPN
    cfg.MODEL.TIMM.FREEZE_BN = True  # batch norm's statistics and affine parameters stay fixed
    cfg.MODEL.TIMM.FREEZE_AT = 0  # number of first stages whose parameters stay fixed

    # filled in from the data; a run's config.yaml thus tells what the classes of its weights are
    cfg.DATASETS.CLASS_NAMES = ()

    cfg.SOLVER.OPTIMIZER = "SGD"  # "SGD" | "ADAMW"
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE gains "full_model": the norm over all parameters together
    cfg.SOLVER.ACCUMULATE = 1  # a step's batch, IMS_PER_BATCH, goes through in this many parts
    # of SOLVER.AMP.ENABLED: "" (float16 on CUDA, bfloat16 elsewhere) | "float16" | "bfloat16"
    cfg.SOLVER.AMP.DTYPE = ""
    cfg.SOLVER.ON_DIVERGENCE = "stop"  # at a step that is not finite: "stop" | "skip" it
    cfg.SOLVER.MAX_SKIPPED_STEPS = 10  # of a run; one more stops it

    # Images that turn out unreadable in the training are left out; one more stops it
    cfg.DATALOADER.MAX_BAD_IMAGES = 10

    # How a picture is sized: "shortest_edge" (Detectron2's) | "square" (MIN_SIZE x MIN_SIZE px,
    # whatever its shape, as SSD does; MAX_SIZE is without effect)
    cfg.INPUT.RESIZE = "shortest_edge"
    # In training, before the resizing and Detectron2's flips: "" | "ssd" (colours, expansion and
    # crop) | "yolo" (colours, shape and place on a grey square), see ghm_d2.data.augment
    cfg.INPUT.AUGMENTATION = ""
    _add_yolov3(cfg)
    _add_ssd(cfg)
    _add_fcos(cfg)


def _add_yolov3(cfg) -> None:
    """Of META_ARCHITECTURE "YOLOv3" and the backbone "build_darknet_backbone"."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.DARKNET = CN()
    cfg.MODEL.DARKNET.DEPTHS = (1, 2, 8, 8, 4)  # residual blocks a stage: DarkNet-53
    cfg.MODEL.DARKNET.STEM_CHANNELS = 32  # doubled by each stage
    cfg.MODEL.DARKNET.NORM = "BN"
    cfg.MODEL.DARKNET.FREEZE_AT = 0  # number of first stages, the stem among them, that stay fixed

    cfg.MODEL.YOLOV3 = CN()
    cfg.MODEL.YOLOV3.NUM_CLASSES = 80
    cfg.MODEL.YOLOV3.IN_FEATURES = ("res3", "res4", "res5")  # the finest first, as below
    cfg.MODEL.YOLOV3.CHANNELS = (128, 256, 512)  # of the neck's 1x1 convolutions, a level each
    cfg.MODEL.YOLOV3.NORM = "BN"
    # (width, height) in px of each level's priors
    cfg.MODEL.YOLOV3.ANCHORS = (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    )
    cfg.MODEL.YOLOV3.IGNORE_IOU = 0.5  # a prior above it, not an object's best, is not background
    cfg.MODEL.YOLOV3.OBJ_LOSS_TYPE = "ce"  # "ce" | "ghm_c"
    cfg.MODEL.YOLOV3.CLS_LOSS_TYPE = "ce"  # "ce" | "ghm_c"
    cfg.MODEL.YOLOV3.BBOX_REG_LOSS_TYPE = "l2"  # "l2" (published) | "smooth_l1" | "asl1" | "ghm_r"
    cfg.MODEL.YOLOV3.BBOX_REG_LOSS_WEIGHT = 1.0
    cfg.MODEL.YOLOV3.SMOOTH_L1_BETA = 0.1  # in cells and in logarithms of sides
    cfg.MODEL.YOLOV3.SCORE_THRESH_TEST = 0.005
    cfg.MODEL.YOLOV3.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.YOLOV3.NMS_THRESH_TEST = 0.45


def _add_ssd(cfg) -> None:
    """Of META_ARCHITECTURE "SSD": SSD, and DSSD with MODEL.SSD.DECONV_CHANNELS."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.SSD = CN()
    cfg.MODEL.SSD.NUM_CLASSES = 80
    cfg.MODEL.SSD.IN_FEATURES = ("res3", "res5")  # of the backbone; the levels beyond are extra
    cfg.MODEL.SSD.NUM_LEVELS = 7
    cfg.MODEL.SSD.EXTRA_CHANNELS = 1024
    cfg.MODEL.SSD.DECONV_CHANNELS = 0  # of the deconvolution modules; 0 leaves them out: SSD
    cfg.MODEL.SSD.HEAD_CHANNELS = 1024  # of prediction module (c); 0 predicts from the maps
    cfg.MODEL.SSD.L2_NORM_SCALE = 0.0  # of the first level's L2 norm at the start; 0 has none
    cfg.MODEL.SSD.NORM = "BN"  # of all layers beyond the backbone but those that predict
    cfg.MODEL.SSD.IOU_THRESHOLD = 0.5  # from which a default box is an object's
    cfg.MODEL.SSD.NEG_POS_RATIO = 3.0  # of hard negative mining
    cfg.MODEL.SSD.CLS_LOSS_TYPE = "mining"  # "mining" (published) | "ce" | "ghm_c"
    # of an object at the start, in every default box; "mining" starts from equal scores instead
    cfg.MODEL.SSD.PRIOR_PROB = 0.01
    cfg.MODEL.SSD.BBOX_REG_LOSS_TYPE = "smooth_l1"  # "smooth_l1" | "asl1" | "ghm_r"
    cfg.MODEL.SSD.BBOX_REG_LOSS_WEIGHT = 1.0
    cfg.MODEL.SSD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # one over SSD's "variances"
    cfg.MODEL.SSD.SMOOTH_L1_BETA = 1.0
    cfg.MODEL.SSD.SCORE_THRESH_TEST = 0.01
    cfg.MODEL.SSD.TOPK_CANDIDATES_TEST = 400  # of each class, all levels together
    cfg.MODEL.SSD.NMS_THRESH_TEST = 0.45


def _add_fcos(cfg) -> None:
    """Of META_ARCHITECTURE "GHMFCOS"; the defaults are Detectron2's (model_zoo's fcos.py)."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.FCOS = CN()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ("p3", "p4", "p5", "p6", "p7")
    cfg.MODEL.FCOS.NUM_CONVS = 4  # at least 1
    cfg.MODEL.FCOS.NORM = "GN"  # of the head: "" (none) | "GN" | "BN" | "SyncBN" | "FrozenBN"
    # in strides, above 0; a large number, such as 1e6, switches it off
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.CLS_LOSS_TYPE = "focal"  # "focal" | "ce" | "ghm_c"
    # "giou" (Detectron2's) | "diou" | "ciou" | "smooth_l1" | "asl1" | "ghm_r"; the last three, and
    # MODEL.GHM.REG.MU, are of distances to a box's sides, in strides
    cfg.MODEL.FCOS.BBOX_REG_LOSS_TYPE = "giou"
    cfg.MODEL.FCOS.BBOX_REG_LOSS_WEIGHT = 1.0
    cfg.MODEL.FCOS.SMOOTH_L1_LOSS_BETA = 0.1
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2  # of sqrt(class score * centerness)
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6
