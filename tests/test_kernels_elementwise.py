"""Kernels that go through elements and rows: ReLU, bias, dropout, gathering."""

from typing import Any

import numpy as np
import pytest
from kernel_cases import REFERENCE, SHAPES, SIZES, close, special, unpack

from nnx.backends import get_backend
from nnx.backends.base import Groups
from nnx.backends.philox import words

gpu = pytest.mark.gpu


# ---- ReLU --------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("n", SIZES)
def test_relu(n: int, dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    x, dy = special(rng, n, dtype), special(rng, n, dtype)
    y, mask = cuda.relu(cuda.asarray(x))
    close(y, REFERENCE.relu(x)[0], dtype, exact=True)
    np.testing.assert_array_equal(unpack(cuda.to_numpy(mask), n), x > 0)
    dx = cuda.relu_backward(cuda.asarray(dy), mask)
    close(dx, np.where(x > 0, dy, 0), dtype, exact=True)


@gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_relu(shape: tuple[int, int], dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    z, bias = special(rng, shape, dtype), rng.standard_normal(shape[1]).astype(dtype)
    y, mask = cuda.bias_relu(cuda.asarray(z), cuda.asarray(bias))
    expected = z + bias
    close(y, np.maximum(expected, 0), dtype, exact=True)
    np.testing.assert_array_equal(unpack(cuda.to_numpy(mask), z.size), expected.ravel() > 0)


@gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_relu_backward(
    shape: tuple[int, int], accumulate: bool, dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    x, dy = special(rng, shape, dtype), rng.standard_normal(shape).astype(dtype)
    before = rng.standard_normal(shape[1]).astype(dtype)
    _, mask = cuda.relu(cuda.asarray(x))
    dbias = cuda.asarray(before)
    dz = cuda.bias_relu_backward(cuda.asarray(dy), mask, dbias, accumulate=accumulate)
    selected = np.where(x > 0, dy, 0)
    close(dz, selected, dtype, exact=True)
    total = selected.astype(np.float64).sum(axis=0) + before * accumulate
    close(dbias, total, dtype) if dtype == np.float64 else np.testing.assert_allclose(
        cuda.to_numpy(dbias), total, rtol=1e-6, atol=1e-5
    )
    plain = cuda.asarray(before)
    cuda.bias_grad(dz, plain, accumulate=accumulate)
    close(plain, cuda.to_numpy(dbias), dtype, exact=True)


@gpu
def test_strided_inputs_are_read_by_value(dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    x = rng.standard_normal((12, 9)).astype(dtype)
    for view in (np.s_[::2], np.s_[:, ::3], np.s_[:, 1]):
        y, _ = cuda.relu(cuda.asarray(x)[view])
        close(y, np.maximum(x[view], 0), dtype, exact=True)
    y, _ = cuda.relu(cuda.asarray(x).T)
    close(y, np.maximum(x.T, 0), dtype, exact=True)


@gpu
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [0.0, 2**-24, 0.3, 0.5, 1.0])
def test_dropout_takes_the_words_that_numpy_draws(
    n: int, p: float, dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    x = rng.standard_normal(n).astype(dtype)
    state = cuda.step_state()
    state.number = 5_000_000_000  # needs more than 32 bits
    state.plan(np.zeros(1), dtype=dtype)
    seed, stream, use = 2**64 - 3, 2**40 + 1, 3
    y, mask = cuda.dropout(cuda.asarray(x), p, seed=seed, stream=stream, use=use, state=state)
    random = words(seed, stream, n, use=use, step=state.number)
    kept = (random >> 8) * 2.0**-24 >= p
    np.testing.assert_array_equal(unpack(cuda.to_numpy(mask), n), kept)
    scale = dtype.type(1 / (1 - p)) if p < 1 else dtype.type(1)
    close(y, np.where(kept, x * scale, 0).astype(dtype), dtype, exact=True)
    dy = special(rng, n, dtype)
    dx = cuda.dropout_backward(cuda.asarray(dy), mask, p)
    close(dx, np.where(kept, dy * scale, 0).astype(dtype), dtype, exact=True)


@gpu
@pytest.mark.parametrize("kinds", [("f4",), ("f4", "i8"), ("f8", "i8", "f4"), ("u1", "i8")])
def test_gather_rows(kinds: tuple[str, ...], rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    n, batch_size = 23, 5
    shapes: list[tuple[int, ...]] = [(n, 3, 7), (n,), (n, 2)]
    sources = [
        rng.integers(0, 99, shape).astype(kind) for shape, kind in zip(shapes, kinds, strict=False)
    ]
    order = rng.permutation(n)
    state = cuda.step_state()
    state.plan(np.zeros(5), dtype=np.dtype(np.float32), order=order)
    value = cuda.xp.zeros((1, 64), np.float32)
    groups = Groups([(0, 64, 1.0, 1.0)], cuda)
    there = [cuda.asarray(a) for a in sources]
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        batch = cuda.gather_rows(there, state, batch_size, size)
        for a, source in zip(batch, sources, strict=True):
            close(a, source[order[start : start + size]], source.dtype, exact=True)
        cuda.sgd(  # goes on to the next position
            value, value, None, groups, state, None, momentum=0, nesterov=False, weight_decay=0
        )
