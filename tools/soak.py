"""`make soak`: breaks real trainings in every way it knows, and shows what was lost.

Each broken training is compared with one that was left alone: everything in its last checkpoint
(weights, optimizer, schedule, moving averages) and its metrics, to the bit. Linux only.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from ghm_d2.data.digits.dataset import DigitsSpec, write

ITERATIONS, PERIOD, PATIENCE = 99, 5, 90  # PATIENCE: seconds that nothing may take
SETTINGS = (
    (
        "MODEL.TIMM.PRETRAINED '' MODEL.TIMM.NAME mobilenetv3_small_050 MODEL.FPN.OUT_CHANNELS 16 "
        "MODEL.RETINANET.NUM_CONVS 1 INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 "
        f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD {PERIOD} TEST.EVAL_PERIOD 20"
    )
    .replace("''", "")
    .split(" ")
)
GROUP = ("--num-gpus", "2")


@dataclass
class Row:
    """What became of one kind of fault."""

    fault: str
    planned: int = 0
    injected: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)  # iterations done twice, a fault each
    limit: int = PERIOD  # on them; one checkpoint more where the last one is itself destroyed
    identical: bool | None = None  # None where the fault changes what is trained on

    @property
    def met(self) -> bool:
        """Whether it is as it should be."""
        few = all(0 <= lost <= self.limit for lost in self.lost)
        return (
            self.survived == self.injected == self.planned and few and self.identical is not False
        )


class Training:
    """One run, in as many processes, one after another, as it takes."""

    def __init__(self, output: Path, data: Path, *words: str):
        self.output, self._data, self._words = output, data, words
        self.stderr = output.with_suffix(".txt")

    def start(self, *words: str, **kwargs) -> subprocess.Popen:
        """Begin it, or resume it if it has begun."""
        what = ["--resume", "--device", "cpu"]
        if not (self.output / "config.yaml").exists():
            what = ["--config", "configs/quick/retinanet_ghm.yaml", "--dataset", str(self._data)]
            what += ["--seed", "1", "--overwrite", "--device", "cpu"]
        settings = SETTINGS if what[0] != "--resume" else ()
        command = [sys.executable, "-m", "ghm_d2.cli", "train", "--output", str(self.output)]
        with open(self.stderr, "a") as said:
            self.process = subprocess.Popen(
                [*command, *what, *self._words, *words, *settings],
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                **kwargs,
            )
        return self.process

    def finish(self, *words: str) -> bool:
        """Start and wait for the end; whether it went well."""
        return self.start(*words).wait(PATIENCE) == 0

    def done(self) -> int:
        """Iterations whose metrics are on the disk."""
        file = self.output / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        seen = [json.loads(x)["iteration"] for x in lines if x.endswith("}") and "loss_cls" in x]
        return max(seen, default=-1) + 1

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Whether it came true while the process ran."""
        limit = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < limit:
            if ready():
                return True
            time.sleep(0.01)
        return False

    def wait_for_steps(self, steps: int, known: int) -> bool:
        """For so many iterations, after `known` were said to be resumed from."""
        self.wait_for(lambda: self.resumptions() > known)
        first = self.resumed_after()
        return self.wait_for(lambda: first + steps <= self.done())

    def resumptions(self) -> int:
        """How often a process said where it begins."""
        return self._said().count(" into ")

    def resumed_after(self) -> int:
        """Iterations that the latest process found done."""
        found = [
            x for x in self._said().splitlines() if "resuming after" in x or "training on" in x
        ]
        return int(found[-1].split()[2]) if found and "resuming after" in found[-1] else 0

    def _said(self) -> str:
        return self.stderr.read_text() if self.stderr.exists() else ""


def same_runs(a: Path, b: Path) -> bool:
    """Whether all of the last checkpoints but wall-clock times, and the metrics, are equal."""
    states = [torch.load(x / "model_final.pth", weights_only=True) for x in (a, b)]
    for state in states:
        del state["trainer"]["seconds"]
    files = ("metrics.jsonl", "density.jsonl")
    same_files = all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    return same(*states) and same_files


