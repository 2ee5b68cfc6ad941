"""COCO, Pascal VOC and YOLO folders, read and cleaned."""
