"""Builds the extension: with OpenMP where the compiler has it, else single-threaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext

_FOLDER = Path(__file__).parent
_PROBE = """
#include <omp.h>
int probe(void) {
    int n = 0;
#pragma omp parallel num_threads(2)
    n = omp_get_num_threads();
    return n;
}
"""


class BuildKernels(build_ext):  # type: ignore[misc]
    """`build_ext` that adds the flags of the compiler at hand.

    The extension is optional (pyproject.toml): where it can't be built nnx runs on NumPy.
    """

    def finalize_options(self) -> None:
        """Compile each `*.c` of this folder; its other files, this one too, belong to the sources.

        Files named here are in the source archive, and a change of any makes all compile anew.
        """
        super().finalize_options()
        files = [f"backends/cpu/{p.name}" for p in sorted(_FOLDER.iterdir()) if p.is_file()]
        for ext in self.extensions:
            ext.sources = [name for name in files if name.endswith(".c")]
            ext.depends = [name for name in files if not name.endswith(".c")]

    def build_extension(self, ext: Any) -> None:
        """Build one extension."""
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += ["/O2", "/fp:precise", "/std:c11", "/Zc:preprocessor"]
            flags = ["/openmp"]
        else:
            # The order of operations is that of the sources: no contraction, no reassociation.
            # What is given up is only errno and the trapping of floating-point exceptions.
            ext.extra_compile_args += ["-std=c11", "-O3", "-Wall", "-Wextra", "-ffp-contract=off"]
            ext.extra_compile_args += ["-fno-math-errno", "-fno-trapping-math"]
            # Python's own flags say -fwrapv, under which x[i + j] isn't vectorized over j, and -g.
            ext.extra_compile_args += ["-fvisibility=hidden", "-fno-wrapv", "-g0"]
            flags = ["-fopenmp"]
        if self._compiles(flags):
            ext.extra_compile_args += flags
            ext.extra_link_args += flags
        super().build_extension(ext)

    def _compiles(self, flags: list[str]) -> bool:
        """Whether a library with OpenMP compiles and links."""
        if os.environ.get("NNX_NO_OPENMP"):
            return False
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(_PROBE, encoding="utf-8")
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=flags)
                library = str(Path(folder, "probe.so"))
                self.compiler.link_shared_object(objects, library, extra_postargs=flags)
            except Exception:  # each compiler has its own
                return False
        return True
