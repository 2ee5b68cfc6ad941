"""Counts the machine instructions of the Triton kernels, which needs no GPU.

    python benchmarks/machine_code.py

It prints, for each pass over sigmoids (80 classes, 30 unit regions) and two generations of GPUs:
warp instructions per sample (of the loop over blocks, or of the whole kernel without a loop),
registers per thread, bytes of shared memory, and the number of warps that a multiprocessor with
65,536 registers and at most 64 warps can hold.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ghm_d2.kernels.gpu import samples

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 90)
WARPS = 4  # per program
SAMPLES = 1024  # handled by a program at a time
LEVELS = 5
NUMBERS = {"rows": ("i32",) * LEVELS, "starts": ("i32",) * (LEVELS + 1)}
INPUTS = {"x": ("*fp32",) * LEVELS, "target": ("*i64",) * LEVELS, "valid": ("*i64",) * LEVELS}
INPUTS |= {"mu": "*i64"} | NUMBERS
SIGMOID = {"KIND": "sigmoid", "COLUMNS": 80, "BINS": 30, "BLOCK": SAMPLES, "WIDTH": 1}
SIGMOID |= {"LEVELS": LEVELS, "ALIGNED": False, "PER_ROW": 80}
LOSS = {"BY_CLASS": False, "ALPHA": -1.0, "GAMMA": 0.0}
PASSES = {
    "count_kernel": (INPUTS | {"counts": "*i64"}, SIGMOID | {"SLOTS": 32}),
    "count_by_class_kernel": (
        {"counts": "*i64", "logits": INPUTS["x"], "labels": INPUTS["target"]} | NUMBERS,
        {"COLUMNS": 80, "BINS": 30, "ROWS": 64, "CLASSES": 16, "SLOTS": 32, "LEVELS": LEVELS},
    ),
    "total_kernel": (INPUTS | {"sums": "*fp64", "weights": "*fp64"}, SIGMOID | LOSS),
    "gradient_kernel": (
        INPUTS | {"gradient": INPUTS["x"], "weights": "*fp64", "scale": "*fp32"},
        SIGMOID | LOSS,
    ),
}


def compile_kernel(name: str, capability: int):
    """Compile a kernel for GPUs of a compute capability; the result has its machine code."""
    kernel = getattr(samples, name)
    tensors, constants = PASSES[name]
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | tensors
    source = ASTSource(kernel, signature, constants, attributes(kernel, tensors))
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def attributes(kernel, tensors: dict) -> dict:
    """All tensors start at, and all numbers are, multiples of 16, as in nearly every launch."""
    places = []
    for name, kind in tensors.items():
        place = kernel.arg_names.index(name)
        several = range(len(kind)) if isinstance(kind, tuple) else None
        places += [(place,)] if several is None else [(place, i) for i in several]
    return {place: [["tt.divisibility", 16]] for place in places}


def dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOL, what, file.name], capture_output=True, text=True, check=True
        ).stdout


def longest_loop(sass: str) -> int:
    """Instructions of the longest loop, or of the whole kernel."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)([^;]*);", sass)
    at = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    loops = []
    for i, (_, operation, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if operation.startswith("BRA") and target and at.get(int(target[1], 16), i) < i:
            loops.append(i - at[int(target[1], 16)] + 1)
    return max(loops, default=len(lines))


def main() -> None:
    print(f"{'kernel':24} {'sm':>3} {'a sample':>9} {'registers':>10} {'shared':>7} {'warps':>6}")
    for name in PASSES:
        for capability in CAPABILITIES:
            result = compile_kernel(name, capability)
            cubin = result.asm["cubin"]
            a_sample = longest_loop(dump(cubin, "-sass")) * WARPS / SAMPLES
            registers = int(re.search(r"REG:(\d+)", dump(cubin, "-res-usage"))[1])
            rounded = -(-registers // 8) * 8  # registers are allocated in groups of 8
            warps = min(65536 // (32 * rounded), 64) // WARPS * WARPS
            shared = result.metadata.shared
            print(f"{name:24} {capability:3} {a_sample:9.2f} {registers:10} {shared:7} {warps:6}")


if __name__ == "__main__":
    main()
