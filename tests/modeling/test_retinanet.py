"""RetinaNet with a choice of losses."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from device_route import never_waiting
from tiny_models import (
    CLASSES,
    assert_resumes_exactly,
    assert_same_inference,
    assert_same_training,
    assert_sound_step,
    ghm_retinanet,
    gradients,
    inputs,
    recorded_losses,
    retinanet,
    step,
)

from ghm_d2.errors import UsageError
from ghm_d2.kernels import operators
from ghm_d2.losses import GHMC, GHMR, asl1_loss, bce_loss, exact_ghm_c_loss, ohem_loss
from ghm_d2.losses.density.gradient_density import SCOPES
from ghm_d2.modeling.labels import box_levels
from ghm_d2.modeling.retinanet import CLS_LOSSES, REG_LOSSES

LEVELS = 5
TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize("reg", ["smooth_l1", "giou", "diou", "ciou"])
def test_without_ghm_it_is_detectron2s_own(reg):
    """Two steps, as the second depends on the normalizer's moving average."""
    theirs = retinanet(**{"MODEL.RETINANET.BBOX_REG_LOSS_TYPE": reg})
    ours = ghm_retinanet("focal", reg, {"MODEL.GHM.KERNEL": "torch"})
    assert_same_training(ours, theirs, [inputs(seed=1), inputs((0, 4), seed=2)])
    assert ours.loss_normalizer.item() == theirs.loss_normalizer != 100


@pytest.mark.parametrize("reg", ["smooth_l1", "giou", "diou", "ciou"])
def test_with_our_kernels_it_agrees_with_detectron2s_own(reg):
    theirs = retinanet(**{"MODEL.RETINANET.BBOX_REG_LOSS_TYPE": reg})
    ours = ghm_retinanet("focal", reg)
    batches = [inputs(seed=1), inputs((0, 4), seed=2)]
    assert_same_training(ours, theirs, batches, rtol=1e-4, atol=1e-6)
    assert ours.loss_normalizer.item() == pytest.approx(theirs.loss_normalizer, rel=1e-12)


@pytest.mark.parametrize("counts", [(4, 3), (0, 5), (0, 0)])
def test_anchors_are_labelled_as_detectron2_does(counts):
    model, batch = ghm_retinanet(), inputs(counts, seed=3)
    arguments, _ = recorded_losses(model, batch, lambda b: step(model, b))
    anchors, _, labels, _, boxes = arguments
    instances = [item["instances"] for item in batch]
    theirs = retinanet().label_anchors(anchors, instances)
    for mine, expected in zip((*labels, *boxes), (*theirs[0], *theirs[1]), strict=True):
        assert torch.equal(mine, expected)
    assert any((y >= 0).any() and (y < 0).any() for y in labels) == any(counts)


@pytest.mark.parametrize("reg", ["smooth_l1", "asl1", "ghm_r"])
def test_the_box_loss_of_all_anchors_is_that_of_those_picked_out(reg, monkeypatch):
    """On a GPU the loss is computed for all anchors, without picking any out."""
    picked, dense = ghm_retinanet("ce", reg), ghm_retinanet("ce", reg)
    for seed in (1, 2):
        batch = inputs((4, 3), seed)
        expected = step(picked, batch)["loss_box_reg"]
        with monkeypatch.context() as patch:
            of_all = lambda *args, dense: box_levels(*args, dense=True)  # noqa: E731
            patch.setattr("ghm_d2.modeling.retinanet.box_levels", of_all)
            loss = step(dense, batch)["loss_box_reg"]
        torch.testing.assert_close(loss, expected)
        mine, theirs = gradients(dense), gradients(picked)
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cls", CLS_LOSSES)
@pytest.mark.parametrize("reg", ["smooth_l1", "asl1", "ghm_r"])
def test_losses_never_wait_for_the_device(cls, reg):
    model, batch = ghm_retinanet(cls, reg), inputs((4, 3))
    arguments, _ = recorded_losses(model, batch, lambda b: step(model, b))
    anchors, *arguments = arguments
    with never_waiting() as meta:
        anchors = [Boxes(a.tensor.to(meta)) for a in anchors]
        instances = [item["instances"].to(meta) for item in batch]
        arguments = [
            [x.detach().to(meta).requires_grad_(x.requires_grad) for x in part]
            for part in arguments
        ]
        with EventStorage(1):
            model.to(meta).label_anchors(anchors, instances)
            losses = model.losses(anchors, *arguments)
        sum(losses.values()).backward()


