"""Training batches are a function of SEED and the iteration, and bad images stop nothing."""

import itertools
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image
from torch.utils.data._utils import signal_handling

from ghm_d2.config import get_cfg
from ghm_d2.data.loading.loaders import build_train_loader, raise_on_bad_image, take_faults
from ghm_d2.errors import DataError, RunError, UsageError

WIDE, HIGH = (60, 40), (40, 60)
SIZES = (WIDE, HIGH, WIDE, WIDE, (40, 40), HIGH, WIDE, HIGH, WIDE)
RARE = 2  # the only image of class 1


@pytest.fixture
def cfg(tmp_path):
    """The configuration of nine small pictures with a box each, augmented by both generators."""
    generator = np.random.default_rng(0)
    items = []
    for i, (width, height) in enumerate(SIZES):
        file = tmp_path / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
        box = {"bbox": [5, 6, 20, 22], "bbox_mode": BoxMode.XYWH_ABS, "category_id": int(i == RARE)}
        item = {"file_name": str(file), "image_id": i, "width": width, "height": height}
        items.append(item | {"annotations": [box]})
    name = str(tmp_path)
    DatasetCatalog.register(name, lambda: items)
    cfg = get_cfg()
    cfg.SEED, cfg.DATASETS.TRAIN, cfg.DATALOADER.NUM_WORKERS = 7, (name,), 0
    cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.IMS_PER_BATCH = "GHMRetinaNet", 4
    cfg.INPUT.AUGMENTATION, cfg.INPUT.MIN_SIZE_TRAIN = "ssd", (32, 40, 48)
    yield cfg
    DatasetCatalog.remove(name)


def take(cfg, count: int, start: int = 0) -> list[list[dict]]:
    return list(itertools.islice(build_train_loader(cfg, start), count))


def numbers(batches) -> list[list[int]]:
    """Return the numbers of the pictures in batches, by their files' names."""
    return [[number(item["file_name"]) for item in batch] for batch in batches]


def number(file: str) -> int:
    return int(os.path.basename(file).removesuffix(".png"))


def assert_same(ours, theirs):
    assert numbers(ours) == numbers(theirs)
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_workers_change_nothing(cfg):
    alone = take(cfg, 8)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert_same(take(cfg, 8), alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5])
def test_a_resumed_run_gets_the_batches_that_were_next(cfg, start, workers):
    """With what waits for its group's batch to fill."""
    whole = take(cfg, 9)
    cfg.DATALOADER.NUM_WORKERS = workers
    assert_same(take(cfg, 9 - start, start), whole[start:])


def test_processes_share_the_batches_of_one(cfg, monkeypatch):
    whole = take(cfg, 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(cfg, 6))
    assert {len(batch) for share in shares for batch in share} == {2}
    assert_same([a + b for a, b in zip(*shares, strict=True)], whole)


