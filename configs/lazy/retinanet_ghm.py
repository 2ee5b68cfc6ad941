"""coco/retinanet_R_50_FPN_ghm_1x.yaml for Detectron2's tools/lazyconfig_train_net.py."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from ghm_d2.losses import GHMC, GHMR
from ghm_d2.modeling.retinanet import GHMRetinaNet

from .coco_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = get_config("common/models/retinanet.py").model
model._target_ = GHMRetinaNet
model.cls_loss_type, model.box_reg_loss_type = "ghm_c", "ghm_r"
model.sync = False  # each GPU counts by itself, as the authors do
model.ghm_c = L(GHMC)(bins=30, momentum=0.75, sync=False)
model.ghm_r = L(GHMR)(bins=10, momentum=0.7, mu=0.02, loss_weight=10.0, sync=False)
model.backbone.bottom_up.freeze_at = 2
optimizer.lr = 0.01
