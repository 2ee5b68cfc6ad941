"""coco/faster_rcnn_R_50_FPN_ghm_r_1x.yaml for Detectron2's tools/lazyconfig_train_net.py."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from ghm_d2.losses import GHMR
from ghm_d2.modeling.two_stage.box_head import GHMFastRCNNOutputLayers

from .coco_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = get_config("common/models/mask_rcnn_fpn.py").model
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]

_predictor = model.roi_heads.box_predictor
_predictor._target_ = GHMFastRCNNOutputLayers
_predictor.box_reg_loss_type = "ghm_r"
_predictor.ghm_r = L(GHMR)(bins=10, momentum=0.7, mu=0.2, loss_weight=1.0, sync=False)
model.proposal_generator.post_nms_topk = (2000, 1000)
model.proposal_generator.smooth_l1_beta = 1 / 9
model.proposal_generator.anchor_boundary_thresh = 0
model.roi_heads.box_pooler.sampling_ratio = 2
model.backbone.bottom_up.freeze_at = 2
optimizer.lr = 0.02
