"""A data set of a few tiny images, and the command line as a user runs it."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# so few threads that tests running side by side do not wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "2")

# a job in the background ignores Ctrl-C, and so would the commands that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """A warning that is laid to a module of the tests, tools or benchmarks is an error."""
    root = Path(__file__).parents[1]
    files = [
        file for part in ("tests", "tools", "benchmarks") for file in root.glob(f"{part}/**/*.py")
    ]
    names = "|".join(sorted({file.stem for file in files}))
    config.addinivalue_line("filterwarnings", f"error:::({names})$")


@pytest.fixture(autouse=True)
def freed_memory_is_given_back(request):
    """After a slow test: glibc keeps gigabytes that models of the published size have freed."""
    yield
    if request.node.get_closest_marker("slow") and sys.platform == "linux":
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


# a detector of seconds: random weights, images of 64 px, four iterations
TINY = (
    "MODEL.TIMM.PRETRAINED ''",
    "MODEL.TIMM.NAME test_efficientnet",
    "MODEL.FPN.OUT_CHANNELS 16",
    "MODEL.RETINANET.NUM_CONVS 1",
    "MODEL.RETINANET.SCORE_THRESH_TEST 0.001",
    "INPUT.MIN_SIZE_TRAIN (64,)",
    "INPUT.MIN_SIZE_TEST 64",
    "SOLVER.MAX_ITER 4",
    "SOLVER.IMS_PER_BATCH 2",
    "SOLVER.WARMUP_ITERS 0",
    "SOLVER.CHECKPOINT_PERIOD 2",
)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides, KEY VALUE in turn, that make a quick configuration tiny."""
    return [word for pair in TINY for word in pair.split(" ", 1)]


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> str:
    """A folder with train.json, val.json and their images: six and three digits pictures."""
    from ghm_d2.data.digits.dataset import DigitsSpec, write

    folder = tmp_path_factory.mktemp("data") / "digits"
    spec = DigitsSpec(train=6, val=3, image_size=(64, 80), objects=(1, 3), side=(12, 40))
    write(spec, folder)
    return str(folder)


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory):
    """The folder above a small coco/ in COCO's layout: what DETECTRON2_DATASETS names."""
    from coco_folder import write_coco

    return write_coco(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def coco_names(coco_root):
    """Detectron2's names (coco_2017_val, ...) stand for that folder within this process."""
    from coco_folder import registered_at

    with registered_at(coco_root):
        yield coco_root


@pytest.fixture(scope="session")
def ghm():
    """Runs `ghm` with words in this process, from `cwd`; gives returncode, stdout and stderr."""
    from command import run_command

    return run_command


@pytest.fixture(scope="session")
def ghm_process():
    """Runs `ghm` with words as a process of its own, for what a process alone shows."""

    def run(*words, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ghm_d2.cli", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, **kwargs
        )

    return run


@pytest.fixture(scope="session")
def noisy_folder(tmp_path_factory) -> str:
    """Seven training pictures of digits; a third of the annotations of each kind of noise."""
    from ghm_d2.data.digits.dataset import DigitsSpec, write

    folder = tmp_path_factory.mktemp("data") / "noisy"
    spec = DigitsSpec(
        train=7,
        val=3,
        image_size=(64, 80),
        objects=(1, 3),
        side=(12, 40),
        noise_class=0.33,
        noise_shift=0.33,
        noise_missing=0.0,  # no picture is left without a box
    )
    write(spec, folder)
    return str(folder)


@pytest.fixture(scope="session")
def detector(tiny):
    """Return a builder of (cfg, model) from a quick configuration, a folder, KEY VALUE words."""
    import torch
    from detectron2.modeling import build_model

    from ghm_d2.config import load_config
    from ghm_d2.data.catalog import apply_to_config
    from ghm_d2.register import register_all

    def build(name: str, folder: str, *words: str):
        register_all()
        cfg = load_config(f"quick/{name}.yaml", [*tiny, "MODEL.DEVICE", "cpu", *words])
        apply_to_config(cfg, folder)
        torch.manual_seed(0)
        model = build_model(cfg)
        for key, parameter in model.named_parameters():
            if "cls_score" in key or "bbox_pred" in key:
                parameter.data.normal_(0, 0.3 if parameter.dim() > 1 else 0.5)
        return cfg, model.eval()

    return build
