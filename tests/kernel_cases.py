"""What the tests of kernels share: sizes, special values, comparison, and the bytes moved."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nnx.backends import XpBackend, get_backend
from nnx.backends.base import Array

REFERENCE = XpBackend(np)
# one element, around a warp, a mask byte, a block, and more than one pass of a grid of 32 blocks
SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1000]
SHAPES = [(0, 5), (1, 1), (3, 31), (2, 32), (7, 33), (9, 257), (130, 10)]
TOLERANCE: dict[Any, tuple[float, float]] = {
    np.dtype(np.float32): (1.3e-6, 1e-6),
    np.dtype(np.float64): (1e-13, 1e-14),
}


def close(actual: Array, expected: Any, dtype: Any, *, exact: bool = False) -> None:
    """Compare a device array with a host one: dtype, shape, and values (NaN equal to NaN only)."""
    actual = get_backend("cupy").to_numpy(actual)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if exact:
        np.testing.assert_array_equal(actual, expected)
    else:
        rtol, atol = TOLERANCE[dtype]
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def unpack(mask: np.ndarray, n: int) -> np.ndarray:
    """Bits of a packed mask, lowest first."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:n].astype(bool)


def special(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    """Normal values with zeros of both signs, infinities and NaN strewn in."""
    x: np.ndarray = rng.standard_normal(shape).astype(dtype)
    flat = x.reshape(-1)
    for i, value in enumerate([0.0, -0.0, np.inf, -np.inf, np.nan]):
        flat[i::17] = value
    return x


def traffic(call: Callable[[], Any], prefix: str = "") -> dict[str, int]:
    """Bytes that each kernel launched by `call` moves, by name.

    32 for every sector that a warp's request touches: a GPU's memory moves sectors. Only the
    simulated device counts them.

    Args:
        call: Launches kernels; called once before, to compile them.
        prefix: Kernels whose names begin otherwise are left out.
    """
    import cudasim

    cuda = get_backend("cupy")
    call()
    cuda.synchronize()
    cudasim.reset()
    call()
    cuda.synchronize()
    kernels = cudasim.stats()["kernels"]
    return {
        name: 32 * (k["load_sectors"] + k["store_sectors"])
        for name, k in kernels.items()
        if name.startswith(prefix)
    }
