"""The one thing that setup.cfg cannot say: the loss kernels for the CPU are a C library."""

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# cpu.c includes the others
SOURCES = sorted(map(str, Path("ghm_d2/kernels").glob("cpu*.[ch]")))
# by which kernels/cpu.py knows a library of another source
HASH = hashlib.sha256(b"".join(Path(source).read_bytes() for source in SOURCES)).hexdigest()

FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = ["-fopenmp"]
# only its directives for vectors; the library then starts threads itself
NO_OPENMP = ["-fopenmp-simd", "-pthread"]


class BuildKernels(build_ext):
    """Builds without OpenMP where the compiler has none."""

    def build_extension(self, extension):
        # on macOS never with it: two copies of its library, torch's and another, crash the process
        if sys.platform != "darwin":
            try:
                return self._build(extension, OPENMP)
            except (CompileError, LinkError) as error:
                print(f"{extension.name} could not be built with OpenMP, trying without: {error}")
        return self._build(extension, NO_OPENMP)

    def _build(self, extension, flags):
        extension.extra_compile_args, extension.extra_link_args = [*FLAGS, *flags], flags
        super().build_extension(extension)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "ghm_d2.kernels._cpu",  # called through ctypes: no module, and no Python headers
            sources=["ghm_d2/kernels/cpu.c"],
            depends=SOURCES,
            optional=True,  # where no compiler is, plain PyTorch does its work, slower
            define_macros=[("SOURCE", f'"{HASH}"')],
            libraries=["m"],
        )
    ],
)