def same(a, b) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def break_and_resume(run: Training, row: Row, faults: list[Callable], dice) -> bool:
    """Inject each fault after some iterations, resume, and note what was lost; to the end."""
    run.start()
    known, most = 0, 2 * (ITERATIONS - PERIOD) // (len(faults) + 8)
    first = 2 * PERIOD  # so that there are two checkpoints to choose from
    for fault in faults:
        running = run.wait_for_steps(dice.randint(1, most) + first, known)
        time.sleep(dice.uniform(0, 0.3))
        known, first = run.resumptions(), max(0, row.limit - PERIOD)
        if not running:
            break
        row.injected += 1
        fault(run)
        before = run.done()
        run.start()
        run.wait_for(lambda before=known: run.resumptions() > before)
        lost = before - run.resumed_after()
        row.lost.append(lost)
        row.survived += run.process.poll() is None or run.process.returncode == 0
    return run.process.wait(PATIENCE) == 0


def stop(number: int, run: Training) -> None:
    """End it by a signal."""
    run.process.send_signal(number)
    run.process.wait(PATIENCE)


def spoil(how: str, run: Training) -> None:
    """Kill it, and damage its last checkpoint or the note that names it."""
    stop(signal.SIGKILL, run)
    note, file = run.output / "last_checkpoint", max(run.output.glob("model_[0-9]*.pth"))
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: random.Random(len(data)).randrange(len(data))])
    elif how == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "deleted":
        file.unlink()
    else:
        note.unlink()


def move_away(run: Training) -> None:
    """Take the output folder away until the run has noticed."""
    away = run.output.with_name(run.output.name + "-away")
    run.output.rename(away)
    code = run.process.wait(PATIENCE)
    shutil.rmtree(run.output, ignore_errors=True)
    away.rename(run.output)
    if code != 2:
        raise RuntimeError(f"a vanished folder ended the run with {code}")


def limit_files(run: Training) -> None:
    """Resume it under a quota that no checkpoint fits into, until it ends by it."""
    stop(signal.SIGKILL, run)
    quota = (2**19, 2**19)
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, quota)
    if run.start(preexec_fn=limited).wait(PATIENCE) != 2:
        raise RuntimeError("a full disk was not told")


def kill_worker(run: Training) -> None:
    """Kill a process that loads images; the run then ends, and says so."""
    for pid in children(run.process.pid):
        os.kill(pid, signal.SIGKILL)
    if run.process.wait(PATIENCE) != 1:
        raise RuntimeError("a dead loader was not told")


def kill_starter(run: Training) -> None:
    """Kill what started the processes of a group; they notice, and end by themselves."""
    members = children(run.process.pid)
    stop(signal.SIGKILL, run)
    limit = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in members):
        if time.monotonic() > limit:
            raise RuntimeError("the processes of a group outlive what started them")
        time.sleep(0.1)


def kill_rank(rank: str, run: Training) -> None:
    """Kill one process of a group."""
    for pid in children(run.process.pid):
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True)
    return [int(word) for word in listed.stdout.split()]


