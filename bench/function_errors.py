"""How far the functions of the C kernels are off, in ulp: every float32, and float64 at random.

    python bench/function_errors.py [--stride 997] [--samples 20000] [exp tanh ...]

A float32 result is compared with NumPy's float64 function (erf: that of XpBackend), a float64 one
with mpmath's (part of no extra; it comes with PyTorch). An ulp is the spacing of the numbers of the
dtype at the true value; correct rounding is off by at most 0.5. Two infinities or NaN agree.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nnx.backends import XpBackend, get_backend, numpy_backend

CPU: Any = numpy_backend.CPU
FUNCTIONS = ("exp", "expm1", "log", "log1p", "tanh", "erf")
CHUNK = 1 << 18


def ulp(found: np.ndarray, true: np.ndarray, spacing: np.ndarray) -> float:
    """The largest error; infinite where only one of the two is infinite, NaN, or a signed zero."""
    same = (found == true.astype(found.dtype)) | (np.isnan(found) & np.isnan(true))
    error = np.where(same & ~np.isfinite(found), 0, np.abs(found - true) / spacing)
    error[np.isnan(error)] = np.inf
    error[(true == 0) & (np.signbit(true) != np.signbit(found))] = np.inf
    return float(error.max())


def float32_errors(name: str, kinds: list[str], stride: int) -> list[float]:
    """The largest over all float32, or every `stride`-th, for each instruction set."""
    body = XpBackend(np)
    function: Callable[..., Any] = body.erf if name == "erf" else getattr(np, name)
    worst = [0.0] * len(kinds)
    for start in range(0, 1 << 32, CHUNK * stride):
        bits = np.arange(start, min(start + CHUNK * stride, 1 << 32), stride, dtype=np.int64)
        x = bits.astype(np.uint32).view(np.float32)
        true = function(x.astype(np.float64))
        # at overflow the spacing is that of the largest number
        spacing = np.spacing(np.minimum(np.abs(true), np.finfo(np.float32).max).astype(np.float32))
        for i, kind in enumerate(kinds):
            CPU.use(kind)
            worst[i] = max(worst[i], ulp(run(name, x), true, spacing.astype(np.float64)))
    return worst


def float64_errors(name: str, kinds: list[str], samples: int) -> list[float]:
    """The largest at arguments of every size, more of them where functions bend."""
    mpmath: Any = importlib.import_module("mpmath")

    mpmath.mp.prec = 120
    rng = np.random.default_rng(0)
    n = samples // 4
    wide = rng.uniform(-750, 750, n)
    bent = rng.standard_normal(n) * 2.0 ** rng.integers(-12, 5, n)
    near_one = 1 + rng.uniform(-1, 1, n) * 2.0 ** -rng.integers(0, 30, n)
    any_bits = rng.integers(0, 2**64, n, np.uint64).view(np.float64)
    x = np.concatenate([wide, bent, near_one, any_bits])
    x = x[(x > {"log": 0, "log1p": -1}.get(name, -np.inf)) & np.isfinite(x)]
    x = x[np.abs(x) < (709.7 if name in ("exp", "expm1") else np.inf)]
    function = getattr(mpmath, name)
    true = [function(mpmath.mpf(v)) for v in x.tolist()]
    spacing = np.spacing(np.abs(np.array([float(v) for v in true])))
    worst = []
    for kind in kinds:
        CPU.use(kind)
        found = run(name, x).tolist()
        errors = [abs(a - b) / s for a, b, s in zip(found, true, spacing.tolist(), strict=True)]
        worst.append(float(max(errors)))
    return worst


def run(name: str, x: np.ndarray) -> np.ndarray:
    """A function by the kernels in use."""
    out = np.empty_like(x)
    get_backend("numpy").elementwise(f"{name}(x)", out, x=x)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("functions", nargs="*", default=FUNCTIONS)
    parser.add_argument("--stride", type=int, default=1, help="take every n-th float32")
    parser.add_argument("--samples", type=int, default=100_000, help="of float64")
    options = parser.parse_args()
    kinds = [name for name in ("baseline", "avx2", "avx512") if CPU.use(name)]
    np.seterr(all="ignore")
    print(f"{'':8}", *[f"{dtype} {kind:9}" for dtype in ("float32", "float64") for kind in kinds])
    for name in options.functions:
        errors = float32_errors(name, kinds, options.stride)
        errors += float64_errors(name, kinds, options.samples)
        print(f"{name:8}", *[f"{error:<17.2f}" for error in errors], flush=True)


if __name__ == "__main__":
    main()
