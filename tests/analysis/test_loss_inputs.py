"""Samples are what the detector's own losses see."""

import pytest
import torch

from ghm_d2.analysis.gradients import derivative, moving_mu
from ghm_d2.analysis.loss_inputs import (
    NOISE_LABELS,
    capture,
    has_noise,
    read_batches,
    training_copy,
    training_items,
)
from ghm_d2.analysis.noise import foreground_gradients
from ghm_d2.losses import SmoothL1

RETINANET = ("retinanet_ce", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1")
FASTER_RCNN = ("faster_rcnn_sl1", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32")
SSD = ("ssd", "MODEL.SSD.CLS_LOSS_TYPE", "ce")
BETA = {"GHMRetinaNet": 0.1, "GeneralizedRCNN": 0.0, "GHMSSD": 1.0}  # of their smooth L1


@pytest.fixture(params=[RETINANET, FASTER_RCNN, SSD], ids=["retinanet", "faster_rcnn", "ssd"])
def captured(request, detector, noisy_folder):
    """Return (cfg, model, batch, samples) of one batch of two images."""
    name, *words = request.param
    cfg, model = detector(name, noisy_folder, *words)
    model = training_copy(model)
    batch = next(read_batches(cfg, training_items(cfg, 4)))
    return cfg, model, batch, capture(model, batch)


def test_their_losses_are_the_detectors(captured):
    cfg, _, batch, samples = captured
    assert len(batch) == cfg.SOLVER.IMS_PER_BATCH == 2
    losses = samples.losses(samples.logits, samples.deltas)
    classes = samples.cross_entropy(samples.logits) / samples.normalizer()
    assert losses["loss_cls"].item() == pytest.approx(classes.item(), rel=1e-5)
    assert len(samples.errors) == len(samples.foreground) > 0
    boxes = SmoothL1(BETA[cfg.MODEL.META_ARCHITECTURE], "sum")(
        samples.errors, torch.zeros_like(samples.errors)
    )
    expected = boxes.item() / samples.normalizer()
    assert losses["loss_box_reg"].item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_and_smooth_l1_are_what_weights_are_measured_by(captured):
    cfg, _, _, samples = captured
    score, plain, box = foreground_gradients(samples)
    assert len(score) == len(samples.foreground)
    assert torch.allclose(score, plain, rtol=1e-4)
    slopes = derivative(SmoothL1(BETA[cfg.MODEL.META_ARCHITECTURE], "sum"), samples.errors)
    assert torch.allclose(box, slopes.sum(1), rtol=1e-4)


def test_densities_go_on_averaging_in_the_copy(detector, noisy_folder):
    cfg, model = detector("retinanet_ghm", noisy_folder)
    copied = training_copy(model)
    samples = capture(copied, next(read_batches(cfg, training_items(cfg, 2))))
    assert copied.ghm_c.density.ema.sum() == 0
    samples.losses(samples.logits, samples.deltas)
    assert copied.ghm_c.density.ema.sum() > 0 == model.ghm_c.density.ema.sum()


def test_what_the_robust_form_takes_from_the_data_goes_on_in_the_copy(detector, noisy_folder):
    own = ["MODEL.GHM.SCOPE", "batch", "MODEL.GHM.CLS.PRIOR", "3.0", "MODEL.GHM.REG.MU", "0.7"]
    own += ["MODEL.GHM.REG.MU_QUANTILE", "0.5"]
    cfg, model = detector("retinanet_ghm", noisy_folder, *own)
    copied = training_copy(model)
    samples = capture(copied, next(read_batches(cfg, training_items(cfg, 2))))
    assert moving_mu(model) == moving_mu(copied) == pytest.approx(0.7)
    samples.losses(samples.logits, samples.deltas)
    assert moving_mu(copied) == pytest.approx(samples.errors.abs().median().item(), rel=0.2)
    before, after = (m.ghm_c.density.prior_count for m in (model, copied))
    assert (after >= before).all() and after.sum() > before.sum()
    assert moving_mu(model) == pytest.approx(0.7)


def test_gradient_norms_are_those_of_each_sample(captured):
    _, model, _, samples = captured
    rows, expected = samples.rows(samples.logits), []
    for logits, label in zip(rows.tolist(), samples.labels.tolist(), strict=True):
        if samples.softmax:
            expected.append(1 - torch.tensor(logits).softmax(0)[label])
        elif label >= 0:
            target = [float(k == label) for k in range(len(logits))]
            expected += (torch.tensor(logits).sigmoid() - torch.tensor(target)).abs()
    assert torch.allclose(samples.norms(), torch.stack(expected), atol=1e-6)
    assert samples.softmax != hasattr(model, "loss_normalizer")


def test_noise_goes_with_the_box_that_was_matched(captured):
    _, model, batch, _ = captured
    for item in batch:
        item["instances"].gt_noise = item["instances"].gt_classes % len(NOISE_LABELS)
    samples = capture(model, batch)
    classes = samples.labels[samples.foreground]
    assert len(classes.unique()) > 1
    assert torch.equal(samples.noise, classes % len(NOISE_LABELS))


def test_the_same_proposals_are_drawn_each_time(captured):
    _, model, batch, samples = captured
    torch.manual_seed(99)
    again = capture(model, batch)
    assert torch.equal(samples.labels, again.labels)
    assert torch.equal(samples.errors, again.errors)
    state = torch.get_rng_state()
    capture(model, batch)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on"


def test_an_image_without_boxes_has_background_alone(captured):
    _, model, batch, _ = captured
    for item in batch:
        item["instances"] = item["instances"][:0]
    samples = capture(model, batch)
    assert len(samples.foreground) == len(samples.errors) == len(samples.noise) == 0
    assert len(samples.norms()) > 0


def test_images_are_spread_over_the_data_and_not_augmented(detector, noisy_folder):
    cfg, _ = detector("retinanet_focal", noisy_folder, "INPUT.CROP.ENABLED", "True")
    assert len(training_items(cfg, 40)) == 7
    three = training_items(cfg, 3)
    assert [item["file_name"][-5:] for item in three] == ["0.png", "2.png", "4.png"]
    assert has_noise(three)
    for _ in range(4):  # a flip or a crop would show in one of them
        (batch, _) = read_batches(cfg, three)
        for item, source in zip(batch, three, strict=False):
            _, height, width = item["image"].shape
            scale = torch.tensor([width / source["width"], height / source["height"]] * 2)
            boxes = torch.tensor([a["bbox"] for a in source["annotations"]], dtype=torch.float32)
            boxes[:, 2:] += boxes[:, :2]
            got = item["instances"]
            assert torch.allclose(got.gt_boxes.tensor, boxes * scale, atol=1.0)
            assert got.gt_classes.tolist() == [a["category_id"] for a in source["annotations"]]
            noise = [NOISE_LABELS[i] for i in got.gt_noise]
            assert noise == [a["noise"] for a in source["annotations"]]
