"""coco/fcos_R_50_FPN_ghm_c_1x.yaml for Detectron2's tools/lazyconfig_train_net.py."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from ghm_d2.losses import GHMC
from ghm_d2.modeling.fcos import GHMFCOS, group_norm
from ghm_d2.training.optimizer import ClippedSGD

_base = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
dataloader, train, lr_multiplier = _base.dataloader, _base.train, _base.lr_multiplier
train.eval_period = train.checkpointer.period = 7500

model = _base.model
model._target_ = GHMFCOS
model.cls_loss_type = "ghm_c"
model.ghm_c = L(GHMC)(bins=30, momentum=0.75)
model.head.norm = group_norm  # Detectron2's "GN" fails in its head with current PyTorch

optimizer = _base.optimizer
optimizer._target_ = ClippedSGD
optimizer.max_norm = 35.0