@pytest.mark.parametrize("cls", ["focal", "ghm_c"])
@pytest.mark.parametrize(("kernel", "said"), [("cuda", "one of auto"), ("triton", "ghm doctor")])
def test_a_kernel_that_is_not_there_is_refused(cls, kernel, said, monkeypatch):
    monkeypatch.setitem(operators.backends, "cuda", None)
    with pytest.raises(UsageError, match=f"MODEL.GHM.KERNEL: .*{said}"):
        ghm_retinanet(cls, keys={"MODEL.GHM.KERNEL": kernel})


@pytest.mark.parametrize("reg", ["smooth_l1", "asl1", "ghm_r"])
def test_what_background_anchors_predict_does_not_reach_the_dense_box_loss(reg):
    model = ghm_retinanet("ce", reg)
    arguments, _ = recorded_losses(model, inputs((4, 3)), lambda b: step(model, b))
    anchors, logits, labels, deltas, boxes = arguments
    background = (torch.stack(labels) == CLASSES).nonzero()[0]
    assert background[1] < deltas[0].shape[1]
    losses = []
    for bad in (0.0, float("inf"), float("nan")):
        spoilt = [d.detach().clone() for d in deltas]
        spoilt[0][tuple(background)] = bad
        with EventStorage(), pytest.MonkeyPatch.context() as patch:
            of_all = lambda *args, dense: box_levels(*args, dense=True)  # noqa: E731
            patch.setattr("ghm_d2.modeling.retinanet.box_levels", of_all)
            model = ghm_retinanet("ce", reg)
            losses.append(model.losses(anchors, logits, labels, spoilt, boxes)["loss_box_reg"])
    assert losses[0].isfinite() and torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_its_own_focal_and_smooth_l1_agree_with_detectron2s():
    """Beside a loss of ours Detectron2's losses keep their values."""
    theirs = retinanet()
    beside_asl1, beside_ce = ghm_retinanet("focal", "asl1"), ghm_retinanet("ce", "smooth_l1")
    for seed in (1, 2):
        expected = step(theirs, inputs(seed=seed))
        focal = step(beside_asl1, inputs(seed=seed))["loss_cls"]
        smooth_l1 = step(beside_ce, inputs(seed=seed))["loss_box_reg"]
        torch.testing.assert_close(focal, expected["loss_cls"].float())
        torch.testing.assert_close(smooth_l1, expected["loss_box_reg"].float())


def split_levels(arguments):
    """Return by level logits (n, K), labels (n,), and deltas, targets and foreground of (n, 4)."""
    anchors, logits, labels, deltas, boxes = arguments
    every_anchor = torch.cat([a.tensor for a in anchors])
    target = torch.stack([TRANSFORM.get_deltas(every_anchor, b) for b in boxes])
    labels, start, levels = torch.stack(labels), 0, []
    for x, d in zip(logits, deltas, strict=True):
        part = slice(start, start + x.shape[1])
        start = part.stop
        y = labels[:, part].reshape(-1)
        foreground = (y >= 0) & (y != CLASSES)
        box = (d.reshape(-1, 4)[foreground], target[:, part].reshape(-1, 4)[foreground])
        levels.append((x.reshape(-1, CLASSES), y, *box))
    assert start == labels.shape[1]
    return levels


