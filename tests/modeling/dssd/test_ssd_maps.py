"""The network: its maps, its parameters, and pictures of any size."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny_ssd import HEIGHT, WIDTH, picture, tiny_config, tiny_ssd

from ghm_d2.config import load_config
from ghm_d2.errors import UsageError
from ghm_d2.modeling.dssd.backbone import L2Norm, ProjectedBlock
from ghm_d2.modeling.dssd.deconvolution import DeconvolutionModule
from ghm_d2.register import register_all

RECIPES = ("ssd513_R_101", "dssd513_R_101")


@pytest.fixture(scope="module")
def published():
    """The COCO recipes' models, without values: shapes only."""
    register_all()
    models = {}
    for name in RECIPES:
        words = ["MODEL.DEVICE", "meta"]
        cfg = load_config(f"configs/coco/{name}.yaml", words)
        with torch.device("meta"):
            models[name] = build_model(cfg).eval()
    return models


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def conv(inside, outside, kernel, bias=False):
    """Weights, and either a bias or batch norm's scale and shift."""
    return inside * outside * kernel**2 + outside * (1 if bias else 2)


def residual(inside, outside, kernel):
    """Return the parts of the authors' `ResBody`: three convolutions, and one beside them."""
    width = outside // 4
    main = conv(inside, width, kernel) + conv(width, width, 3) + conv(width, outside, 1)
    return main + conv(inside, outside, kernel)


@pytest.mark.parametrize("name", RECIPES)
def test_maps_and_default_boxes_at_513(published, name):
    """The authors' code has maps of 64 to 1 squared, and eight boxes a cell: 43688."""
    model = published[name]
    with torch.no_grad():
        maps = list(model.backbone(torch.empty(1, 3, 513, 513, device="meta")).values())
        logits, deltas = model.head(maps)
    sides = [64, 32, 16, 8, 4, 2, 1]
    assert [tuple(x.shape[-2:]) for x in maps] == [(s, s) for s in sides]
    assert [tuple(x.shape) for x in logits] == [(1, 8 * 81, s, s) for s in sides]
    assert [tuple(x.shape) for x in deltas] == [(1, 8 * 4, s, s) for s in sides]
    assert sum(len(boxes) for boxes in model.anchor_generator(maps)) == 43688
    up = 512 if name == "dssd513_R_101" else None
    expected = [up or 512, up or 2048, *[up or 1024] * 4, 1024]
    assert [x.shape[1] for x in maps] == expected


def test_parameters_of_the_backbone(published):
    """torchvision's ResNet-101 has 44,549,160 (its documentation), 2,049,000 of them the last
    layer's, which SSD leaves out."""
    assert count(published["ssd513_R_101"].backbone.bottom_up) == 44_549_160 - 2_049_000


def test_parameters_of_the_other_parts(published):
    """Counted from the layers that the papers and the authors' code list."""
    ssd, dssd = (published[name] for name in RECIPES)
    for model in (ssd, dssd):
        assert count(model.backbone.extra) == residual(2048, 1024, 2) + 4 * residual(1024, 1024, 2)
    assert count(ssd.backbone.deconvolution) == 0
    laterals, below = [512, 2048, 1024, 1024, 1024, 1024], [512] * 5 + [1024]
    up = sum(
        conv(b, 512, 2, bias=True) + conv(512, 512, 3) + conv(c, 512, 3) + conv(512, 512, 3)
        for c, b in zip(laterals, below, strict=True)
    )
    assert count(dssd.backbone.deconvolution) == up
    predictors = 7 * (conv(1024, 8 * 81, 3, bias=True) + conv(1024, 8 * 4, 3, bias=True))
    for model, channels in ((ssd, [*laterals, 1024]), (dssd, [512] * 6 + [1024])):
        assert count(model.head) == predictors + sum(residual(c, 1024, 1) for c in channels)


def test_prediction_module_projects_its_skip():
    """Module (c) has a convolution there even where the channels stay."""
    block = ProjectedBlock(64, 64)
    assert block.shortcut.weight.shape == (64, 64, 1, 1)
    torch.nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 64, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block.eval()(x), block.shortcut(x).relu())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 4), (9, 9)])
