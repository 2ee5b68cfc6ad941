#!/usr/bin/env python3
"""Build and install a pure-Python Detectron2 v0.6 where no Detectron2 is importable.

    python tools/detectron2_wheel.py                    into this interpreter's environment
    python tools/detectron2_wheel.py --wheel-dir DIR    leave the wheel in DIR, install nothing

Detectron2 is on PyPI under no name of its own. The archive below carries the Python files of the
upstream tag v0.6 without the C++ sources, which is all that RetinaNet, Faster R-CNN and Mask R-CNN
need: RoIAlign and NMS come from torchvision. It is fetched by pip with its hash checked, MENDS are
applied so that it runs with today's libraries, and the result is a wheel named `detectron2`.
A Detectron2 that is already importable, of whatever version, is left alone.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ARCHIVE = "pb1-detectron2==0.6"
ARCHIVE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# pip 26.3 and newer refuse the archive, as its metadata names an optional dependency by URL: it is
# fetched by an older pip, which is itself fetched for that and thrown away.
PIP = "pip==25.3"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
VERSION = "0.6+ghm.1"  # raise the last number with any change below: it replaces an older wheel

SOURCE_BUILD = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)


class Mend(NamedTuple):
    """Replace `old` by `new` in detectron2/`path`; `count` is how often `old` must be there."""

    path: str
    old: str
    new: str
    reason: str
    count: int = 1


OPS = "the compiled ops are not in this wheel: using one must say so, importing must not fail"
CV2 = "OpenCV is optional: using it must say so, importing must not fail"
SETUPTOOLS = "pkg_resources left setuptools in 81"
NUMPY = "np.bool, np.int, np.float and np.str left NumPy in 1.24"
MESHGRID = "torch.meshgrid warns unless the indexing is spelled out"
AMP = "torch.cuda.amp is deprecated in favour of torch.amp"

IMPORT_C = ("from detectron2 import _C\n", "from detectron2._missing import _C\n")
IMPORT_CV2 = ("import cv2\n", "from detectron2._missing import cv2\n")
PANOPTIC_ARANGE = "torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"

# fmt: off
MENDS = [
    Mend("layers/deform_conv.py", *IMPORT_C, OPS),
    Mend("layers/rotated_boxes.py", *IMPORT_C, OPS),
    Mend("layers/roi_align_rotated.py", *IMPORT_C, OPS),
    Mend("layers/nms.py", "    return torch.ops.detectron2.nms_rotated(",
         "    from detectron2._missing import _C\n\n    return _C.nms_rotated(", OPS),
    Mend("evaluation/coco_evaluation.py",
         "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
         "\ntry:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
         "except ImportError:\n    COCOeval_opt = COCOeval\n\n",
         "fast_eval_api needs a compiled op; pycocotools gives the same numbers"),
    Mend("utils/visualizer.py", *IMPORT_CV2, CV2),
    Mend("projects/point_rend/color_augmentation.py", *IMPORT_CV2, CV2),
    Mend("model_zoo/model_zoo.py", "import pkg_resources\n", "", SETUPTOOLS),
    Mend("model_zoo/model_zoo.py",
         "pkg_resources.resource_filename(\n"
         '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
         'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
         SETUPTOOLS),
    Mend("structures/masks.py", "np.bool)", "bool)", NUMPY, 3),
    Mend("utils/visualizer.py", "np.bool)", "bool)", NUMPY, 3),
    Mend("utils/video_visualizer.py", "np.bool)", "bool)", NUMPY),
    Mend("evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", NUMPY, 2),
    Mend("evaluation/sem_seg_evaluation.py", "np.int)", "int)", NUMPY, 2),
    Mend("evaluation/sem_seg_evaluation.py", "np.float)", "float)", NUMPY, 5),
    Mend("data/build.py", "dtype=np.int\n", "dtype=int\n", NUMPY),
    Mend("data/build.py", "dtype=np.int)", "dtype=int)", NUMPY),
    Mend("data/datasets/pascal_voc.py", "np.str)", "str)", NUMPY),
    Mend("layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)",
         "since NumPy 2.0 copy=False means 'never copy', and raises here"),
    Mend("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR",
         "Image.LINEAR left Pillow in 10.0"),
    Mend("utils/visualizer.py", "        return modified_color\n",
         "        return tuple(min(max(c, 0.0), 1.0) for c in modified_color)\n",
         "Python 3.10 rounds some bright colours to a hair above 1, which Matplotlib refuses"),
    Mend("modeling/anchor_generator.py", "torch.meshgrid(shifts_y, shifts_x)",
         'torch.meshgrid(shifts_y, shifts_x, indexing="ij")', MESHGRID),
    Mend("projects/panoptic_deeplab/post_processing.py", PANOPTIC_ARANGE,
         PANOPTIC_ARANGE + '        indexing="ij",\n', MESHGRID),
    Mend("engine/train_loop.py",
         "from torch.cuda.amp import GradScaler\n\n            grad_scaler = GradScaler()\n",
         'grad_scaler = torch.amp.GradScaler("cuda")\n', AMP),
    Mend("engine/train_loop.py", "        from torch.cuda.amp import autocast\n", "", AMP),
    Mend("engine/train_loop.py", "with autocast():", 'with torch.amp.autocast("cuda"):', AMP),
    Mend("engine/hooks.py", "lr_scheduler._LRScheduler", "lr_scheduler.LRScheduler",
         "torch's own schedulers no longer derive from _LRScheduler: their state would be lost", 2),
    Mend("export/__init__.py", "from .api import *\n",
         "try:\n    from .api import *\nexcept ImportError:\n    pass\n",
         "only .api needs caffe2, which torch no longer ships; utils.analysis needs the rest"),
]
# fmt: on

# Added to the wheel as detectron2/_missing.py. There is no stub named detectron2._C: whoever asks
# whether that exists (`fast_eval_api`, `collect_env`, other people's code) gets a true answer.
MISSING = f'''\
"""Stand-ins for what this build of Detectron2 lacks; asking one for anything names the remedy."""


class _Missing:
    def __init__(self, what, remedy):
        self._what, self._remedy = what, remedy

    def __getattr__(self, name):
        raise ImportError(f"{{self._what}} {{name!r}} is not available here. {{self._remedy}}")


_C = _Missing(
    "Detectron2's compiled op",
    "This Detectron2 ({VERSION}) has the Python files only. For the compiled ops, build it from "
    "source with a C++ compiler (and CUDA's nvcc for the GPU): pip uninstall detectron2, then "
    "{SOURCE_BUILD}",
)

try:
    import cv2
except ImportError:
    cv2 = _Missing("OpenCV's", "Get it with: pip install opencv-python-headless")
'''

PYPROJECT = f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{VERSION}"
description = "Detectron2 v0.6, Python files only, mended for current torch, NumPy and Pillow"
readme = "MENDS.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.10"
# Upstream's list without what only its Caffe2 export used (future, pydot), without the pins that
# no longer resolve (black==21.4b2, iopath<0.1.10), and with torch, which it left to the reader.
dependencies = [
    "torch>=2.6", "torchvision>=0.21", "fvcore>=0.1.5,<0.1.6", "iopath>=0.1.7", "yacs>=0.1.8",
    "omegaconf>=2.1", "hydra-core>=1.1", "pycocotools>=2.0.2", "Pillow>=7.1", "matplotlib",
    "tensorboard", "termcolor>=1.1", "tabulate", "cloudpickle", "tqdm>4.29.0",
]

[tool.setuptools.packages.find]
include = ["detectron2*"]
namespaces = false

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""


class BuildError(Exception):
    """What went wrong and what to do about it, in one message."""


def installed() -> str | None:
    """Version and place of the Detectron2 that imports here, or None.

    Asked of a fresh interpreter, away from this folder, because importing it takes torch along
    and a folder named detectron2 in the current directory must not count.
    """
    code = "import detectron2 as d; print(d.__version__, 'in', d.__path__[0])"
    found = run([sys.executable, "-c", code], cwd=Path(__file__).parent)
    if found.returncode == 0:
        return found.stdout.strip()
    last_line = (found.stderr.strip() or "no message").splitlines()[-1]
    if "No module named 'detectron2'" in last_line:
        return None
    raise BuildError(
        f"a Detectron2 is installed but does not import ({last_line}). Mend it, or remove it with "
        f"`{sys.executable} -m pip uninstall detectron2` and run this again"
    )


def is_outdated() -> bool:
    """Whether the Detectron2 installed here is an earlier wheel of this tool's."""
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "+ghm." in version and version != VERSION


