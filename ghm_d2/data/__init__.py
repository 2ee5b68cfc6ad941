"""Data sets: the generated `digits`, COCO/VOC/YOLO folders, checks, and Detectron2's catalog.

`importing/` reads and cleans what others wrote, `checking/` reports what is wrong with a data set,
`digits/` draws one, `catalog.py` hands one to Detectron2. All mean the same by a data set folder:
`FOLDER/{train,val,test}.json` in COCO's format, image names relative to `FOLDER/images`.
"""
