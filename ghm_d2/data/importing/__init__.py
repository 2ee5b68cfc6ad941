"""Reads and cleans COCO, Pascal VOC and YOLO folders."""
