"""How fast the losses are, and what memory they take, beside others' implementations.

A run is a forward and a backward pass, from given logits (or deltas) and labels to the gradient.

- *Time*: the median over rounds. Each round runs every peer once, in a new, seeded order, so that
  a change of the machine's speed meets all alike and none always follows the same other one. What
  is over too soon to be timed well runs several times in a row, and its time is divided.
- *Bandwidth*: three passes over the samples (the logits are read twice, the gradient is written
  once), whatever a peer really moves. It is compared with copying a tensor of that size into one
  that is there already, which counts as two passes, in the same rounds.
- *Memory*: the most bytes that torch's allocator has handed out at one time during a run, above
  what it had at the start: gradient included, inputs not, in units of the gradient's own size.
  Exact for what torch allocates; what a library allocates on its own is not seen.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from ghm_d2.bench import peers as peers_module
from ghm_d2.bench.aims import CLASSES, HEADLINE, POSITIVES, ratios
from ghm_d2.bench.measure import environment, free_bytes, interleave, peak_bytes, timed
from ghm_d2.bench.peers import Inputs, Peer, PeerMissingError
from ghm_d2.progress import Progress

GROWTH = (100_000, 1_000_000, HEADLINE, 10_000_000, 100_000_000)
DTYPES = ("float32", "bfloat16", "float16")
PROBE = 100_000  # samples of the first try of a peer
WARM_UP, FEWEST = 3, 3  # rounds; timed runs of a peer that the time limit cuts short
RUN_SECONDS, MOST_REPEATS = 0.005, 1_000
MARGIN = 0.9  # share of the free memory that may be used
COPY = "copy"


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        samples: sizes of the classification, (anchor, class) pairs.
        positives: boxes of the regression.
        rounds: timed runs of each peer.
        seconds: of a peer at one size, after which it sits out the rounds that are left.
        only: names of peers; all where empty.
    """

    device: str = "cpu"
    dtype: str = "float32"
    samples: tuple[int, ...] = (HEADLINE,)
    classes: int = CLASSES
    positives: int = POSITIVES
    rounds: int = 9
    seconds: float = 30.0
    only: tuple[str, ...] = ()


@dataclass
class Result:
    """What was measured of one peer at one size; None where it was not, for which `note` says why.

    Attributes:
        samples: as asked for. `elements`: of the gradient.
        seconds: of one run, the median of `runs`; `repeats` of them were timed as one.
        ratio: `seconds` over those of the peer `against`, ours of the same kind.
        memory: `memory_bytes` over the gradient's.
    """

    peer: str
    kind: str
    samples: int
    against: str
    elements: int | None = None
    seconds: float | None = None
    runs: list[float] = field(default_factory=list)
    repeats: int | None = None
    ratio: float | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    memory_bytes: int | None = None
    memory: float | None = None
    note: str = ""


def benchmark(setting: Setting, progress: Progress | None = None) -> dict:
    """Time the peers, smallest size first; the result is ready for JSON.

    A peer that is not installed is in "missing" with its remedy; one whose memory would not
    suffice, judged by its factor at the size before, has a note instead of figures.

    Raises:
        UsageError: an unknown peer.
    """
    progress = progress or Progress()
    peers = peers_module.choose_peers(setting.only)
    factors, missing = _probe(peers, setting, progress)
    results, copies = [], []
    sizes = [(("sigmoid", "softmax"), n) for n in sorted(set(setting.samples))]
    for kinds, samples in (*sizes, (("boxes",), 4 * setting.positives)):
        here = [p for p in peers if p.kind in kinds and p.name in factors]
        if here:
            found, copy = _measure(here, samples, setting, factors, progress)
            results += found
            copies += copy
    fixed = {"seed": peers_module.SEED, "foreground": peers_module.FOREGROUND}
    return {
        "what": "losses",
        "setting": asdict(setting) | fixed,
        **environment(torch.device(setting.device)),
        "results": [asdict(result) for result in results],
        "copy": copies,
        "missing": missing,
        "ratios": ratios(results, setting),
    }


def _probe(peers, setting, progress) -> tuple[dict[str, float], dict[str, str]]:
    """(memory factors of the peers that run on a small input, why the others do not)."""
    factors, missing, inputs = {}, {}, {}
    for peer in progress.track(peers, "trying every loss", len(peers)):
        if peer.kind not in inputs:
            inputs[peer.kind] = _inputs(peer.kind, PROBE, setting)
        try:
            _, factors[peer.name] = _memory(_run(peer, inputs[peer.kind]), inputs[peer.kind])
        except PeerMissingError as error:
            missing[peer.name] = str(error)
        except RuntimeError as error:
            if peer.ours:
                raise
            missing[peer.name] = f"fails on {setting.dtype}: {str(error).partition(chr(10))[0]}"
    return factors, missing


