"""Data sets: the generated `digits`, COCO/VOC/YOLO folders, checks, and Detectron2's catalog.

`folders.py` imports what others wrote and cleans it, `check.py` reports what is wrong with a data
set, `catalog.py` hands one to Detectron2. All of them mean the same by a data set folder:
`FOLDER/{train,val,test}.json` in COCO's format, image names relative to `FOLDER/images`.
"""
