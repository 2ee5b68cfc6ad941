"""The Triton kernels without their interpreter, and without a GPU."""

import importlib

import pytest
import torch

from ghm_d2.kernels import operators
from ghm_d2.losses import bce_loss

triton = pytest.importorskip("triton", reason="no Triton for this platform")

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "i1",
}


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    assert value % 16 == 0, "Triton would compile the kernel again for other numbers"
    return "i32"


def attributes(args) -> dict:
    """The attributes of a launch: tensors and numbers are multiples of 16."""
    places = []
    for i, value in enumerate(args):
        places += [(i, j) for j in range(len(value))] if isinstance(value, tuple) else [(i,)]
    return {place: [["tt.divisibility", 16]] for place in places}


class Compile:
    """In a kernel's place: compiles what would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        assert sorted([*names[: len(args)], *constants]) == sorted(names)
        signature = dict.fromkeys(names, "constexpr")
        for name, value in zip(names, args, strict=False):
            several = isinstance(value, tuple)
            signature[name] = tuple(map(type_of, value)) if several else type_of(value)
        source = ASTSource(self.kernel, signature, constants, attributes(args))
        options = {"num_warps": num_warps}
        result = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        assert result.asm["cubin"]
        self.ptx = result.asm["ptx"]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """`triton_ghm` as it would be on a GPU, with `Compile` for its kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = importlib.import_module("ghm_d2.kernels.gpu.ghm")
    monkeypatch.setattr(module, "_most_programs", lambda device: 4)
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Compile(kernel))
    return module


@pytest.mark.parametrize(
    ("dtype", "rows", "bins"),
    [
        (torch.float32, 40, 30),
        pytest.param(torch.bfloat16, 40, 30, marks=pytest.mark.slow),
        pytest.param(torch.float64, 40, 30, marks=pytest.mark.slow),
        (torch.half, 1, 1),
    ],
    ids=str,
)
def test_passes_compile(compiled, dtype, rows, bins):
    """The interpreter accepts more than the compiler does."""
    x, labels = torch.zeros(rows, rows, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    run(compiled, "sigmoid", bins, x, labels)
    run(compiled, "sigmoid", bins, x, labels, by_class=True)
    run(compiled, "softmax", bins, x, labels)
    run(compiled, "asl1", bins, x, x, x == 0)
    compiled.size_counts([x, x], [x, x], [x == 0] * 2)


def run(compiled, kind, bins, x, target, *valid, by_class=False, alpha=-1.0, gamma=0.0):
    mu = torch.ones((), dtype=torch.float64) if valid else None
    for number in (1, 3):
        levels = [x] * number, [target] * number, list(valid) * number
        passes(compiled, kind, *levels, mu, bins, by_class, alpha, gamma)


def passes(compiled, *arguments):
    counts, _ = compiled.regions(*arguments)
    weights = torch.ones(counts.shape, dtype=torch.float64)
    compiled.total(*arguments, weights)
    compiled.gradient(*arguments, weights, torch.ones(()))


@pytest.mark.parametrize("classes", [3, 80])
def test_several_numbers_are_read_and_written_at_a_time(compiled, classes):
    """With few classes the number of samples is not a multiple of 4 for every number of rows."""
    x, labels = torch.zeros(32, classes), torch.zeros(32, dtype=torch.int64)
    run(compiled, "sigmoid", 30, x, labels)
    for name in ("count_kernel", "total_kernel", "gradient_kernel"):
        assert "ld.global.v4" in getattr(compiled, name).ptx
    assert "st.global.v4" in compiled.gradient_kernel.ptx


@pytest.mark.parametrize("gamma", [1.5, 2])
def test_focal_loss_compiles(compiled, gamma):
    x, labels = torch.zeros(40, 5), torch.zeros(40, dtype=torch.int64)
    run(compiled, "sigmoid", 1, x, labels, alpha=0.25, gamma=gamma)


def test_large_sizes_compile(compiled):
    labels = torch.zeros(40, dtype=torch.int64)
    run(compiled, "sigmoid", 100, torch.zeros(40, 5), labels)
    run(compiled, "softmax", 100, torch.zeros(40, 3000), labels)


@pytest.mark.parametrize("ema_init", ["zero", "first", "debias"])
@pytest.mark.parametrize("prior", [0.0, 3.0])
def test_density_compiles(compiled, prior, ema_init):
    normalizer = "weights" if prior else "valid_bins"
    counts, ema = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 30)
    state = ema, counts, torch.zeros(2, 2)
    compiled.density(
        counts, counts.sum(1), *state, 0.75, prior, True, normalizer, ema_init, True, 0.5
    )


def test_without_cuda_there_is_no_such_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(operators.backends, "cuda", raising=False)
    with pytest.raises(RuntimeError, match="'triton' is not available for cpu; see `ghm doctor`"):
        bce_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), kernel="triton")