def _measure(peers, samples, setting, factors, progress) -> tuple[list[Result], list[dict]]:
    """The peers' results at one size, and the copy's; `factors` are brought up to date."""
    results = {p.name: Result(p.name, p.kind, samples, p.against) for p in peers}
    title = f"{samples:,} samples"
    # logits of both kinds, dense targets and the copy
    wanted = 4 * samples * getattr(torch, setting.dtype).itemsize
    if note := _too_large(wanted, setting):
        for result in results.values():
            result.note = f"the inputs alone need {note}"
        return list(results.values()), []
    inputs = {kind: _inputs(kind, samples, setting) for kind in {p.kind for p in peers}}
    runs = {}
    for peer in progress.track(peers, f"memory, {title}", len(peers)):
        given = inputs[peer.kind]
        run = _measure_memory(peer, given, results[peer.name], factors[peer.name], setting)
        if run:
            runs[peer.name] = run
            factors[peer.name] = results[peer.name].memory
    x = inputs[peers[0].kind].x
    runs[COPY] = partial(torch.empty_like(x).copy_, x.detach())
    times, repeats = _time(runs, setting, title, progress)
    copy = {"samples": samples, "elements": x.numel(), "seconds": statistics.median(times[COPY])}
    copy["gb_per_s"] = 2 * x.nbytes / copy["seconds"] / 1e9
    for name, result in results.items():
        result.runs, result.repeats = times.get(name, []), repeats.get(name)
    _derive(results, x.element_size(), copy["gb_per_s"])
    return list(results.values()), [copy]


def _measure_memory(peer, inputs, result, factor, setting) -> Callable[[], object] | None:
    """Enter the memory into `result`, and give the run to be timed; or a note and no run."""
    result.elements = inputs.x.numel()
    if note := _too_large(factor * inputs.x.nbytes, setting):
        result.note = f"needs {note}"
        return None
    run = _run(peer, inputs)
    try:
        result.memory_bytes, result.memory = _memory(run, inputs)
    except torch.OutOfMemoryError:
        result.note = "out of memory"
        return None
    return run


def _time(runs, setting, title, progress) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of a run, as often as it was timed; and how many runs were timed as one."""
    device = torch.device(setting.device)
    once = {name: partial(timed, run, device) for name, run in runs.items()}
    rounds = progress.track(range(WARM_UP), f"warm-up, {title}", WARM_UP)
    warm = interleave(once, rounds, setting.seconds / WARM_UP)
    repeats = {n: min(MOST_REPEATS, math.ceil(RUN_SECONDS / t[-1])) for n, t in warm.items()}
    often = {name: partial(timed, run, device, repeats[name]) for name, run in runs.items()}
    rounds = progress.track(range(setting.rounds), f"timing, {title}", setting.rounds)
    times = interleave(often, rounds, setting.seconds, FEWEST)
    return {name: [t / repeats[name] for t in taken] for name, taken in times.items()}, repeats


def _derive(results: dict[str, Result], itemsize: int, copy_gb_per_s: float) -> None:
    """Enter what follows from the runs."""
    for result in results.values():
        if result.runs:
            result.seconds = statistics.median(result.runs)
            result.gb_per_s = 3 * result.elements * itemsize / result.seconds / 1e9
            result.share_of_copy = result.gb_per_s / copy_gb_per_s
    for result in results.values():
        ours = results.get(result.against)
        if result.seconds and ours and ours.seconds:
            result.ratio = result.seconds / ours.seconds


def _inputs(kind: str, samples: int, setting: Setting) -> Inputs:
    dtype, device = getattr(torch, setting.dtype), torch.device(setting.device)
    return peers_module.make_inputs(kind, samples, setting.classes, dtype, device)


def _run(peer: Peer, inputs: Inputs) -> Callable[[], object]:
    loss = peers_module.build(peer, inputs)
    # not backward(): accumulating into a leaf's gradient may copy it
    return lambda: torch.autograd.grad(loss(), inputs.x)


def _memory(run, inputs: Inputs) -> tuple[int, float]:
    found = peak_bytes(run, inputs.x.device)
    return found, found / inputs.x.nbytes


def _too_large(wanted: float, setting: Setting) -> str:
    """How much too much so many bytes are, or nothing where they can be had."""
    free = free_bytes(torch.device(setting.device))
    if wanted <= MARGIN * free:
        return ""
    return f"about {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
