"""Data, schedule and optimizer of Base-RetinaNet.yaml and Base-RCNN-FPN.yaml in configs/coco."""

from detectron2.model_zoo import get_config

from ghm_d2.training.optimizer import ClippedSGD

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = [800]
dataloader.train.mapper.use_instance_mask = False

train = get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 87960
train.eval_period = train.checkpointer.period = 7330

lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
lr_multiplier.scheduler.milestones = [58640, 80630, train.max_iter]
lr_multiplier.warmup_length = 500 / train.max_iter
lr_multiplier.warmup_factor = 1 / 3

optimizer = get_config("common/optim.py").SGD
optimizer._target_ = ClippedSGD
optimizer.max_norm = 35.0
