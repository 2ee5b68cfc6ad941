#!/usr/bin/env python3
"""Build and install a pure-Python Detectron2 v0.6 where no Detectron2 is importable.

    python tools/detectron2_wheel.py                    into this interpreter's environment
    python tools/detectron2_wheel.py --wheel-dir DIR    leave the wheel in DIR, install nothing

Detectron2 itself is not on PyPI. The archive below holds the Python files of the upstream tag v0.6
without the C++ sources. RetinaNet, Faster R-CNN and Mask R-CNN need no more, because RoIAlign and
NMS come from torchvision. pip fetches the archive and checks its hash, detectron2.patch makes it
run with today's libraries, and the result is a wheel named `detectron2`. Your own Detectron2, of
any version, is left alone if it can be imported.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHIVE = "pb1-detectron2==0.6"
ARCHIVE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# pip 26.3 and newer refuse the archive, because its metadata names an optional dependency by URL.
# So an older pip is fetched, fetches the archive, and is thrown away.
PIP = "pip==25.3"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
PATCH = Path(__file__).with_name("detectron2.patch")
VERSION = re.search(r'^\+version = "(.*)"', PATCH.read_text(encoding="utf-8"), re.M).group(1)


class BuildError(Exception):
    """A failed build; the message says what went wrong and what to do about it."""


def installed() -> str | None:
    """Version and place of the Detectron2 that imports here, or None.

    A new interpreter imports it, because importing Detectron2 imports torch too. It runs in this
    folder, so that a folder named detectron2 in the current directory does not count.
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
    """Return whether the Detectron2 installed here is a wheel that an earlier patch made."""
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "+ghm." in version and version != VERSION


def download(folder: Path) -> Path:
    """Fetch the archive into `folder`."""
    # pip runs an archive's setup.py to learn its metadata. This one imports torch, so that step
    # may not be isolated from this environment.
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
    words = ("--require-hashes", "--no-deps", f"--dest={folder}", f"--requirement={listed}")
    pip("download", *words, *options, remedy="check the network", **kwargs)
    return next(folder.glob(pattern))


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive into a source tree that builds a pure-Python wheel once it is patched."""
    with tarfile.open(archive) as tar:
        # Early releases of Python 3.10 and 3.11 lack the filter; the hash vouches for the content.
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    for project in tree.glob("projects/*/*"):
        shutil.move(project, tree / "detectron2" / "projects" / project.name)
    for name in ("setup.py", "setup.cfg"):  # they need the C++ sources
        (tree / name).unlink()
    return tree


def apply_patch(patch: str, tree: Path) -> None:
    """Apply a unified diff. Python does it, because a new machine may have neither patch nor git.

    Raises:
        BuildError: a file does not match a hunk at the line that the diff states.
    """
    for part in re.split(r"(?m)^diff --git .*\n", patch)[1:]:
        name = re.search(r"(?m)^\+\+\+ b/(.*)$", part).group(1)
        file, new, done = tree / name, [], 0
        old = file.read_text(encoding="utf-8").splitlines(True) if file.is_file() else []
        for start, hunk in re.findall(r"(?ms)^@@ -(\d+)[^\n]*\n(.*?)(?=^@@ |\Z)", part):
            lines, first = hunk.splitlines(True), max(int(start) - 1, 0)
            removed = [line[1:] for line in lines if line[0] in " -"]
            if old[first : first + len(removed)] != removed:
                raise BuildError(
                    f"{PATCH.name} does not fit {name} at line {start}: the patch and the archive "
                    "have come apart. Take both from the latest release of this project"
                )
            new += old[done:first] + [line[1:] for line in lines if line[0] in " +"]
            done = first + len(removed)
        file.write_text("".join(new + old[done:]), encoding="utf-8")


def build(folder: Path, wheel_dir: Path) -> Path:
    """Download, patch and build; return the wheel."""
    say(f"fetching {ARCHIVE}")
    tree = unpack(download(folder), folder)
    say(f"applying {PATCH.name}")
    apply_patch(PATCH.read_text(encoding="utf-8"), tree)
    say(f"building detectron2 {VERSION}")
    options = ("--no-deps", "--no-build-isolation", f"--wheel-dir={wheel_dir}")
    pip("wheel", *options, str(tree), remedy="check that setuptools 77 or newer is installed here")
    return next(wheel_dir.glob(f"detectron2-{VERSION}-*.whl"))


def pip(command: str, *arguments: str, remedy: str, program: Path | None = None) -> None:
    """Run one pip command, by default with the pip of this interpreter."""
    start = [sys.executable, *([str(program)] if program else ["-m", "pip"])]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if command == "download":  # the hashed version may differ from the constraints file's
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
