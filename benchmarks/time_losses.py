"""Times the losses, forward and backward, beside other projects' implementations.

    python benchmarks/time_losses.py --output losses.json
    python benchmarks/time_losses.py --samples 1000000 10000000 100000000 --only GHM-C "torch BCE"

A run goes from given logits (or deltas) and labels to the gradient. Memory is the peak that torch
holds during a run above its start, so it includes the gradient but not the inputs.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from measure import environment, figures, measure_in_turn, peak_bytes, write_result
from peers import PEERS, make_inputs

SAMPLES = 8_000_000  # 100,000 anchors of 80 classes
DTYPES = ("float32", "bfloat16", "float16")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    text = "number of (anchor, class) pairs; default: 8000000"
    parser.add_argument("--samples", type=int, nargs="+", default=[SAMPLES], help=text)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=4_000, help="boxes for the regression losses")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="LOSS")
    parser.add_argument("--rounds", type=int, default=9)
    text = "time limit of one loss at one size; the loss skips the rounds after it"
    parser.add_argument("--seconds", type=float, default=10, help=text)
    parser.add_argument("--output", type=Path, help="JSON file to write; default: stdout")
    return parser.parse_args(words)


def benchmark(args: argparse.Namespace) -> dict:
    """The results, smallest size first, ready for JSON; losses that cannot run are in "missing"."""
    results, missing = [], {}
    sizes = [(("sigmoid", "softmax"), n) for n in sorted(set(args.samples))]
    for kinds, samples in (*sizes, (("boxes",), 4 * args.boxes)):
        names = [n for n in args.only if PEERS[n][0] in kinds and n not in missing]
        runs = _runs(names, samples, args, missing)
        results += _measure(runs, samples, args)
    return {
        "what": "losses",
        "device": args.device,
        "dtype": args.dtype,
        "classes": args.classes,
        **environment(torch.device(args.device)),
        "results": results,
        "missing": missing,
    }


def _runs(names, samples: int, args, missing: dict[str, str]) -> dict:
    """Return the timed functions and their inputs; failures of a first run go to `missing`."""
    dtype, device, inputs, runs = getattr(torch, args.dtype), torch.device(args.device), {}, {}
    for name in names:
        kind, build = PEERS[name]
        if kind not in inputs:
            inputs[kind] = make_inputs(kind, samples, args.classes, dtype, device)
        try:
            # not backward(): accumulating into a leaf's gradient may copy it
            run = partial(_loss_and_gradient, build(inputs[kind]), inputs[kind].x)
            run()
            runs[name] = run, inputs[kind].x
        except Exception as error:  # not installed, not of this dtype, out of memory, ...
            lines = str(error).splitlines()
            missing[name] = f"{type(error).__name__} at {samples:,} samples: {lines[0]}"
    return runs


def _loss_and_gradient(loss, x) -> None:
    torch.autograd.grad(loss(), x)


def _measure(runs: dict, samples: int, args) -> list[dict]:
    device = torch.device(args.device)
    memory = {name: peak_bytes(run, device) for name, (run, _) in runs.items()}
    only_runs = {name: run for name, (run, _) in runs.items()}
    times = measure_in_turn(only_runs, args.rounds, args.seconds)
    return [
        {
            "name": name,
            "kind": PEERS[name][0],
            "samples": samples,
            "elements": x.numel(),
            **figures(times[name]),
            "memory_bytes": memory[name],
            "gradient_bytes": x.nbytes,
        }
        for name, (_, x) in runs.items()
    ]


def show(result: dict) -> None:
    """Print a table on stderr: milliseconds, and memory as a multiple of the gradient's."""
    for row in result["results"]:
        ms, iqr = 1000 * row["median"], 1000 * row["iqr"]
        memory = row["memory_bytes"] / row["gradient_bytes"]
        line = f"{row['name']:18} {row['samples']:12,} {ms:10.3f} ms (IQR {iqr:.3f})"
        print(f"{line} {memory:6.2f} x the gradient's memory", file=sys.stderr)
    for name, why in result["missing"].items():
        print(f"{name}: {why}", file=sys.stderr)


if __name__ == "__main__":
    arguments = parse_args()
    found = benchmark(arguments)
    show(found)
    write_result(found, arguments.output)
