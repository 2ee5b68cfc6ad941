"""The one thing that setup.cfg cannot say: the loss kernels for the CPU are a C library."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "ghm_d2/kernels/cpu.c"
# by which kernels/cpu.py knows a library of another source
HASH = hashlib.sha256(Path(SOURCE).read_bytes()).hexdigest()

setup(
    ext_modules=[
        Extension(
            "ghm_d2.kernels._cpu",  # called through ctypes: no module, and no Python headers
            sources=[SOURCE],
            optional=True,  # where no compiler is, plain PyTorch does its work, slower
            define_macros=[("SOURCE", f'"{HASH}"')],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"],
            libraries=["m"],
        )
    ]
)
