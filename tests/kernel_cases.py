"""What the tests of kernels share: sizes, special values, comparison, and the bytes moved."""

import math
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from oracles import assert_same_bits

from nnx.backends import XpBackend, get_backend
from nnx.backends.arena import Arena
from nnx.backends.base import Array

REFERENCE = XpBackend(np)
# one element, around a warp, a mask byte and a block
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


def send(a: Any, offset: int = 0) -> Array:
    """`a` on the device, C-contiguous, `offset` elements behind an address fit for vectors."""
    cuda = get_backend("cupy")
    there = cuda.xp.empty(a.size + offset, a.dtype)[offset:].reshape(a.shape)
    there[...] = cuda.asarray(a)
    return there


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


def extreme_rows(width: int, label: int, dtype: Any) -> dict[str, np.ndarray]:
    """Logits `(1, width)` of softmax, each set with another one at the label."""
    inf, nan = math.inf, math.nan
    rows: dict[str, tuple[Any, float]] = {  # what all logits are, and that of the label
        "sure": (-1e4, 1e4),
        "surely wrong": (1e4, -1e4),
        "all but one impossible": (-inf, 0.0),
        "impossible": (0.0, -inf),
        "nothing possible": (-inf, -inf),
        "infinite": (0.0, inf),
        "infinite elsewhere": (inf, 0.0),
        "not a number": (nan, 0.0),
        "not a number at the label": (0.0, nan),
        "rising": (np.linspace(-20, 20, width), 3.0),
        "falling": (np.linspace(20, -20, width), 3.0),
        "equal": (-0.0, 0.0),
    }
    found = {}
    for name, (others, at_label) in rows.items():
        found[name] = np.full((1, width), others).astype(dtype)
        found[name][0, label] = at_label
    return found


def limit_grid(monkeypatch: pytest.MonkeyPatch, blocks: int) -> dict[str, int]:
    """Launch every kernel on at most so many blocks.

    Returns:
        How many each asked for at the most, by name; filled as they are launched.
    """
    cuda: Any = get_backend("cupy")
    prepare = type(cuda)._prepare
    asked: dict[str, int] = {}

    def limited(name: str, dtype: Any) -> tuple[Callable[..., None], Any]:
        kernel, parameters = prepare(cuda, name, dtype)

        def launch(grid: tuple[int], *rest: Any, **options: Any) -> None:
            asked[name] = max(grid[0], asked.get(name, 0))
            kernel((min(grid[0], blocks),), *rest, **options)

        return launch, parameters

    monkeypatch.setattr(cuda, "_kernels", {})
    monkeypatch.setattr(cuda, "_prepare", limited)
    return asked


def same_bits_on_every_grid(call: Callable[[], Sequence[Array | None]]) -> None:
    """Three grids, the last of a single block, which takes as many passes as there are blocks else.

    Each kernel that `call` launches must ask for more than one block.
    """
    cuda: Any = get_backend("cupy")
    found = []
    for blocks in (2**31 - 1, 3, 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            asked = limit_grid(monkeypatch, blocks)
            found.append([cuda.to_numpy(a) for a in call() if a is not None])
            assert min(asked.values()) > 1, asked
        assert not any(t.any() for tickets in cuda._tickets.values() for t in tickets)
        for a, first in zip(found[-1], found[0], strict=True):
            assert_same_bits(a, first)


def peak_of_a_step(step: Callable[[], Any]) -> int:
    """Bytes that a step on the host allocates besides what its arena, grown before, holds."""
    arena = Arena(np)
    tracemalloc.start()
    try:
        for _ in range(3):
            start, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            with arena.step("step"):
                step()
        return tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()


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
