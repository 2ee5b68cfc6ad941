"""The C library: built, loaded, in threads and in processes, and what happens without it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from backends import LOSSES, batch, needs_library, run
from measure import peak_bytes

from ghm_d2 import kernels
from ghm_d2.kernels import cpu


def test_the_library_is_built_where_a_compiler_is():
    if shutil.which("cc") and sys.platform == "linux":
        assert cpu.available()


@needs_library
@pytest.mark.parametrize("samples", LOSSES)
def test_threads_share_the_rows(samples):
    """Enough of them that more than one thread works; the counts are the same to the last."""
    level = batch(samples, 40_001, 8, torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(samples, "c", [level]))
    finally:
        torch.set_num_threads(before)
    (one, one_gradient, one_ema), (three, three_gradient, three_ema) = results
    torch.testing.assert_close(one, three, rtol=1e-12, atol=0)
    assert torch.equal(one_gradient[0], three_gradient[0])
    assert torch.equal(one_ema, three_ema)


@needs_library
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or sys.platform == "win32", reason="no compiler")
def test_threads_without_openmp_give_the_same(tmp_path, monkeypatch):
    """The library is built like on macOS, whose compiler has no OpenMP."""
    folder, load = Path(cpu.__file__).parent, cpu._library.__wrapped__
    built = tmp_path / ("_cpu" + cpu.EXTENSION_SUFFIXES[0])
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread"]
    command = ["cc", "-shared", "-fPIC", *flags, str(folder / "cpu.c"), "-o", str(built), "-lm"]
    subprocess.run(command, check=True, timeout=300)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
        other = load()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for samples in LOSSES:
        level = batch(samples, 40_001, 8)
        expected = run(samples, "c", [level])
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_library", lambda: other)
            losses, gradients, ema = run(samples, "c", [level])
        assert torch.equal(losses[0], expected[0][0]) and torch.equal(ema, expected[2])
        assert torch.equal(gradients[0], expected[1][0])


@needs_library
@pytest.mark.parametrize("samples", ["sigmoid", "softmax"])
def test_no_memory_beyond_the_gradient_is_taken(samples):
    logits, labels = batch(samples, 5_000, 80)
    module, leaf = LOSSES[samples](kernel="c"), logits.requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(module(leaf, labels), leaf), leaf.device)
    assert peak <= 1.05 * leaf.nbytes
    assert peak_bytes(lambda: module(leaf.detach(), labels), leaf.device) <= 0.05 * leaf.nbytes


@pytest.mark.parametrize("samples", LOSSES)
def test_without_the_library_plain_pytorch_does_it(samples, library):
    level = batch(samples, 100, 4)
    expected = run(samples, "torch", [level])
    library(None)
    mine = run(samples, "auto", [level])
    assert torch.equal(mine[0][0], expected[0][0]) and torch.equal(mine[1][0], expected[1][0])
    with pytest.raises(RuntimeError, match="ghm doctor"):
        run(samples, "c", [level])


@needs_library
def test_a_library_of_another_source_is_not_used(tmp_path, monkeypatch):
    """Nor is one that does not load."""
    name = "_cpu" + cpu.EXTENSION_SUFFIXES[0]
    folder, load = Path(cpu.__file__).parent, cpu._library.__wrapped__
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    shutil.copy(folder / name, tmp_path)
    for source in folder.glob("cpu*.[ch]"):
        shutil.copy(source, tmp_path)
    assert load() is not None
    with (tmp_path / "cpu_threads.h").open("a") as source:
        source.write("/* */")
    with pytest.warns(UserWarning, match=r"built from other source files"):
        assert load() is None
    # another file, since the first is loaded
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "other" / "cpu.py"))
    (tmp_path / "other" / name).write_text("no library")
    with pytest.warns(UserWarning, match="reinstall ghm_d2"):
        assert load() is None


@needs_library
def test_threads_of_the_caller_do_not_disturb_each_other():
    level = batch("sigmoid", 30_000, 8)
    expected = run("sigmoid", "c", [level], steps=1)
    results = []
    callers = [
        threading.Thread(target=lambda: results.append(run("sigmoid", "c", [level], steps=1)))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(r[1][0], expected[1][0]) for r in results) and len(results) == 4


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_can_use_it_too():
    """Data loaders fork their workers. The test forks in a process of its own, not in pytest's."""
    script = """
import os, torch
torch.set_num_threads(2)
from ghm_d2.losses import GHMC
x, y = torch.randn(40_000, 8), torch.zeros(40_000, dtype=torch.int64)
GHMC(kernel="c")(x, y)
child = os.fork()
if child == 0:
    GHMC(kernel="c")(x, y)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_kernel_is_named(library):
    assert kernels.name_for(torch.device("meta")) == "torch"
    library(None)
    assert kernels.name_for(torch.device("cpu")) == "torch"
