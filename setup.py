"""The one thing that setup.cfg cannot say: the loss kernels for the CPU are a C library."""

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "ghm_d2/kernels/cpu.c"
# by which kernels/cpu.py knows a library of another source
HASH = hashlib.sha256(Path(SOURCE).read_bytes()).hexdigest()

# Apple's compiler has no OpenMP, but its directives for vectors: one thread
OPENMP = "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"

setup(
    ext_modules=[
        Extension(
            "ghm_d2.kernels._cpu",  # called through ctypes: no module, and no Python headers
            sources=[SOURCE],
            optional=True,  # where no compiler is, plain PyTorch does its work, slower
            define_macros=[("SOURCE", f'"{HASH}"')],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", OPENMP],
            extra_link_args=[OPENMP],
            libraries=["m"],
        )
    ]
)
