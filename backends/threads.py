"""How many threads BLAS and the C kernels use.

A second core takes some microseconds to wake up, and on a busy machine milliseconds, so work that
is done sooner stays on one thread. `Threads.of(work)` sets the number for a `with` block: that of
the C kernels, and that of the OpenBLAS which NumPy's wheel brings along; it is put back at the end
of the outermost block. Any other BLAS is left alone. Nothing is raised above what was set before,
by `OPENBLAS_NUM_THREADS` or otherwise, or above `NNX_NUM_THREADS`.

With the C kernels OpenBLAS always has one thread in a block, and a large product is cut into parts
that their threads take one by one (`cpu/gemm.c`). OpenBLAS's own threads wait for each other within
a product, and actively on the cores where a kernel's threads want to run.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

SMALL = 1 << 21
"""Multiply-adds of a forward pass, up to which one thread does all of it."""
TINY = 1 << 13
"""Multiply-adds up to which one thread does all of it unasked: OpenBLAS cuts nothing so small."""


class Threads:
    """The threads of NumPy's BLAS and of the C kernels; the numbers are those of the process.

    Attributes:
        limit: The most threads that the C kernels use.
        blas: Whether NumPy's BLAS is one whose threads are set here.
    """

    def __init__(self, kernels: Any = None) -> None:
        asked = _asked()
        self.limit = asked or _cores()
        self._most = asked or 1 << 30  # for BLAS, which has its own idea of the cores
        self._kernels = kernels
        found = _openblas()
        self.blas = found is not None
        self._get, self._set, products = found or ((lambda: 1), (lambda n: None), None)
        self._cuts = False  # products into parts
        if kernels is not None and products is not None:
            self._cuts = bool(kernels.set_blas(*products))
        self._lock = threading.Lock()
        self._active: list[int] = []
        self._before = self._now = 0
        self._kernels_now = self.limit, False
        self._few, self._many = _Block(self, 1), _Block(self, 1 << 30)
        if kernels is not None:
            kernels.set_num_threads(self.limit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._forked)

    def of(self, work: int) -> _Block:
        """A block for work of so many multiply-adds."""
        return self._few if work <= SMALL else self._many

    def _enter(self, n: int) -> None:
        with self._lock:
            if not self._active:
                self._before = self._now = self._get()
            self._active.append(n)
            self._apply()

    def _exit(self, n: int) -> None:
        with self._lock:
            self._active.remove(n)  # not the last one, if blocks of several threads overlap
            self._apply()

    def _apply(self) -> None:
        """Set what the block begun last asks for."""
        blas, kernels, cuts = self._before, self.limit, False
        if self._active:
            n, cuts = self._active[-1], self._cuts
            kernels = min(n, self.limit)
            blas = min(n, self._before, self._most)
            if cuts:
                blas, kernels = 1, min(kernels, self._before)
        if blas != self._now:
            self._set(blas)
            self._now = blas
        if (kernels, cuts) != self._kernels_now and self._kernels is not None:
            self._kernels.set_num_threads(kernels)
            self._kernels.set_alone(cuts)
            self._kernels_now = kernels, cuts

    def _forked(self) -> None:
        """In a forked child OpenMP's threads are gone, and waiting for them would never end."""
        self.limit, self._kernels_now = 1, (1, self._kernels_now[1])
        self._lock = threading.Lock()  # its owner may be gone, too
        self._kernels.set_num_threads(1)


class _Block:
    """A `with` block; one object serves any number of them."""

    def __init__(self, threads: Threads, n: int) -> None:
        self._threads, self._n = threads, n

    def __enter__(self) -> None:
        self._threads._enter(self._n)

    def __exit__(self, *error: object) -> None:
        self._threads._exit(self._n)


def _asked() -> int | None:
    """`NNX_NUM_THREADS`, or None."""
    text = os.environ.get("NNX_NUM_THREADS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"NNX_NUM_THREADS: expected an integer of at least 1, got {text!r}")
    return int(text)


def _cores() -> int:
    """The cores that this process may use, or `OMP_NUM_THREADS`."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text.isdecimal() and int(text):
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_Calls: TypeAlias = tuple[Callable[[], int], Callable[[int], object], tuple[int, int] | None]


def _openblas() -> _Calls | None:
    """Of NumPy's own OpenBLAS: its number of threads, what sets it, and where its products are.

    These are the addresses of `cblas_sgemm` and `cblas_dgemm` with 64-bit integers, or None where
    they have 32 bits. All is None for another BLAS.
    """
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.PyDLL(str(path))  # loaded already: NumPy has done it
            except OSError:
                continue
            for suffix in ("64_", ""):
                get, set_, single, double = (
                    getattr(library, f"scipy_{name}{suffix}", None)
                    for name in (
                        *("openblas_get_num_threads", "openblas_set_num_threads"),
                        *("cblas_sgemm", "cblas_dgemm"),
                    )
                )
                if get is None or set_ is None:
                    continue
                if suffix != "64_" or single is None or double is None:
                    return get, set_, None
                at = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (single, double)]
                return get, set_, (at[0], at[1])
    return None
