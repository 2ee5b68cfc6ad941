"""Detectors on two processes with half of a batch each: they train as one with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_models import CLASSES, ghm_faster_rcnn, inputs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ghm_d2.config import load_config
from ghm_d2.register import register_all

WORLD = 2
DETECTORS = ("RETINANET", "FCOS", "SSD", "YOLOV3")
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.TIMM.PRETRAINED": "",
    "MODEL.TIMM.NAME": "test_efficientnet",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.FCOS.NUM_CONVS": "1",
    "MODEL.SSD.EXTRA_CHANNELS": "16",
    "MODEL.SSD.HEAD_CHANNELS": "16",
    "MODEL.YOLOV3.CHANNELS": "(16, 16, 16)",
    **{f"MODEL.{name}.NUM_CLASSES": str(CLASSES) for name in DETECTORS},
}
REG = "MODEL.{}.BBOX_REG_LOSS_TYPE".format
CASES = {
    "retinanet": ("retinanet_focal", {}),
    "retinanet of Detectron2": ("retinanet_focal", {"MODEL.GHM.KERNEL": "torch"}),
    "retinanet, ce and giou": ("retinanet_ce", {REG("RETINANET"): "giou"}),
    "retinanet, GHM": ("retinanet_ghm", {}),
    "retinanet, GHM, batch": ("retinanet_ghm", {"MODEL.GHM.SCOPE": "batch"}),
    "fcos": ("fcos", {}),
    "fcos of Detectron2": ("fcos", {"MODEL.GHM.KERNEL": "torch"}),
    "fcos, GHM": ("fcos_ghm_c", {REG("FCOS"): "ghm_r"}),
    "yolov3": ("yolov3", {}),
    "yolov3, GHM": ("yolov3_ghm", {}),
    "ssd": ("ssd", {}),
    "ssd, GHM": ("ssd_ghm", {}),
}
TWO_STAGE = {"box head": ("ghm_c", "ghm_r"), "and RPN": ("ghm_c", "ghm_r", "ghm_c")}
UNSYNCED = ("retinanet", "retinanet, GHM", "fcos", "yolov3", "ssd")
# Detectron2's boxes and focal loss are float32, and so is its centerness, whatever the model is
FLOAT32 = ("retinanet of Detectron2", "retinanet, ce and giou", *(c for c in CASES if "fcos" in c))
# of four images in each step: the second process's have no object at first
OBJECTS = ((3, 2, 0, 0), (1, 0, 4, 2))


def build(case, sync=True):
    """Build a detector in double precision, with all of its batch norms' statistics at rest."""
    register_all()
    name, keys = CASES[case]
    keys = {**TINY, **keys, "MODEL.GHM.SYNC": str(sync)}
    words = [word for pair in keys.items() for word in pair]
    torch.manual_seed(0)
    model = build_model(load_config(f"quick/{name}.yaml", words)).train().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def train(model, images):
    """Losses and gradients of each step, with the images of these indices, and the buffers."""
    steps = []
    for seed, objects in enumerate(OBJECTS):
        batch = inputs(objects, seed=seed)
        model.zero_grad()
        with EventStorage():
            losses = model([batch[i] for i in images])
        sum(losses.values()).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        steps.append((losses, gradients))
    return steps, {name: buffer.clone() for name, buffer in model.named_buffers()}


def counted_calls(action):
    calls, original = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        calls.append(tensor.numel())
        return original(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        return action(), len(calls)
    finally:
        dist.all_reduce = original


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    half = (2 * rank, 2 * rank + 1)
    results = {}
    for case in CASES:
        model = DistributedDataParallel(build(case), broadcast_buffers=False)
        results[case] = counted_calls(lambda model=model: train(model, half))
    for case in UNSYNCED:
        model = DistributedDataParallel(build(case, sync=False), broadcast_buffers=False)
        results["unsynced", case] = counted_calls(lambda model=model: train(model, half))
    for name, types in TWO_STAGE.items():
        model = ghm_faster_rcnn(*types)
        results[name] = counted_calls(lambda model=model: train(model, half))[1]
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_averages_are_those_of_one_process(processes, case):
    tolerance = 1e-5 if case in FLOAT32 else 1e-10
    steps, buffers = train(build(case), range(4))
    of_ranks = [p[case][0] for p in processes]
    for step, (losses, gradients) in enumerate(steps):
        for name, loss in losses.items():
            mean = sum(of_rank[0][step][0][name] for of_rank in of_ranks) / WORLD
            # Detectron2's focal loss is float32 whatever the logits are
            torch.testing.assert_close(mean.to(loss), loss, rtol=tolerance, atol=1e-12)
        largest = max(g.abs().max() for g in gradients.values())
        for name, gradient in gradients.items():
            for of_rank in of_ranks:  # DistributedDataParallel has averaged them
                mine = of_rank[0][step][1][f"module.{name}"]
                assert (mine - gradient).abs().max() <= tolerance * largest, name
    for name, buffer in buffers.items():
        for of_rank in of_ranks:
            assert torch.equal(of_rank[1][f"module.{name}"], buffer), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_one_all_reduce(processes, case):
    assert [p[case][1] for p in processes] == [len(OBJECTS)] * WORLD


@pytest.mark.parametrize(("name", "number"), [("box head", 1), ("and RPN", 2)])
def test_all_reduces_of_a_two_stage_detector(processes, name, number):
    assert [p[name] for p in processes] == [number * len(OBJECTS)] * WORLD


@pytest.mark.parametrize("case", UNSYNCED)
def test_without_sync_each_process_counts_by_itself_and_gradients_are_averaged(processes, case):
    """The authors' code and mmdetection do the same on several GPUs."""
    alone = [train(build(case), (2 * rank, 2 * rank + 1)) for rank in range(WORLD)]
    for p, (expected, own) in zip(processes, alone, strict=True):
        (steps, buffers), calls = p["unsynced", case]
        assert calls == 0
        for step, (losses, gradients) in enumerate(steps):
            torch.testing.assert_close(losses, expected[step][0], rtol=1e-10, atol=1e-12)
            for name, gradient in gradients.items():
                each = [a[0][step][1][name.removeprefix("module.")] for a in alone]
                torch.testing.assert_close(gradient, sum(each) / WORLD, rtol=1e-5, atol=1e-9)
        assert all(torch.equal(buffers[f"module.{k}"], buffer) for k, buffer in own.items())
