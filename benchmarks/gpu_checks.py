"""Checks for a GPU; each one runs, even if others before it failed.

    python benchmarks/gpu_checks.py --output checks.json

They check that the kernels agree with plain PyTorch, nothing waits for the device, CUDA graphs
replay, and steps in half precision are finite. On a CPU, checks that need CUDA count as skipped.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path

import time_steps
import torch
from detectron2.utils.events import EventStorage
from measure import environment, write_result
from torch import Tensor

from ghm_d2 import losses
from ghm_d2.register import register_all

BINS, MU = 10, 0.02
LOSSES = ("GHMC", "SoftmaxGHMC", "GHMR", "bce_loss", "focal_loss")
BY_CLASS = "GHMC.robust by class"
ROBUST = ("GHMC.robust", BY_CLASS, "SoftmaxGHMC.robust", "GHMR.robust")
SHAPES = ((37, 7), (3_000, 80))
# loss and gradient: the kernels compute in float32 and round the gradient
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
MODEL = ("MODEL.TIMM.NAME", "mobilenetv3_small_050", "MODEL.RETINANET.NUM_CLASSES", "10")


class SkipError(Exception):
    """A check that cannot be made here."""


def make_tensors(loss: str, rows: int, columns: int, dtype: torch.dtype, device) -> list[Tensor]:
    """Inputs whose gradient norms are too far from a region's edge for rounding to matter."""
    random = torch.Generator().manual_seed(rows)
    region = torch.randint(BINS, (rows, columns), generator=random)
    g = (
        region + 0.2 + 0.6 * torch.rand(rows, columns, generator=random, dtype=torch.float64)
    ) / BINS
    if loss.startswith("GHMR"):
        target = torch.randn(rows, columns, generator=random, dtype=torch.float64) / 1000
        tensors = [target + MU * g / (1 - g * g).sqrt(), target]
        return [t.to(device, dtype) for t in tensors]
    labels = torch.randint(-1, columns + 1, (rows,), generator=random)  # -1: ignored
    if loss.startswith("SoftmaxGHMC"):
        labels = labels.clamp(max=columns - 1)
    own = labels[:, None] == torch.arange(columns)
    return [torch.where(own, -g.logit(), g.logit()).to(device, dtype), labels.to(device)]


def make_loss(
    loss: str, kernel: str, tensors: list[Tensor], levels: bool = False
) -> Callable[[], list[Tensor]]:
    """Return a function that computes the loss and its gradient, for a `grad_output` of 2.

    levels: split the rows of a GHM loss into feature levels, one of which is empty.
    """
    made = attrgetter(loss.removesuffix(" by class"))(losses)
    if loss == BY_CLASS:
        made = partial(made, num_classes=tensors[0].shape[1])
    if loss.endswith("_loss"):
        function = partial(made, kernel=kernel)
    else:
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        function = made(bins=BINS, momentum=0.0, kernel=kernel).to(tensors[0].device, wide)
    x, *rest = tensors
    x = x.detach().requires_grad_()

    def of_levels(*tensors):
        counted = function.begin(*(_split(t) for t in tensors))
        losses.sum_up(counted)
        return counted.total()

    def run():
        value = (of_levels if levels else function)(x, *rest)
        return [value.detach(), *torch.autograd.grad(2 * value, x)]

    return run


def _split(tensor: Tensor) -> list[Tensor]:
    first = len(tensor) // 3
    return list(tensor.split([first, 0, len(tensor) - first - 1, 1]))


def parity(loss: str, dtype: str, args) -> None:
    """Check that the device's kernel agrees with plain PyTorch."""
    for shape in SHAPES:
        tensors = make_tensors(loss, *shape, getattr(torch, dtype), args.device)
        rtol = max(TOLERANCES[dtype], 1e-5 if loss == "focal_loss" else 0)
        for levels in (False,) if loss.endswith("_loss") else (False, True):
            made = (make_loss(loss, kernel, tensors, levels) for kernel in ("auto", "torch"))
            actual, expected = (run() for run in made)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e.to(a), rtol=rtol, atol=rtol / 100)