def test_a_step_rounds_up_and_deconvolution_undoes_it(height, width):
    x = torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(0))
    smaller = ProjectedBlock(8, 16, stride=2)(x)
    assert smaller.shape == (2, 16, -(-height // 2), -(-width // 2))
    assert DeconvolutionModule(16, 8, 12)(smaller, x).shape == (2, 12, height, width)


def test_the_last_row_of_an_odd_side_counts():
    block = ProjectedBlock(4, 8, stride=2).eval()
    x = torch.zeros(1, 4, 5, 5)
    plain = block(x)
    x[..., -1, -1] = 1
    assert not torch.equal(block(x), plain)


def test_deconvolution_multiplies():
    """Figure 3: where either side is 0, so is the product; both sides' signs enter it."""
    module = DeconvolutionModule(8, 4, 6, norm="").eval()
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, 8, 2, 3, generator=generator)
    lateral = torch.randn(1, 4, 4, 6, generator=generator)
    a = module.conv(module.deconv(small))
    first, second = module.lateral
    b = torch.nn.functional.conv2d(lateral, first.weight, first.bias, padding=1).relu()
    b = torch.nn.functional.conv2d(b, second.weight, second.bias, padding=1)
    torch.testing.assert_close(module(small, lateral), (a * b).clamp(min=0))
    torch.nn.init.zeros_(second.weight)
    assert not module(small, lateral).any()


def test_deconvolution_starts_near_ssds_own_map():
    """From a backbone's weights alone; the smaller map's share is then learnt."""
    module = DeconvolutionModule(8, 4, 6)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(4, 8, 5, 5, generator=generator)
    lateral = torch.randn(4, 4, 10, 10, generator=generator)
    own = module.lateral(lateral).relu()
    difference = module(small, lateral) - own
    assert 0 < difference.norm() < 0.2 * own.norm()


def test_l2_norm():
    """Each pixel is normalised over its channels, times a learnt scale per channel (SSD, 3.1)."""
    layer = L2Norm(3, 20.0)
    assert layer.weight.tolist() == [20.0] * 3
    layer.weight.data = torch.tensor([1.0, 2.0, 3.0])
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    for n in range(2):
        for i in range(2):
            for j in range(2):
                length = sum(float(v) ** 2 for v in x[n, :, i, j]) ** 0.5
                expected = [float(x[n, c, i, j]) / length * (c + 1) for c in range(3)]
                assert y[n, :, i, j].tolist() == pytest.approx(expected, rel=1e-5)
    assert not layer(torch.zeros(1, 3, 2, 2)).any()  # and no NaN


def test_l2_norm_is_on_the_first_map_alone():
    plain, normed = tiny_ssd(DECONV_CHANNELS=0), tiny_ssd(DECONV_CHANNELS=0, L2_NORM_SCALE=20)
    normed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, *others = plain.eval().backbone(x).values()
        first_normed, *others_normed = normed.eval().backbone(x).values()
    torch.testing.assert_close(
        first_normed, 20 * first / first.norm(dim=1, keepdim=True).clamp(min=1e-12)
    )
    for a, b in zip(others, others_normed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 130), (5, 3)])
def test_pictures_of_any_size(size):
    model = tiny_ssd().eval()
    (result,) = model([{"image": picture(size)}])
    assert result["instances"].image_size == size
    assert len(result["instances"]) > 0
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_an_fpn_below_gets_padded_pictures():
    """An FPN adds maps of two levels; other backbones get pictures of any size."""
    timm = {"MODEL__TIMM__NAME": "test_efficientnet", "MODEL__TIMM__PRETRAINED": ""}
    for name, maps, multiple in (("timm", "res", 0), ("timm_fpn", "p", 32)):
        keys = timm | {"MODEL__BACKBONE__NAME": f"build_ghm_{name}_backbone"}
        model = tiny_ssd(IN_FEATURES=[f"{maps}{n}" for n in (3, 4, 5)], **keys).eval()
        assert model.backbone.size_divisibility == multiple
        (result,) = model([{"image": picture((65, 97))}])
        assert result["instances"].image_size == (65, 97)


def test_without_prediction_modules_maps_are_predicted_from():
    """HEAD_CHANNELS 0 is SSD's head, a convolution a map."""
    model = tiny_ssd(HEAD_CHANNELS=0, DECONV_CHANNELS=0)
    channels = [128, 256, 512, 32]
    expected = sum(9 * c * 8 * (5 + 4) + 8 * (5 + 4) for c in channels)
    assert count(model.head) == expected


def test_scores_at_the_start():
    """Equal where negatives are mined, as published; otherwise nearly all background."""
    maps = [torch.zeros(1, 128, 2, 2), *(torch.zeros(1, c, 1, 1) for c in (256, 512, 32))]
    for kind, background in (("mining", 1 / 5), ("ce", 0.9), ("ghm_c", 0.9)):
        model = tiny_ssd(HEAD_CHANNELS=0, DECONV_CHANNELS=0, CLS_LOSS_TYPE=kind, PRIOR_PROB=0.1)
        logits, _ = model.head(maps)
        scores = logits[0].view(8, 5, 2, 2).softmax(1)
        torch.testing.assert_close(scores[:, -1], torch.full((8, 2, 2), background))
        torch.testing.assert_close(scores[:, 0], scores[:, 3])


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"IN_FEATURES": ("res3", "res6")}, "IN_FEATURES"),
        ({"IN_FEATURES": ("res3", "res5")}, "RES5_DILATION"),
        ({"NUM_LEVELS": 2}, "NUM_LEVELS"),
        ({"NORM": "BNN"}, "MODEL.SSD.NORM must be .* not 'BNN'"),
        ({"NORM": "GN"}, "MODEL.SSD.NORM 'GN' does not fit 16 channels"),
        ({"NORM": "GN", "DECONV_CHANNELS": 0}, "NORM 'GN' does not fit 8 channels"),
        ({"NUM_LEVELS": 5}, "SIZES"),
        ({"CLS_LOSS_TYPE": "focal"}, "mining, ce, ghm_c"),
        ({"BBOX_REG_LOSS_TYPE": "giou"}, "smooth_l1, asl1, ghm_r"),
        ({"MODEL__ANCHOR_GENERATOR__SIZES": [[8, 4]] * 4}, "SIZES"),
        ({"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[0.5, 2.0]]}, "ASPECT_RATIOS"),
    ],
)
def test_what_cannot_be_is_said(keys, word):
    cfg = tiny_config(**keys)
    with pytest.raises(UsageError, match=word):
        build_model(cfg)


def test_freezing_begins_with_the_stem():
    free = tiny_ssd().backbone.bottom_up
    frozen = tiny_ssd(MODEL__BACKBONE__FREEZE_AT=1).backbone.bottom_up
    assert all(p.requires_grad for p in free.parameters())
    fixed = {k for k, p in frozen.named_parameters() if not p.requires_grad}
    assert fixed == {k for k, _ in frozen.named_parameters() if k.startswith("stem.")}
    assert fixed
