"""Confusions and worst images of detections made by hand."""

import pytest
from detectron2.structures import BoxMode

from ghm_d2.inference.evaluation.confusion import best_detections, confuse, worst_images

CAT, DOG, BACKGROUND = 0, 1, 2
CLASSES = {7: CAT, 9: DOG}  # category ids as in a COCO JSON


def item(image_id, *boxes, crowd=()):
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": category, "iscrowd": 0}
        for category, box in boxes
    ]
    annotations += [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": CAT, "iscrowd": 1}
        for box in crowd
    ]
    return {"image_id": image_id, "file_name": f"{image_id}.jpg", "annotations": annotations}


def found(image_id, category, box, score):
    return {"image_id": image_id, "category_id": category, "bbox": box, "score": score}


A, B, FAR = [0, 0, 10, 10], [100, 0, 10, 10], [50, 50, 10, 10]


def test_a_found_a_mistaken_a_missed_and_an_invented_object():
    items = [item(1, (CAT, A), (DOG, B)), item(2, (DOG, A))]
    detections = [
        found(1, 7, [1, 0, 10, 10], 0.9),  # IoU 0.82
        found(1, 7, B, 0.8),  # a dog taken for a cat
        found(2, 9, FAR, 0.7),
    ]
    matrix, errors = confuse(items, detections, CLASSES)
    expected = [[1, 0, 0], [1, 0, 1], [0, 1, 0]]  # rows: cat, dog, background
    assert matrix.tolist() == expected
    assert [(e.missed, e.false) for e in errors] == [(0, 1), (1, 1)]


def test_an_object_is_taken_once_by_the_best_score():
    matrix, errors = confuse(
        [item(1, (CAT, A))],
        [found(1, 9, A, 0.4), found(1, 7, [0, 0, 10, 8], 0.6)],
        CLASSES,
    )
    assert matrix[CAT].tolist() == [1, 0, 0], "the cat of 0.6, although the dog fits better"
    assert matrix[BACKGROUND].tolist() == [0, 1, 0]
    assert (errors[0].missed, errors[0].false) == (0, 1)


def test_of_several_objects_a_detection_takes_the_one_it_overlaps_most():
    beside = [3, 0, 10, 10]
    matrix, _ = confuse(
        [item(1, (CAT, A), (DOG, beside))],
        [found(1, 9, [2, 0, 10, 10], 0.9), found(1, 7, [1, 0, 10, 10], 0.8)],
        CLASSES,
    )
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(("width", "matches"), [(5, 1), (4.9, 0)])
def test_the_least_iou_is_a_half(width, matches):
    matrix, _ = confuse([item(1, (CAT, A))], [found(1, 7, [0, 0, width, 10], 0.9)], CLASSES)
    assert matrix[CAT, CAT] == matches


def test_a_crowd_is_neither_missed_nor_hit():
    detections = [found(1, 7, [20, 20, 5, 5], 0.9), found(1, 7, FAR, 0.8)]
    items = [item(1, crowd=[[15, 15, 30, 30]])]
    matrix, errors = confuse(items, detections, CLASSES)
    assert matrix.sum() == matrix[BACKGROUND, CAT] == 1
    assert (errors[0].missed, errors[0].false) == (0, 1)
    assert best_detections(items, detections) == []


def test_as_many_detections_are_kept_as_there_are_boxes():
    items = [item(1, (CAT, A), (DOG, B)), item(2)]
    detections = [found(1, 7, A, 0.1), found(2, 7, A, 0.3), found(1, 9, B, 0.2)]
    assert [d["score"] for d in best_detections(items, detections)] == [0.3, 0.2]
    assert [d["score"] for d in best_detections(items, detections[:1])] == [0.1]


def test_nothing_found_and_nothing_there():
    matrix, errors = confuse([item(1, (CAT, A)), item(2)], [], CLASSES)
    assert matrix[CAT, BACKGROUND] == matrix.sum() == 1
    assert [(e.missed, e.false) for e in errors] == [(1, 0), (0, 0)]


def test_the_worst_images_come_first_and_ties_by_name():
    items = [item(i, *[(CAT, A)] * count) for i, count in ((4, 1), (3, 2), (2, 1), (1, 0))]
    _, errors = confuse(items, [found(1, 7, FAR, 0.5)], CLASSES)
    names = [e.item["file_name"] for e in worst_images(errors)]
    assert names == ["3.jpg", "1.jpg", "2.jpg", "4.jpg"]
    assert [e.item["file_name"] for e in worst_images(errors, 2)] == names[:2]