def loss_never_waits(loss: str, args) -> None:
    run = make_loss(loss, "auto", make_tensors(loss, *SHAPES[1], torch.float32, args.device))
    run()  # compiles
    with waiting_is_an_error(args):
        run()


def retinanet_never_waits(side: str, args) -> None:
    """Check that nothing waits for the GPU, from anchors and predictions to their gradient."""
    trainer, given = _trainer(side, None, args), []
    model = trainer.detector
    own_labels, own_losses = model.label_anchors, model.losses
    model.label_anchors = lambda *words: given.append(words) or own_labels(*words)
    model.losses = lambda *words: given.append(words) or own_losses(*words)
    time_steps.step(trainer)  # compiles
    (anchors, instances), (_, logits, labels, deltas, boxes) = given
    logits, deltas = ([x.detach().requires_grad_() for x in part] for part in (logits, deltas))
    with waiting_is_an_error(args), EventStorage(1):
        own_labels(anchors, instances)
        found = own_losses(anchors, logits, labels, deltas, boxes)
        sum(found.values()).backward()


def cuda_graph(loss: str, args) -> None:
    """Check that forward and backward, captured once, replay on other inputs."""
    _need_cuda(args)
    tensors = make_tensors(loss, *SHAPES[1], torch.float32, args.device)
    run = make_loss(loss, "auto", tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tensors[0].mul_(1.1)
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=0, atol=0)


def amp_step(side: str, dtype: str, args) -> None:
    """Check that losses (the trainer raises otherwise) and weights stay finite."""
    if dtype == "float16":
        _need_cuda(args)  # loss scaling is for GPUs
    trainer = _trainer(side, dtype, args)
    for _ in range(3):
        time_steps.step(trainer)
    assert all(p.isfinite().all() for p in trainer.detector.parameters()), "weights are not finite"


def _trainer(side: str, amp: str | None, args):
    register_all()
    words = ["--device", args.device, *(["--amp", amp] if amp else [])]
    return time_steps.make_trainer(time_steps.parse_args([*words, *MODEL]), 2, side)


@contextmanager
def waiting_is_an_error(args) -> Iterator[None]:
    _need_cuda(args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _need_cuda(args) -> None:
    if args.device == "cpu":
        raise SkipError("needs a CUDA GPU")


def checks() -> Iterator[tuple[str, Callable]]:
    """The name of every check, and its function, which takes `args`."""
    for loss in (*LOSSES, *ROBUST):
        for dtype in TOLERANCES:
            yield f"parity of {loss}, {dtype}", partial(parity, loss, dtype)
        yield f"{loss} never waits", partial(loss_never_waits, loss)
        if loss != "GHMR.robust":  # its mu changes between capture and replay
            yield f"{loss} in a CUDA graph", partial(cuda_graph, loss)
    for side in time_steps.SIDES:
        if "Detectron2" not in side:
            yield f"RetinaNet {side} never waits", partial(retinanet_never_waits, side)
            for dtype in ("bfloat16", "float16"):
                yield f"training step {side}, {dtype}", partial(amp_step, side, dtype)


def check(function: Callable, args) -> dict:
    start = time.perf_counter()
    try:
        function(args)
        outcome = {"status": "passed"}
    except SkipError as reason:
        outcome = {"status": "skipped", "why": str(reason)}
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}", "where": text}
    return outcome | {"seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: stdout")
    args = parser.parse_args()
    results = []
    for name, function in checks():
        results.append({"name": name, **check(function, args)})
        if results[-1]["status"] == "failed":
            print(f"{name}: {results[-1]['error']}", file=sys.stderr)
    counts = {s: sum(r["status"] == s for r in results) for s in ("passed", "failed", "skipped")}
    where = environment(torch.device(args.device))
    write_result({"what": "checks", **counts, **where, "results": results}, args.output)
    print(counts, file=sys.stderr)
    sys.exit(bool(counts["failed"]))


if __name__ == "__main__":
    main()