def by_hand(build, scope, pairs, losses):
    """A loss over levels: `losses` are kept from step to step."""
    if scope == "batch":
        losses = losses or [build()]
        return losses, losses[0](*(torch.cat(x) for x in zip(*pairs, strict=True)))
    losses = losses or (
        [build()] * LEVELS if scope == "level" else [build() for _ in range(LEVELS)]
    )
    return losses, sum(loss(*pair) for loss, pair in zip(losses, pairs, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_ghm_is_the_loss_modules_over_levels(scope):
    model = ghm_retinanet("ghm_c", "ghm_r", {"MODEL.GHM.SCOPE": scope})
    ghm_c = ghm_r = None
    for seed in (1, 2):
        batch = inputs((6, 6), seed)
        arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
        levels = split_levels(arguments)
        assert len(levels) == LEVELS
        assert sum(len(deltas) > 0 for _, _, deltas, _ in levels) >= 3
        ghm_c, loss_cls = by_hand(GHMC, scope, [level[:2] for level in levels], ghm_c)
        ghm_r, loss_box = by_hand(
            lambda: GHMR(loss_weight=10.0), scope, [level[2:] for level in levels], ghm_r
        )
        torch.testing.assert_close(losses["loss_cls"], loss_cls)
        torch.testing.assert_close(losses["loss_box_reg"], loss_box)
    rows = LEVELS if scope == "level_ema" else 1
    assert model.ghm_c.density.ema.shape == (rows, 30)
    expected = torch.cat([loss.density.ema for loss in dict.fromkeys(ghm_c)])
    torch.testing.assert_close(model.ghm_c.density.ema, expected)


@pytest.mark.parametrize("cls", ["ce", "ohem"])
def test_sums_are_divided_by_detectron2s_normalizer(cls):
    model = ghm_retinanet(cls, "asl1", {"MODEL.GHM.REG.MU": "0.1"})
    normalizer = 100.0
    for seed in (1, 2):
        arguments, losses = recorded_losses(model, inputs((4, 3), seed), lambda b: step(model, b))
        logits, labels, deltas, target = map(torch.cat, zip(*split_levels(arguments), strict=True))
        normalizer = 0.9 * normalizer + 0.1 * len(deltas)
        total = bce_loss(logits, labels, "sum") if cls == "ce" else ohem_loss(logits, labels)
        torch.testing.assert_close(losses["loss_cls"], total / normalizer)
        total = asl1_loss(deltas, target, 0.1, "sum")
        torch.testing.assert_close(losses["loss_box_reg"], total / normalizer)
        assert model.loss_normalizer.item() == pytest.approx(normalizer)


@pytest.mark.parametrize(("cls", "reg"), [("focal", "smooth_l1"), ("ghm_c", "ghm_r")])
def test_the_weight_of_the_box_loss_is_a_factor_on_it_alone(cls, reg):
    plain, doubled = (
        step(
            ghm_retinanet(cls, reg, {"MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT": weight}),
            inputs((4, 3)),
        )
        for weight in ("1.0", "2.0")
    )
    torch.testing.assert_close(doubled["loss_box_reg"], 2 * plain["loss_box_reg"])
    torch.testing.assert_close(doubled["loss_cls"], plain["loss_cls"])


@pytest.mark.parametrize("scope", ["level", "batch"])
def test_the_exact_density_is_of_a_level_or_of_the_batch(scope):
    keys = {"MODEL.GHM.CLS.DENSITY": "exact", "MODEL.GHM.SCOPE": scope}
    model = ghm_retinanet("ghm_c", keys=keys | {"MODEL.GHM.CLS.BINS": "20"})
    arguments, losses = recorded_losses(model, inputs((4, 3)), lambda b: step(model, b))
    pairs = [level[:2] for level in split_levels(arguments)]
    if scope == "batch":
        pairs = [tuple(map(torch.cat, zip(*pairs, strict=True)))]
    expected = sum(exact_ghm_c_loss(logits, labels, 1 / 20) for logits, labels in pairs)
    torch.testing.assert_close(losses["loss_cls"], expected)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"MODEL.GHM.CLS.DENSITY": "exakt"}, "unit_regions, exact"),
        ({"MODEL.GHM.CLS.DENSITY": "exact", "MODEL.GHM.SCOPE": "level_ema"}, "level or batch"),
        ({"MODEL.GHM.CLS.DENSITY": "exact", "MODEL.GHM.CLS.BINS": "0"}, "MODEL.GHM.CLS"),
    ],
)
def test_an_exact_density_that_cannot_be_had_is_refused(keys, words):
    with pytest.raises(UsageError, match=words):
        ghm_retinanet("ghm_c", keys=keys)


@pytest.mark.parametrize("cls", CLS_LOSSES)
@pytest.mark.parametrize("reg", REG_LOSSES)
def test_every_combination_trains(cls, reg):
    model = ghm_retinanet(cls, reg)
    assert_sound_step(model, inputs((4, 3)), [model.head])
    assert_sound_step(model, inputs((0, 3)), [model.head])
    assert_sound_step(model, inputs((0, 0)), [model.head], reaching=False)