def download(folder: Path) -> Path:
    """Fetch the archive into `folder`."""
    # pip asks an archive for its metadata by running its setup.py. This one imports torch,
    # so that step may not be isolated from this environment.
    for module in ("torch", "setuptools"):
        if importlib.util.find_spec(module) is None:
            raise BuildError(f"{module} is needed first: {sys.executable} -m pip install {module}")
    older_pip = fetch(PIP, PIP_SHA256, folder, "*.whl", "--only-binary=:all:")
    options = ("--no-binary=:all:", "--no-build-isolation")
    return fetch(ARCHIVE, ARCHIVE_SHA256, folder, "*.tar.gz", *options, program=older_pip / "pip")


def fetch(requirement: str, sha256: str, folder: Path, pattern: str, *options, **kwargs) -> Path:
    """Have pip download one file, check its hash and leave it in `folder`."""
    listed = folder / "requirements.txt"
    listed.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip(
        "download", "--require-hashes", "--no-deps", f"--dest={folder}",
        f"--requirement={listed}", *options, remedy="check the network", **kwargs,
    )  # fmt: skip
    return next(folder.glob(pattern))


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive and return its only top-level folder."""
    with tarfile.open(archive) as tar:
        # Early releases of Python 3.10 and 3.11 lack the filter; the hash vouches for the content.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder, **safely)
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    return tree


def mend(tree: Path, mends=MENDS) -> None:
    """Apply `mends` in order; one that does not match exactly as often as it should is an error."""
    for number, (path, old, new, reason, count) in enumerate(mends, start=1):
        file = tree / "detectron2" / path
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text.count(old) != count:
            raise BuildError(
                f"mend {number} does not match detectron2/{path}: {old!r} should be there "
                f"{count} times and is there {text.count(old)} times (its reason: {reason}). "
                "This tool and the archive have come apart: take the tool from the latest release"
            )
        file.write_text(text.replace(old, new), encoding="utf-8")


def prepare(tree: Path) -> None:
    """Turn the unpacked archive into a source tree that builds a pure-Python wheel."""
    for project in tree.glob("projects/*/*"):
        shutil.move(project, tree / "detectron2" / "projects" / project.name)
    for name in ("setup.py", "setup.cfg"):  # they want the C++ sources
        (tree / name).unlink()
    mend(tree)
    (tree / "detectron2" / "_missing.py").write_text(MISSING)
    (tree / "pyproject.toml").write_text(PYPROJECT)
    changes = "".join(f"- detectron2/{m.path}: {m.reason}\n" for m in MENDS)
    (tree / "MENDS.md").write_text(f"Detectron2 v0.6 with these changes:\n\n{changes}")


def build(folder: Path, wheel_dir: Path) -> Path:
    """Download, mend and build; return the wheel."""
    say(f"fetching {ARCHIVE}")
    tree = unpack(download(folder), folder)
    say(f"applying {len(MENDS)} mends")
    prepare(tree)
    say(f"building detectron2 {VERSION}")
    pip(
        "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheel_dir}", str(tree),
        remedy="check that setuptools 77 or newer is installed here",
    )  # fmt: skip
    return next(wheel_dir.glob(f"detectron2-{VERSION}-*.whl"))


def pip(command: str, *arguments: str, remedy: str, program: Path | None = None) -> None:
    """Run one pip command, by default with the pip of this interpreter."""
    start = [sys.executable, *([str(program)] if program else ["-m", "pip"])]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if command == "download":  # a hash pins harder than a constraints file, and may differ from it
        environment.pop("PIP_CONSTRAINT", None)
    done = run([*start, command, *arguments], env=environment)
    if done.returncode:
        raise BuildError(f"pip {command} failed; {remedy}. It said:\n{done.stderr or done.stdout}")


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options
    )


def say(message: str) -> None:
    print(f"detectron2: {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel-dir", type=Path, help="leave the wheel there, install nothing")
    args = parser.parse_args()
    if not (args.wheel_dir or is_outdated()) and (here := installed()):
        say(f"{here} is installed; left as it is")
        return
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch), (args.wheel_dir or Path(scratch)).absolute())
        if not args.wheel_dir:
            pip("install", str(wheel), remedy="check that this environment can be written to")
    say(f"wheel is {wheel}" if args.wheel_dir else f"installed: {installed()}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"detectron2: error: {error}")