class Soak:
    """All scenarios, in a folder."""

    def __init__(self, folder: Path, seed: int, kills: int):
        self.folder, self.seed, self.kills = folder, seed, kills
        self.data, self.begin = folder / "data", time.monotonic()
        spec = DigitsSpec(train=40, val=5, image_size=(96, 128), objects=(1, 4), side=(14, 48))
        write(spec, self.data)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    def training(self, name: str, *words: str, data: Path | None = None) -> Training:
        """A run of its own."""
        return Training(self.folder / name, data or self.data, *words)

    def whole(self, name: str, *words: str) -> Path:
        """A run that is left alone."""
        run = self.training(name, *words)
        if not run.finish():
            raise SystemExit(f"the undisturbed training failed; see {run.stderr}")
        self.say(f"undisturbed training: {name}")
        return run.output

    def broken(self, fault: str, reference: Path, faults: list[Callable], *words: str) -> Row:
        """A run with faults, compared with the reference."""
        limit = 0 if "SIGTERM" in fault else 2 * PERIOD if "checkpoint" in fault else PERIOD
        row = Row(fault, len(faults), limit=limit)
        run = self.training(fault.replace(" ", "-").replace(",", ""), *words)
        try:
            ended = break_and_resume(run, row, faults, random.Random(f"{self.seed} {fault}"))
            row.identical = ended and same_runs(run.output, reference)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            row.identical = False
            self.say(f"{fault}: {error}")
        self.say(f"{fault}: {row.survived} of {row.injected} survived")
        return row

    def spoilt_images(self) -> Row:
        """Images are cut short while the run reads them: named once each, and passed over."""
        row, data = Row("image files cut short during the training", 3), self.folder / "spoilt"
        shutil.copytree(self.data, data)
        run = self.training("spoilt-images", data=data)
        run.start()
        run.wait_for_steps(5, 0)
        victims = sorted(data.rglob("train/*.png"))[:3]
        for image in victims:
            image.write_bytes(image.read_bytes()[:100])
        row.injected, ended = len(victims), run.process.wait(PATIENCE) == 0
        said = run.stderr.read_text()
        row.survived = sum(ended and said.count(image.name) == 1 for image in victims)
        row.lost = [0]
        self.say(f"{row.fault}: {row.survived} of {row.injected} survived")
        return row

    def ranks(self, reference: Path) -> Row:
        """Processes of a group are killed; torchrun starts it again by itself."""
        row, run = Row("one of two processes killed", 2), self.training("ranks", *GROUP)
        run.start("--max-restarts", "2")
        seen = 0
        for rank in "10":
            if not run.wait_for_steps(10, seen):
                break
            before, seen = run.done(), run.resumptions()
            row.injected += 1
            kill_rank(rank, run)
            row.survived += run.wait_for(lambda known=seen: run.resumptions() > known)
            row.lost.append(max(0, before - run.resumed_after()))
        row.identical = run.process.wait(PATIENCE) == 0 and same_runs(run.output, reference)
        self.say(f"{row.fault}: {row.survived} of {row.injected} survived")
        return row

    def rows(self) -> list[Row]:
        """Everything; what has one process goes two at a time."""
        whole = self.whole("whole")
        kill = partial(stop, signal.SIGKILL)
        ask = [partial(stop, n) for n in (signal.SIGTERM, signal.SIGINT)] * 3
        spoils = [partial(spoil, how) for how in ("truncated", "flipped", "deleted", "note")]
        single = [
            ("SIGKILL at random moments", [kill] * self.kills),
            ("SIGTERM and SIGINT", ask),
            ("last checkpoint cut, flipped by a bit, gone, its note gone", spoils),
            ("disk full (a quota on files)", [limit_files]),
            ("output folder gone for a while", [move_away]),
            ("a loading process killed", [kill_worker], "DATALOADER.NUM_WORKERS", "1"),
        ]
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(self.broken, name, whole, *more)
                for name, *more in ((n, f, *w) for n, f, *w in single)
            ]
            jobs.append(pool.submit(self.spoilt_images))
            rows = [job.result() for job in jobs]
        pair = self.whole("two-processes", *GROUP)
        rows.append(self.ranks(pair))
        rows.append(
            self.broken("two processes, their starter killed", pair, [kill_starter], *GROUP)
        )
        return rows


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        f"| fault | injected | survived | iterations lost, at most (saved every {PERIOD}) | "
        "final weights and metrics |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    words = {True: "identical", False: "**different**", None: "- (other data)"}
    for row in rows:
        lost = max(row.lost, default=0)
        cells = (row.fault, row.injected, row.survived, lost, words[row.identical])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--kills", type=int, default=20, help="by SIGKILL, of one run")
    parser.add_argument("--output", type=Path, help="file for the table, as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ghm-soak-"))
    soak = Soak(folder, options.seed, options.kills)
    rows = soak.rows()
    soak.say("done")
    print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if not all(row.met for row in rows):
        sys.exit(f"not all is as it should be; the runs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
