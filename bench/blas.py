"""Would another BLAS pay? NumPy's OpenBLAS beside MKL and BLIS from PyPI, on one thread, in turns.

    pip install numpy threadpoolctl mkl blis && python bench/blas.py

Prints for each product of a training step the time of NumPy's and the others' as multiples of it:
medians of 25 turns. docs/cpu.md says what came out.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # CBLAS's
SHAPES = [  # m, k, n, and which of the matrices is the transpose of one in memory
    *((100, 784, 50, ""), (784, 100, 50, "a"), (128, 784, 512, ""), (784, 128, 512, "a")),
    *((128, 512, 512, "b"), (1024, 784, 512, ""), (784, 1024, 512, "a"), (1024, 2048, 2048, "")),
]
Product = Callable[[Any, Any, Any, str], object]


def by_mkl() -> Product | None:
    """MKL's `cblas_sgemm`, if it is installed in this environment."""
    found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.MKL_Set_Num_Threads(1)

    def product(a: Any, b: Any, out: Any, transposed: str) -> None:
        (m, n), k = out.shape, a.shape[1]
        of_a, of_b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        at = [ctypes.c_void_p(x.ctypes.data) for x in (of_a, of_b, out)]
        how = [TRANSPOSED if transposed == x else AS_IT_IS for x in "ab"]
        widths = [x.shape[1] for x in (of_a, of_b)]
        library.cblas_sgemm(
            *(ROW_MAJOR, *how, m, n, k, one, at[0], widths[0], at[1], widths[1], zero, at[2], n)
        )

    return product


def by_blis() -> Product | None:
    """BLIS by the package blis, if it is installed."""
    try:
        from blis.py import gemm
    except ImportError:
        return None

    def product(a: Any, b: Any, out: Any, transposed: str) -> None:
        of_a, of_b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
        gemm(of_a, of_b, out=out, trans1=transposed == "a", trans2=transposed == "b", beta=0.0)

    return product


def main() -> None:
    """Measure and print."""
    candidates = {"mkl": by_mkl(), "blis": by_blis()}
    products: dict[str, Product] = {"numpy": lambda a, b, out, _: np.matmul(a, b, out=out)}
    products |= {name: product for name, product in candidates.items() if product is not None}
    rng = np.random.default_rng(0)
    for m, k, n, transposed in SHAPES:
        a = rng.standard_normal((k, m) if transposed == "a" else (m, k), np.float32)
        b = rng.standard_normal((n, k) if transposed == "b" else (k, n), np.float32)
        a, b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
        out = np.empty((m, n), np.float32)
        times: dict[str, list[float]] = {name: [] for name in products}
        for product in products.values():
            product(a, b, out, transposed)
            np.testing.assert_allclose(out, a @ b, rtol=1e-3, atol=1e-2)
        for _ in range(25):
            for name, product in products.items():
                begun = time.perf_counter()
                product(a, b, out, transposed)
                times[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(t) for name, t in times.items()}
        others = [f"{name} x {medians[name] / medians['numpy']:.2f}" for name in medians]
        marked = f"{m} x {k} x {n}" + (f" ({transposed} transposed)" if transposed else "")
        print(f"{marked:32}{medians['numpy'] * 1e6:10.0f} us  {'  '.join(others[1:])}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):
        main()
