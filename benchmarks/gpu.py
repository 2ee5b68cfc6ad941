#!/usr/bin/env python3
"""Checks and times everything that needs a GPU, in an estimated eight minutes on an H100.

    python benchmarks/gpu.py --output results/gpu
    python benchmarks/gpu.py --device cpu --tiny --output build/gpu   # only shows that it runs

Each part is a process with its own time limit, and writes its JSON as soon as it is done. A part
that fails, hangs or cannot start does not stop the others. Nothing is downloaded. summary.json has
the outcome of all parts; the exit code is 1 only if no part passed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TESTS = ("tests/kernels/test_triton_losses.py", "tests/kernels/test_triton_passes.py")
STEP = ("--config", "coco/retinanet_R_50_FPN_1x.yaml", "--images", "16", "--size", "800", "1333")
# GHM's recipe, which clips the gradient too; both have the same network
GHM_STEP = ("--config", "coco/retinanet_R_50_FPN_ghm_1x.yaml", *STEP[2:], "--sides", "GHM-C+GHM-R")
SIDES = ("--sides", "CE+SL1", "focal+SL1", "Detectron2 focal+SL1", "GHM-C+GHM-R")
STEPS = ("--steps", "6")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
TINY_STEP = ("--images", "2", "--size", "64", "64", "MODEL.TIMM.NAME", "mobilenetv3_small_050")
TINY_LOSSES = ("--samples", "8000", "--boxes", "100", "--rounds", "1")
# names the GPU that torch sees; in a separate process, since the first use of CUDA may fail or hang
LOOK = """
import json, torch
has = torch.cuda.is_available()
gpu = torch.cuda.get_device_name() if has else None
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu}))
"""


@dataclass(frozen=True)
class Part:
    """A part: its words after `python`, and its time limit in seconds.

    Attributes:
        writes: True if the words take `--output FILE`.
    """

    name: str
    words: tuple[str, ...]
    limit: int
    writes: bool = True


def parts(tiny: bool) -> list[Part]:
    """List the parts, the most important first."""
    losses, step = ((), (*STEP, *STEPS))
    ghm_step = (*GHM_STEP, *STEPS)
    if tiny:
        losses = TINY_LOSSES
        step = ghm_step = ("--steps", "1", *TINY_STEP)

    def script(name: str) -> str:
        return str(HERE / name)

    steps, sync = script("time_steps.py"), script("time_sync.py")
    return [
        Part("checks", (script("gpu_checks.py"),), 120),
        *(
            Part(f"losses_{dtype}", (script("time_losses.py"), "--dtype", dtype, *losses), 60)
            for dtype in ("float32", "bfloat16", "float16")
        ),
        Part("steps", (steps, *SIDES, *step), 120),
        Part("steps_float16", (steps, "--amp", "float16", *SIDES, *step), 90),
        Part("step_alone", (steps, *ghm_step), 60),
        Part("step_in_a_group_of_one", (*TORCHRUN, steps, *ghm_step), 75),
        Part("sync_in_a_group_of_one", (*TORCHRUN, sync), 60),
        # the tree must not hide the installed package, which has the configurations in it
        Part("tests", (*_SAFE_PATH, "-m", "pytest", "-p", "no:cacheprovider", *TESTS), 180, False),
    ]


_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()


def run(part: Part, args, limit: float) -> dict:
    """Run one part and write its JSON; return the outcome without the measurements."""
    file = args.output / f"{part.name}.json"
    file.unlink(missing_ok=True)
    words = list(part.words)
    if part.writes:
        at = next(i for i, word in enumerate(words) if word.endswith(".py")) + 1
        words[at:at] = ["--device", args.device, "--output", str(file)]
    start = time.monotonic()
    code, printed = _run_limited([sys.executable, *words], min(part.limit, limit))
    outcome = {
        "part": part.name,
        "status": "passed" if code == 0 else "failed",
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(["python", *words]).replace(f"{ROOT}/", ""),
    }
    if code != 0:
        outcome["error"] = f"exit code {code}" if code is not None else "time limit exceeded"
    outcome["printed"] = printed[-4000:]
    result = json.loads(file.read_text()) if file.is_file() else None
    _write(file, {**outcome, "environment": args.environment, "result": result})
    return outcome


def _run_limited(command: list[str], limit: float) -> tuple[int | None, str]:
    """Run a command; return its exit code, None at the time limit, and what it printed."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": _threads()}
    # into a file, since a process that is left over would keep a pipe open, and us waiting
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT,
            cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(1, limit))
        except subprocess.TimeoutExpired:
            code = None
            _end(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _end(process: subprocess.Popen) -> None:
    """End the process's group. torchrun's workers are not in it: torchrun ends them at SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # the group may have ended; a process that waits for a driver may not end at all
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=10)


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", str(min(8, os.cpu_count() or 1)))


def look() -> dict:
    """Return the versions of torch and CUDA, and the GPU's name, or why they cannot be told."""
    code, printed = _run_limited([sys.executable, "-c", LOOK], 60)
    try:
        return json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"exit code {code}: {printed[-1000:]}"}


def _write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a few seconds per part, to test on a CPU"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run, such as checks")
    parser.add_argument("--minutes", type=float, default=9, help="time limit for all parts")
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    args.environment = look()
    print(args.environment)
    end = time.monotonic() + 60 * args.minutes
    outcomes = []
    for part in parts(args.tiny):
        if args.only and part.name not in args.only:
            continue
        left = end - time.monotonic()
        if left > 5:
            outcomes.append(run(part, args, left))
        else:
            outcomes.append({"part": part.name, "status": "skipped", "error": "no time left"})
        _write(args.output / "summary.json", {**args.environment, "parts": outcomes})
        shown = outcomes[-1]
        print(
            f"{part.name}: {shown['status']}, {shown.get('seconds', 0)} s", shown.get("error", "")
        )
    sys.exit(not any(outcome["status"] == "passed" for outcome in outcomes))


if __name__ == "__main__":
    main()
