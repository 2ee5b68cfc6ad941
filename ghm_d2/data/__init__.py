"""Data sets: the generated `digits`, COCO/VOC/YOLO folders, checks, and Detectron2's catalog.

`importing/` reads and cleans folders of other tools, `checking/` reports faults of a data set,
`digits/` generates one, `catalog.py` registers one with Detectron2. A data set folder is always
`FOLDER/{train,val,test}.json` in COCO's format, with image names relative to `FOLDER/images`.
"""
