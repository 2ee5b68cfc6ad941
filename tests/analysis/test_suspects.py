"""Wrong annotations are found, on data whose errors are known."""

import numpy as np
import pytest

from ghm_d2.analysis.suspects import (
    SCORES,
    Evidence,
    Suspect,
    find_suspects,
    kind_scores,
    missing,
    tails,
)


def annotation(box, category=1, image=1, number=1, **fields):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box)} | fields


def detection(box, score, category=1, image=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def judged(*images) -> list[Suspect]:
    annotated, _ = find_suspects(images)
    return annotated


def test_a_tail_is_the_share_of_smaller_norms_among_annotations_of_that_size():
    norms = np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.7])
    area = np.array([10.0, 11.0, 12.0, 1.0, 1.1, 1.2])
    # (smaller + half of the equal) / 3, within three in the order of size
    expected = [1 / 6, 3 / 6, 5 / 6, 5 / 6, 3 / 6, 3 / 6]
    np.testing.assert_allclose(tails(norms, area, neighbours=3), expected)
    np.testing.assert_allclose(tails(norms, area, neighbours=100)[3], 5.5 / 6)
    np.testing.assert_allclose(tails(np.zeros(4), np.ones(4)), 0.5)  # ties, all by half
    assert not len(tails(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize(
    ("detections", "kind", "proposed"),
    [
        ([detection((0, 0, 10, 10), 0.9, category=2)], "class", 0),
        ([detection((5, 5, 10, 10), 0.9)], "box", 0),  # IoU 1/7
        ([detection((9, 9, 10, 10), 0.9)], "extra", None),  # IoU 0.005
        ([], "extra", None),
    ],
)
def test_what_is_wrong_and_what_the_model_sees_there(detections, kind, proposed):
    (suspect,) = judged(([annotation((0, 0, 10, 10))], detections))
    assert suspect.kind == kind
    assert suspect.proposal == (None if proposed is None else detections[proposed])


def test_a_detection_of_the_neighbour_does_not_put_a_box_off():
    boxes = [annotation((0, 0, 10, 10)), annotation((5, 0, 10, 10), number=2)]
    suspects = judged((boxes, [detection((5, 0, 10, 10), 0.9)]))
    by_id = {s.annotation["id"]: s for s in suspects}
    assert by_id[1].kind == "extra" and by_id[1].score > by_id[2].score


def test_a_surer_neighbour_without_an_annotation_is_missing_and_puts_no_box_off():
    there = annotation((0, 0, 10, 10))
    own, neighbour = detection((0.2, 0, 10, 10), 0.5), detection((6, 0, 10, 10), 0.9)
    annotated, absent = find_suspects([([there], [own, neighbour])])
    assert annotated[0].proposal == own
    assert [s.proposal for s in absent] == []  # it may be its place, so it is not missing too
    other = detection((6, 0, 10, 10), 0.9, category=2)
    annotated, absent = find_suspects([([there], [own, other])])
    assert annotated[0].proposal == own and [s.proposal for s in absent] == [other]


def noisy(rng: np.random.Generator):
    """Images with 30 objects, a tenth of each error, by a model that is unsure of small ones.

    It sees a second class in each object too.
    """
    images, errors = [], {}
    for image in range(20):
        annotations, detections = [], []
        for i in range(30):
            side = float(rng.uniform(5, 50))
            box = [60.0 * (i % 6), 60.0 * (i // 6), side, side]
            number, category = image * 100 + i, int(rng.integers(1, 4))
            seen = float(np.clip(side / 50 + rng.normal(0, 0.1), 0.02, 0.99))
            detections.append(detection(box, seen, category, image))
            second = seen * float(rng.uniform(0, 0.9))
            detections.append(detection(box, second, category % 3 + 1, image))
            kind = rng.choice(["class", "box", "extra", "missing", ""], p=[0.1] * 4 + [0.6])
            if kind == "missing":
                errors[image, i] = "missing"
                continue
            if kind == "class":
                category = category % 3 + 1
            if kind == "box":
                box = [box[0] + 0.5 * side, box[1], side, side]
            if kind == "extra":
                del detections[-2:]
            if kind:
                errors[number] = kind
            annotations.append(annotation(box, category, image, number))
        images.append((annotations, detections))
    return images, errors


def test_errors_come_first_and_by_their_kind():
    images, errors = noisy(np.random.default_rng(0))
    annotated, absent = find_suspects(images)
    wrong = [s.annotation["id"] in errors for s in annotated]
    count = sum(wrong)
    assert np.mean(wrong[:count]) > 0.85
    found = [s for s in annotated[:count] if s.annotation["id"] in errors]
    assert np.mean([s.kind == errors[s.annotation["id"]] for s in found]) > 0.9
    lost = sum(kind == "missing" for kind in errors.values())
    assert len(absent) > 0.95 * lost and all(s.annotation is None for s in absent)


def test_the_norms_density_finds_more_than_the_norm():
    """Which puts small objects first, of which the model is unsure though they are right."""
    images, errors = noisy(np.random.default_rng(1))
    found = {}
    for score in SCORES:
        annotated, _ = find_suspects(images, score=score)
        first = annotated[: sum(kind != "missing" for kind in errors.values())]
        found[score] = np.mean([s.annotation["id"] in errors for s in first])
    assert found["tail"] > found["norm"] + 0.1
    assert found["tail"] == max(found.values())


def test_each_kind_of_error_has_a_score_of_its_own():
    images, errors = noisy(np.random.default_rng(2))
    evidence = Evidence()
    for annotations, detections in images:
        evidence.add(annotations, sorted(detections, key=lambda d: -d["score"]))
    kinds = np.array([errors.get(a["id"], "") for a in evidence.annotations])
    for kind, values in kind_scores(evidence).items():
        best = kinds[np.argsort(-values, kind="stable")][:20]
        assert np.mean(best == kind) > 0.8, kind


def test_what_is_missing():
    there = annotation((0, 0, 10, 10))
    own, off = detection((0, 0, 10, 10), 0.9), detection((6, 0, 10, 10), 0.5)  # IoU 1/4 with it
    alone, twice = detection((50, 50, 10, 10), 0.8), detection((51, 50, 10, 10), 0.7, category=2)
    found = missing([there], [own, alone, twice, off])
    assert [d for d, _ in found] == [alone, off]
    assert {d["score"]: s for d, s in found} == pytest.approx({0.8: 0.8, 0.5: 0.5 * 0.75**4})


def test_a_box_that_is_off_is_not_missing_too():
    there, better = annotation((0, 0, 10, 10)), detection((6, 0, 10, 10), 0.5)
    assert missing([there], [better]) == []
    assert judged(([there], [better]))[0].kind == "box"


def test_nothing_is_missing_in_a_crowd_and_a_crowd_is_not_judged():
    crowd = annotation((0, 0, 100, 100), iscrowd=1)
    inside, outside = detection((10, 10, 10, 10), 0.9), detection((200, 0, 10, 10), 0.8)
    annotated, absent = find_suspects([([crowd], [inside, outside])])
    assert annotated == [] and [s.proposal for s in absent] == [outside]


def test_images_without_anything():
    assert find_suspects([]) == ([], [])
    assert find_suspects([([], [])]) == ([], [])
