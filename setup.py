"""The one thing that setup.cfg cannot say: the loss kernels for the CPU are a C library."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "ghm_d2.kernels._cpu",  # called through ctypes: no module, and no Python headers
            sources=["ghm_d2/kernels/cpu.c"],
            optional=True,  # where no compiler is, plain PyTorch does its work, slower
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"],
            libraries=["m"],
        )
    ]
)
