"""The C kernel that gathers a batch: rows bit for bit, of any dtype, and none that isn't there."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles import assert_same_bits

from nnx.backends import get_backend, numpy_backend

pytestmark = pytest.mark.kernels

SOURCES: list[list[tuple[str, tuple[int, ...]]]] = [
    [("f4", (3, 7))],
    [("f4", (784,)), ("i8", ())],
    [("f8", (6,)), ("i8", ()), ("f4", (2,))],
    [("u1", (28, 28)), ("i4", ())],
    [("u1", (3,)), ("i2", (3,)), ("?", ())],
    [("f2", (5,)), ("u8", (2,)), ("i1", ()), ("u4", ()), ("u2", (1,))],
    [("f4", (0,)), ("i4", ())],
    [("f8", ())] * 8,
]


def planned(order: Any, batch_size: int, position: int = 0) -> Any:
    state = get_backend("numpy").step_state()
    n_steps = -(-len(order) // batch_size)
    state.plan(np.zeros(n_steps), dtype=np.dtype(np.float32), order=order)
    for _ in range(position):
        state.advance(None)
    return state


def data(
    sources: list[tuple[str, tuple[int, ...]]], n: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Arrays of random bytes."""
    return [rng.integers(0, 2, (n, *shape)).astype(kind) for kind, shape in sources]


@pytest.mark.parametrize("sources", SOURCES)
def test_rows_of_every_batch(
    kernels: Any, sources: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> None:
    n, batch_size = 23, 5
    arrays = [
        a if a.dtype == bool else (a * 101).astype(a.dtype) + np.arange(n).astype(a.dtype)[index]
        for a in data(sources, n, rng)
        for index in [(slice(None), *[None] * (a.ndim - 1))]
    ]
    copies = [a.copy() for a in arrays]
    order = rng.permutation(n)
    for position in range(5):
        size = min(batch_size, n - position * batch_size)
        rows = order[position * batch_size :][:size]
        state = planned(order, batch_size, position)
        for found, a in zip(
            kernels.gather_rows(arrays, state, batch_size, size), arrays, strict=True
        ):
            assert_same_bits(found, a[rows])
    assert [len(b) for b in kernels.gather_rows(arrays, state, batch_size, 0)] == [0] * len(arrays)
    for a, copy in zip(arrays, copies, strict=True):
        assert_same_bits(a, copy)


def test_two_threads_give_the_bits_of_one(kernels: Any, rng: np.random.Generator) -> None:
    cpu: Any = numpy_backend.CPU
    arrays = [rng.standard_normal((500, 1001)), rng.integers(0, 9, 500)]
    order, threads = rng.permutation(500), cpu.info()["threads"]
    cpu.set_num_threads(2)
    try:
        found = kernels.gather_rows(arrays, planned(order, 301), 301, 301)
    finally:
        cpu.set_num_threads(threads)
    for b, a in zip(found, arrays, strict=True):
        assert_same_bits(b, a[order[:301]])


@pytest.mark.parametrize("outside", [23, -1, 2**62, -(2**63), 2**63 - 1])
def test_rows_that_are_not_there_are_never_read(outside: int) -> None:
    cpu: Any = numpy_backend.CPU
    x, short = np.arange(24.0).reshape(24, 1), np.arange(23)
    order = np.arange(10)
    order[4] = outside
    out = [np.full((3, 1), 7.0), np.full(3, 7)]

    def from_row(start: int) -> Any:
        return SimpleNamespace(order=order, _position=start)

    assert cpu.gather_rows([x, short], from_row(2), 1, out) is False
    assert cpu.gather_rows([short, x], from_row(2), 1, out[::-1]) is False
    assert all((b == 7).all() for b in out)
    assert cpu.gather_rows([x, short], from_row(1), 1, out) is True  # up to it, and from behind it
    assert cpu.gather_rows([x, short], from_row(5), 1, out) is True
    np.testing.assert_array_equal(out[1], [5, 6, 7])


def test_arguments_that_do_not_fit_are_declined_untouched() -> None:
    cpu: Any = numpy_backend.CPU
    x, t, order = np.zeros((9, 4), np.float32), np.zeros(9, np.int64), np.arange(9)
    objects = np.array([None] * 9, object)
    out = [np.full((3, 4), 7, np.float32), np.full(3, 7)]
    good = ([x, t], SimpleNamespace(order=order, _position=0), 3, out)
    wrong: list[tuple[int, Any]] = [
        *((0, w) for w in ([x], (x, t), [x[::2], t], [x, t.astype("i4")], [x, t.astype(">i8")])),
        *((0, w) for w in ([x, np.array(3)], [x[:, :3].copy(), t], [x, None], [x, objects], [])),
        *((0, w) for w in ([x, t.astype("m8[s]")], [x, t.view("u8")], [x.astype("c8"), t])),
        *(
            (1, SimpleNamespace(order=w, _position=0))
            for w in (None, order.astype("i4"), order[::2], order.reshape(3, 3), [0, 1, 2])
        ),
        *((1, SimpleNamespace(order=order, _position=w)) for w in (-1, 3, 2**62, 2**64, None, "0")),
        *((1, w) for w in (None, order, SimpleNamespace(order=order))),
        *((2, w) for w in (-3, 0)),
        *((3, w) for w in ([out[0]], [out[0], np.full(2, 7)], [out[0][:2], out[1]], None)),
        (3, [np.empty((10, 4), np.float32), np.empty(10, np.int64)]),
    ]
    for i, bad in wrong:
        arguments = list(good)
        arguments[i] = bad
        assert cpu.gather_rows(*arguments) is False, (i, bad)
        assert all((b == 7).all() for b in out)
    assert cpu.gather_rows(*good) is True


def test_what_no_kernel_takes_is_left_to_numpy(rng: np.random.Generator) -> None:
    backend, order = get_backend("numpy"), rng.permutation(9)
    strided = rng.standard_normal((9, 6))[:, ::2]
    swapped = np.arange(9).astype(">i8" if np.little_endian else "<i8")
    for sources in ([strided, swapped], [rng.standard_normal((9, 2)) for _ in range(9)]):
        for b, a in zip(
            backend.gather_rows(sources, planned(order, 4, 1), 4, 4), sources, strict=True
        ):
            np.testing.assert_array_equal(b, a[order[4:8]])
