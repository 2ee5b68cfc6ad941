"""SSD (Liu et al., arXiv 1512.02325) and DSSD (Fu et al., arXiv 1701.06659) on residual networks.

Where the DSSD paper leaves a choice, its authors' code decides (github.com/chengyangfu/caffe,
branch dssd, examples/ssd/ssd_coco_resnet_513.py and ssd_coco_resnet_deconv_513.py).
"""