def test_ghm_improves_what_it_trains_on():
    """A few steps on one batch: the plain loss that nobody optimises falls."""
    model, batch = ghm_retinanet("ghm_c", "ghm_r"), inputs((4, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def plain():
        arguments, _ = recorded_losses(model, batch, lambda b: step(model, b))
        logits, labels, deltas, target = map(torch.cat, zip(*split_levels(arguments), strict=True))
        return bce_loss(logits, labels).item(), asl1_loss(deltas, target, reduction="mean").item()

    before = plain()
    for _ in range(30):
        step(model, batch)
        optimizer.step()
    after = plain()
    assert after[0] < 0.85 * before[0] and after[1] < 0.85 * before[1]


@pytest.mark.parametrize(("cls", "reg"), [("focal", "smooth_l1"), ("ghm_c", "ghm_r")])
def test_inference_is_unchanged(cls, reg):
    assert_same_inference(ghm_retinanet(cls, reg), retinanet())


def test_detectron2_weights_load():
    model = ghm_retinanet("ghm_c", "ghm_r")
    missing, unexpected = model.load_state_dict(retinanet().state_dict(), strict=False)
    assert not unexpected
    densities = [f"{p}.density.{b}" for p in ("ghm_c", "ghm_r") for b in ("ema", "num_updates")]
    assert sorted(missing) == sorted(["loss_normalizer", *densities])


@pytest.mark.parametrize(
    ("cls", "reg"), [("ghm_c", "ghm_r"), ("focal", "smooth_l1"), ("ce", "asl1")]
)
def test_a_saved_model_continues_exactly(cls, reg, tmp_path):
    assert_resumes_exactly(lambda: ghm_retinanet(cls, reg), tmp_path)


@pytest.mark.parametrize(
    ("cls", "reg", "key"),
    [("fokal", "smooth_l1", "CLS_LOSS_TYPE"), ("ce", "l2", "BBOX_REG_LOSS_TYPE")],
)
def test_unknown_loss_type(cls, reg, key):
    with pytest.raises(UsageError, match=f"MODEL.RETINANET.{key} must be one of .*ghm_.*, not"):
        ghm_retinanet(cls, reg)


@pytest.mark.parametrize(
    ("cls", "reg"), [("ghm_c", "ghm_r"), ("ce", "asl1"), ("ohem", "smooth_l1")]
)
def test_bfloat16_step(cls, reg):
    """Finite, and as exact as the predictions allow."""
    model, batch = ghm_retinanet(cls, reg), inputs((4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
    assert arguments[1][0].dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.head.parameters())
    again = ghm_retinanet(cls, reg)
    anchors, logits, labels, deltas, boxes = arguments
    with EventStorage():
        exact = again.losses(
            anchors, [x.float() for x in logits], labels, [x.float() for x in deltas], boxes
        )
    for name, loss in losses.items():
        assert loss.isfinite() and loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_normalizer_stays_exact_in_a_model_of_half_precision(dtype):
    model = ghm_retinanet()
    model.loss_normalizer.fill_(2049.1)
    before = model.loss_normalizer.clone()
    model.to(dtype)
    assert model.head.cls_score.weight.dtype == dtype
    assert model.loss_normalizer.dtype == torch.float64
    assert torch.equal(model.state_dict()["loss_normalizer"], before)


@pytest.mark.parametrize("where", ["cls_score", "bbox_pred"])
def test_weights_that_are_nan_give_nan_and_no_fault(where):
    model = ghm_retinanet("ghm_c", "ghm_r")
    getattr(model.head, where).weight.data[0, 0, 0, 0] = float("nan")
    losses = step(model, inputs((4, 3)))
    name = "loss_cls" if where == "cls_score" else "loss_box_reg"
    assert [k for k, loss in losses.items() if loss.isnan()] == [name]


@pytest.mark.parametrize(("cls", "reg"), [("ghm_c", "ghm_r"), ("focal", "smooth_l1")])
def test_the_losses_of_a_step_compile_without_a_graph_break(cls, reg):
    torch.compiler.reset()
    robust = {"SCOPE": "batch", "CLS.PRIOR": "3.0", "REG.MU_QUANTILE": "0.5"}
    robust = {f"MODEL.GHM.{key}": value for key, value in robust.items()}
    eager, compiled = ghm_retinanet(cls, reg, robust), ghm_retinanet(cls, reg, robust)
    compiled.losses = torch.compile(compiled.losses, backend="aot_eager", fullgraph=True)
    assert_same_training(compiled, eager, [inputs(seed=1), inputs(seed=2)], rtol=1e-4, atol=1e-6)