def test_a_batch_that_cannot_be_shared_is_an_error_of_usage(cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(UsageError, match=r"IMS_PER_BATCH .*multiple .*ranks, 3, not 4"):
        build_train_loader(cfg)


def detectron2s_sampler(name: str, items: list[dict], seed: int):
    if name == "RandomSubsetTrainingSampler":
        return RandomSubsetTrainingSampler(len(items), 0.6, seed_shuffle=seed, seed_subset=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(items, 0.5)
        return RepeatFactorTrainingSampler(factors, seed=seed)
    return TrainingSampler(len(items), seed=seed)


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("name", ["Training", "RandomSubsetTraining", "RepeatFactorTraining"])
def test_the_order_is_detectron2s(cfg, name, grouping):
    cfg.DATALOADER.SAMPLER_TRAIN = f"{name}Sampler"
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.DATALOADER.RANDOM_SUBSET_RATIO, cfg.DATALOADER.REPEAT_THRESHOLD = 0.6, 0.5
    cfg.INPUT.AUGMENTATION = ""  # for speed
    items = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    theirs = build_detection_train_loader(
        items,
        mapper=lambda item: item,
        sampler=detectron2s_sampler(cfg.DATALOADER.SAMPLER_TRAIN, items, cfg.SEED),
        total_batch_size=4,
        aspect_ratio_grouping=grouping,
    )
    whole = numbers(itertools.islice(theirs, 30))
    assert numbers(take(cfg, 30)) == whole
    assert numbers(take(cfg, 10, 20)) == whole[20:]
    kinds = [{SIZES[i] == WIDE for i in batch} for batch in whole]
    assert all(len(kind) == 1 for kind in kinds) == grouping
    assert sum(batch.count(RARE) for batch in whole) > (20 if name.startswith("Repeat") else -1)


def test_a_data_set_may_be_smaller_than_a_batch(cfg):
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.ASPECT_RATIO_GROUPING = 12, False
    (first, second) = numbers(take(cfg, 2))
    assert len(first) == len(second) == 12
    assert sorted(first[:9]) == list(range(9))


def test_an_unknown_sampler_and_an_empty_subset_are_errors_of_usage(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "MySampler"
    with pytest.raises(UsageError, match=r"SAMPLER_TRAIN must be TrainingSampler.*not 'MySampler'"):
        build_train_loader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    for ratio in (0.01, 1.5):
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = ratio
        with pytest.raises(UsageError, match="RANDOM_SUBSET_RATIO"):
            build_train_loader(cfg)


def test_images_of_unknown_size_cannot_be_grouped(cfg):
    for item in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        del item["width"]
    with pytest.raises(UsageError, match=r"ASPECT_RATIO_GROUPING.*width"):
        build_train_loader(cfg)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert len(take(cfg, 1)[0]) == 4


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainers_randomness_is_left_alone(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    before = states()
    first = take(cfg, 6)
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert_same(take(cfg, 6), first)  # nor does it matter to the images


def test_an_image_is_augmented_anew_each_time_and_by_the_seed(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 1
    seen = [batch[0]["image"] for batch in take(cfg, 36) if numbers([batch]) == [[0]]]
    assert len(seen) == 4 and len({image.numpy().tobytes() for image in seen}) == 4
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.12  # one image, whatever the seed
    by_seed = set()
    for cfg.SEED in (7, 8, -1):
        by_seed.add(take(cfg, 1)[0][0]["image"].numpy().tobytes())
    assert len(by_seed) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_that_can_be_read(cfg, workers):
    names = [item["file_name"] for item in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]
    good = take(cfg, 8)
    with open(names[8], "wb") as file:
        file.write(b"\x89PNG, or so it says")
    os.remove(names[0])
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = take(cfg, 8)
    expected = [[1 if i in (0, 8) else i for i in batch] for batch in numbers(good)]
    assert numbers(batches) == expected
    for before, batch in zip(good, batches, strict=True):
        bad = {number(item["file_name"]) for item in before} & {0, 8}
        bad |= {0} if 8 in bad else set()  # it was tried in the other's place
        faults = take_faults(batch)
        assert set(faults) == {names[i] for i in bad}
        assert all(fault.startswith(f"{file}: cannot be read") for file, fault in faults.items())
        assert take_faults(batch) == {} and raise_on_bad_image(batch) is batch
        for old, new in zip(before, batch, strict=True):
            if number(old["file_name"]) not in (0, 8):
                assert torch.equal(old["image"], new["image"])


def test_no_replacement_comes_from_outside_the_random_subset(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.4
    subset = {i for batch in numbers(take(cfg, 10)) for i in batch}
    assert len(subset) == 3
    bad = sorted(subset)[0]
    os.remove(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[bad]["file_name"])
    assert {i for batch in numbers(take(cfg, 10)) for i in batch} == subset - {bad}


def test_where_nothing_can_be_read_the_error_stays(cfg):
    for item in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        os.remove(item["file_name"])
    (batch,) = take(cfg, 1)
    assert take_faults(batch) == {}
    with pytest.raises(
        DataError, match=r"\d\.png: cannot be read: .*; the next 8 images cannot be"
    ):
        raise_on_bad_image(batch)


@pytest.fixture
def sigchld(monkeypatch):
    """Make the process look as if PyTorch had started no worker yet."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_killed_worker_is_told_where_a_batch_is_wanted(cfg, sigchld):
    cfg.DATALOADER.NUM_WORKERS = 2
    others = set(multiprocessing.active_children())
    batches = iter(build_train_loader(cfg))
    next(batches)
    worker = next(iter(set(multiprocessing.active_children()) - others))
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # PyTorch would raise here, in a step
    with pytest.raises(RunError) as caught:
        list(itertools.islice(batches, 50))
    message = str(caught.value)
    assert f"process {worker.pid}: SIGKILL" in message and "\n" not in message
    assert "DATALOADER.NUM_WORKERS" in message and "--resume" in message


def test_ctrl_c_ends_no_worker(cfg, sigchld):
    """It goes to all processes of a terminal; the step under way is still to be completed."""
    cfg.DATALOADER.NUM_WORKERS = 1
    others = set(multiprocessing.active_children())
    batches = iter(build_train_loader(cfg))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(itertools.islice(batches, 10))) == 10
