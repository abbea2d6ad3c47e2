"""Kernels that go through elements and rows: ReLU, bias, dropout, gathering."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_cases import (
    REFERENCE,
    SIZES,
    close,
    limit_grid,
    same_bits_on_every_grid,
    send,
    special,
    traffic,
    unpack,
)

from nnx.backends import get_backend
from nnx.backends.base import Array, Groups, Update
from nnx.backends.philox import words

gpu = pytest.mark.gpu

# columns of one block and of several, whole packs or not; rows read one by one or several at a time
# (up to 64 columns), with a tail; one chunk of rows or several; a model axis
SHAPES: list[tuple[int, ...]] = [
    *[(0, 5), (1, 1), (3, 31), (2, 32), (7, 33), (9, 257), (130, 10), (700, 3), (4096, 1)],
    *[(100, 132), (40, 256), (3, 2, 5), (2, 70, 33), (3, 40, 64), (2, 1001, 8)],
]
SEVERAL_PASSES = 5003  # of two blocks, with packs and without


def rows_of_models(a: np.ndarray, offset: int = 0) -> Array:
    """`a` `(n,)` or `(K, n)` as a view of a flat vector with one longer row per model."""
    if a.ndim == 1:
        return send(a, offset)
    cuda = get_backend("cupy")
    flat = cuda.xp.full((len(a), 64 + a.shape[1]), np.nan, a.dtype)
    there = flat[:, offset : offset + a.shape[1]]
    there[...] = cuda.asarray(a)
    return there


def unchanged(there: Array, host: np.ndarray) -> None:
    """An input has the bits it had."""
    assert get_backend("cupy").to_numpy(there).tobytes() == host.tobytes()


# ---- ReLU --------------------------------------------------------------------------------------


@gpu
@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize("n", [*SIZES, SEVERAL_PASSES])
def test_relu(n: int, dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    x, dy = special(rng, n, dtype), special(rng, n, dtype)[::-1].copy()
    for offset in (0, 1):
        there = send(x, offset)
        y, mask = cuda.relu(there)
        close(y, REFERENCE.relu(x)[0], dtype, exact=True)
        assert not np.signbit(cuda.to_numpy(y)[x == 0]).any()
        np.testing.assert_array_equal(unpack(cuda.to_numpy(mask), n), x > 0)
        unchanged(there, x)
        there = send(dy, offset)
        dx = cuda.relu_backward(there, mask)
        close(dx, np.where(x > 0, dy, 0), dtype, exact=True)
        unchanged(there, dy)


@gpu
@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_relu(
    shape: tuple[int, ...], offset: int, dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    z, bias = special(rng, shape, dtype), rng.standard_normal(shape[:-2] + shape[-1:]).astype(dtype)
    expected = z + bias[..., None, :]
    for of_z, of_bias in ((offset, 0), (0, offset)):
        there = rows_of_models(bias, of_bias)
        y, mask = cuda.bias_relu(send(z, of_z), there)
        close(y, np.maximum(expected, 0), dtype, exact=True)
        np.testing.assert_array_equal(unpack(cuda.to_numpy(mask), z.size), expected.ravel() > 0)
        unchanged(there, bias)


@gpu
@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_relu_backward(
    shape: tuple[int, ...], accumulate: bool, dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    x, dy = special(rng, shape, dtype), rng.standard_normal(shape).astype(dtype)
    before = rng.standard_normal(shape[:-2] + shape[-1:]).astype(dtype)
    if not accumulate:
        before.fill(np.nan)
    _, mask = cuda.relu(cuda.asarray(x))
    selected = np.where(x > 0, dy, 0)
    total = selected.sum(axis=-2, dtype=np.float64) + (before if accumulate else 0)
    # no sum is longer than 100 terms in a row: their rounding errors add up like sqrt(100)
    error = 10 * np.finfo(dtype).eps * (np.abs(selected).sum(axis=-2, dtype=np.float64) + 1)
    bits = set()
    for offset in (0, 1):
        there, dbias = send(dy, offset), rows_of_models(before, offset)
        dz = cuda.bias_relu_backward(there, mask, dbias, accumulate=accumulate)
        close(dz, selected, dtype, exact=True)
        np.testing.assert_array_less(np.abs(cuda.to_numpy(dbias) - total), error)
        unchanged(there, dy)
        plain = rows_of_models(before)
        cuda.bias_grad(send(selected, offset), plain, accumulate=accumulate)
        bits |= {cuda.to_numpy(a).tobytes() for a in (dbias, plain)}
        if dbias.base is not None and dbias.ndim == 2:
            rest = cuda.to_numpy(dbias.base)
            assert np.isnan(rest[:, :offset]).all()  # the flat vector's other elements
            assert np.isnan(rest[:, offset + shape[-1] :]).all()
    assert len(bits) == 1  # with and without a mask, aligned and not


@gpu
def test_bias_gradients_have_the_same_bits_on_every_grid(
    dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    dy = send(rng.standard_normal((600, 130)).astype(dtype))
    same_bits_on_every_grid(lambda: [cuda.bias_grad(dy, cuda.empty((130,), dtype))])


@gpu
@pytest.mark.parametrize("shape", [(40, 6), (300, 200)])
def test_bias_gradients_select(shape: tuple[int, int], dtype: Any) -> None:
    cuda = get_backend("cupy")
    x, dy = np.ones(shape, dtype), np.ones(shape, dtype)
    x[3, 0], dy[3, 0] = -1, np.nan  # not selected
    x[4, 1], dy[4, 1] = 0, np.inf  # not either: the kink
    dy[5, 2] = np.inf
    dy[6, 3] = np.nan
    dy[7, 4], dy[8, 4] = np.inf, -np.inf
    expected = np.full(shape[1], shape[0], dtype)
    expected[:5] = shape[0] - 1, shape[0] - 1, np.inf, np.nan, np.nan
    _, mask = cuda.relu(send(x))
    dbias = cuda.empty(shape[1:], dtype)
    dz = cuda.bias_relu_backward(send(dy), mask, dbias)
    close(dz, np.where(x > 0, dy, 0), dtype, exact=True)
    close(dbias, expected, dtype, exact=True)


@gpu
def test_strided_inputs_are_read_by_value(dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    x = rng.standard_normal((12, 9)).astype(dtype)
    there = cuda.asarray(x)
    views: list[tuple[np.ndarray, Array]] = [
        (x[cut], there[cut]) for cut in (np.s_[::2], np.s_[:, ::3], np.s_[:, 1], np.s_[::-1])
    ]
    views += [
        (x.T, there.T),
        (np.broadcast_to(x, (2, 12, 9)), cuda.xp.broadcast_to(there, (2, 12, 9))),
    ]
    state = cuda.step_state()
    state.plan(np.zeros(1), dtype=dtype)
    for host, view in views:
        y, mask = cuda.relu(view)
        close(y, np.maximum(host, 0), dtype, exact=True)
        close(cuda.relu_backward(view, mask), np.maximum(host, 0), dtype, exact=True)
        y, mask = cuda.dropout(view, 0.5, seed=1, stream=0, use=0, state=state)
        kept = unpack(cuda.to_numpy(mask), host.size).reshape(host.shape)
        close(y, np.where(kept, 2 * host, 0), dtype, exact=True)
        close(cuda.dropout_backward(view, mask, 0.5), cuda.to_numpy(y), dtype, exact=True)
        if host.ndim > 1:
            out = cuda.empty(host.shape[:-2] + host.shape[-1:], dtype)
            np.testing.assert_allclose(
                cuda.to_numpy(cuda.bias_grad(view, out)), host.sum(axis=-2), rtol=1e-5, atol=1e-5
            )
    bias = cuda.asarray(x[0].repeat(2))[::2]  # not contiguous in a row: copied
    y, _ = cuda.bias_relu(cuda.asarray(x.copy()), bias)
    close(y, np.maximum(x + x[0], 0), dtype, exact=True)
    with pytest.raises(ValueError, match="contiguous output"):
        cuda.bias_grad(there, cuda.empty((18,), dtype)[::2])


# ---- dropout -----------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("n", [*SIZES, SEVERAL_PASSES])
@pytest.mark.parametrize("p", [0.0, 2**-24, 0.3, 0.5, 1.0])
def test_dropout_takes_the_words_that_numpy_draws(
    n: int, p: float, dtype: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_grid(monkeypatch, 2)
    cuda = get_backend("cupy")
    x, dy = special(rng, n, dtype), special(rng, n, dtype)[::-1].copy()
    state = cuda.step_state()
    state.number = 5_000_000_000  # needs more than 32 bits
    state.plan(np.zeros(1), dtype=dtype)
    seed, stream, use = 2**64 - 3, 2**40 + 1, 3
    random = words(seed, stream, n, use=use, step=state.number)
    kept = (random >> 8) * 2.0**-24 >= p
    scale = dtype.type(1 / (1 - p)) if p < 1 else dtype.type(1)
    for offset in (0, 1):
        there = send(x, offset)
        y, mask = cuda.dropout(there, p, seed=seed, stream=stream, use=use, state=state)
        np.testing.assert_array_equal(unpack(cuda.to_numpy(mask), n), kept)
        close(y, np.where(kept, x * scale, 0).astype(dtype), dtype, exact=True)
        unchanged(there, x)
        there = send(dy, offset)
        dx = cuda.dropout_backward(there, mask, p)
        close(dx, np.where(kept, dy * scale, 0).astype(dtype), dtype, exact=True)
        unchanged(there, dy)


# ---- gathering ---------------------------------------------------------------------------------


@gpu
@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "sources",
    [
        [("f4", (3, 7))],
        [("f4", (784,)), ("i8", ())],
        [("f8", (6,)), ("i8", ()), ("f4", (2,))],  # words of 16, 8 and 8 bytes
        [("u1", (28, 28)), ("i8", ())],
        [("u1", (3,)), ("i2", (3,)), ("?", ())],  # of 1, 2 and 1 byte
        [("f4", (0,)), ("i4", ())],
        [("f4", (4,)), ("i8", ()), ("f4", ()), ("f4", ())],  # more than the kernel takes
    ],
)
def test_gather_rows(
    sources: list[tuple[str, tuple[int, ...]]], offset: int, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    n, batch_size = 23, 5
    hosts = [rng.integers(0, 2**7, (n, *shape)).astype(kind) for kind, shape in sources]
    there = [send(a, offset) for a in hosts]
    order = rng.permutation(n)
    state = cuda.step_state()
    state.plan(np.zeros(5), dtype=np.dtype(np.float32), order=order)
    value = cuda.xp.zeros((1, 64), np.float32)
    groups = Groups([(0, 64, 1.0, 1.0)], cuda)
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        batch = cuda.gather_rows(there, state, batch_size, size)
        for a, host in zip(batch, hosts, strict=True):
            close(a, host[order[start : start + size]], host.dtype, exact=True)
        update = Update(value, value, (None,), groups, state)
        cuda.sgd(update, momentum=0, nesterov=False)  # goes on to the next position
    assert [len(a) for a in cuda.gather_rows(there, state, batch_size, 0)] == [0] * len(hosts)
    for a, host in zip(there, hosts, strict=True):
        unchanged(a, host)


# ---- bytes and races ---------------------------------------------------------------------------


def moved(call: Callable[[], Any], name: str, dtype: Any = None) -> int:
    """Bytes that `call` moves by the kernel of this name, the only one it launches."""
    pytest.importorskip("cudasim", reason="the simulator counts bytes")
    suffix = {None: "", np.dtype(np.float32): "_f32", np.dtype(np.float64): "_f64"}[dtype]
    kernels = traffic(call)
    assert list(kernels) == [name + suffix]
    return kernels[name + suffix]


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(128, 512), (1024, 512), (3, 128, 64)])
def test_bytes_of_elementwise_kernels(shape: tuple[int, ...], dtype: Any) -> None:
    cuda = get_backend("cupy")
    x = cuda.xp.ones(shape, dtype)
    bias = rows_of_models(np.ones(shape[:-2] + shape[-1:], dtype))
    state = cuda.step_state()
    state.plan(np.zeros(1), dtype=dtype)
    _, mask = cuda.relu(x)
    y, kept = cuda.dropout(x, 0.5, seed=0, stream=0, use=0, state=state)
    # each reads an array, writes one, and writes or reads one bit per element
    least = 2 * x.nbytes + x.size / 8
    # the bias, no longer than a row, is read for every row: from the cache
    again = x.nbytes
    for name, call, extra in [
        ("relu", lambda: cuda.relu(x), 0),
        ("relu_backward", lambda: cuda.relu_backward(x, mask), 0),
        ("bias_relu", lambda: cuda.bias_relu(y, bias), again),
        (
            "dropout",
            lambda: cuda.dropout(x, 0.5, seed=0, stream=0, use=0, state=state),
            0,
        ),
        ("dropout_backward", lambda: cuda.dropout_backward(x, kept, 0.5), 0),
    ]:
        bytes_ = moved(call, name, dtype)
        assert least <= bytes_ <= 1.1 * least + extra, (name, bytes_ / least)


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(128, 512), (1024, 512), (4096, 10), (3, 128, 64)])
def test_bytes_of_bias_gradients(shape: tuple[int, ...], dtype: Any) -> None:
    cuda = get_backend("cupy")
    dy = cuda.xp.ones(shape, dtype)
    dbias = rows_of_models(np.ones(shape[:-2] + shape[-1:], dtype))
    _, mask = cuda.relu(dy)
    # without a mask: dy is read, dbias written; the partial sums are what the bound leaves room for
    least = dy.nbytes + dbias.nbytes
    bytes_ = moved(lambda: cuda.bias_grad(dy, dbias), "bias_backward", dtype)
    assert least <= bytes_ <= 1.1 * least, bytes_ / least
    # with: one bit per element is read, too, and dz written
    least += dy.size / 8 + dy.nbytes
    bytes_ = moved(lambda: cuda.bias_relu_backward(dy, mask, dbias), "bias_backward", dtype)
    assert least <= bytes_ <= 1.1 * least, bytes_ / least


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(("kind", "width"), [("f4", 784), ("f8", 784), ("u1", 3072)])
def test_bytes_of_gathering(kind: str, width: int, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    features, labels = cuda.xp.zeros((300, width), kind), cuda.xp.zeros(300, np.int64)
    state = cuda.step_state()
    state.plan(np.zeros(2), dtype=np.dtype(np.float32), order=rng.permutation(300))
    # each of 128 samples has its features and a label of 8 bytes, read and written, and its place
    # in the order, read
    least = 128 * (2 * (width * features.itemsize + 8) + 8)
    bytes_ = moved(lambda: cuda.gather_rows([features, labels], state, 128, 128), "gather_rows")
    assert least <= bytes_ <= 1.1 * least, bytes_ / least


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (9, 33), (2, 3, 5), (70, 130)])
def test_no_kernel_races(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    cuda = get_backend("cupy")
    x = send(rng.standard_normal(shape).astype(dtype))
    bias = cuda.xp.ones(shape[:-2] + shape[-1:], dtype)
    state = cuda.step_state()
    state.plan(np.zeros(1), dtype=dtype, order=np.arange(shape[0]))
    cuda._ticket()  # type: ignore[attr-defined]
    with cudasim.option("racecheck", 1):
        for a in (x, send(cuda.to_numpy(x), 1)):
            y, mask = cuda.relu(a)
            cuda.relu_backward(a, mask)
            y, mask = cuda.bias_relu(y, bias)
            cuda.bias_relu_backward(a, mask, bias)
            cuda.bias_grad(a, bias)
            y, mask = cuda.dropout(a, 0.5, seed=0, stream=0, use=0, state=state)
            cuda.dropout_backward(a, mask, 0.5)
            cuda.gather_rows([a, a], state, shape[0], shape[0])
        cuda.synchronize()
