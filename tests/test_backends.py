"""The contract of every operation, on every backend: values by the loops in `oracles`, and more.

Dtype, shape and untouched inputs belong to it. Beside it: which backend is found by name, by arrays
and by flag; and the arena.
"""

import inspect
import math
import operator
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

import nnx
from nnx import backends
from nnx.backends import (
    Backend,
    BackendUnavailable,
    NumpyBackend,
    StepState,
    XpBackend,
    available,
    backend_of,
    get_backend,
    resolve,
)
from nnx.backends.arena import Arena, running
from nnx.backends.base import Groups, Update

SIZES = [0, 1, 31, 33, 255, 257]
# no denormals: CuPy compiles every kernel with -ftz=true, which takes those of float32 for 0
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 2e-38, -2e-38, 1.0, -1.0]


def planned(
    backend: Backend, rates: list[float], dtype: Any, number: int = 0, models: int | None = None
) -> StepState:
    state = backend.step_state()
    state.number = number
    state.plan(np.array(rates), dtype=dtype, n_models=models)
    return state


class Arrays:
    """Sends arrays to a backend, and asserts afterwards that nobody wrote to them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.sent: list[tuple[Any, np.ndarray]] = []

    def __call__(self, a: np.ndarray) -> Any:
        self.sent.append((self.backend.asarray(a), a.copy()))
        return self.sent[-1][0]

    def assert_untouched(self) -> None:
        for there, here in self.sent:
            assert_same_bits(self.backend.to_numpy(there), here)


@pytest.fixture
def send(backend: Backend) -> Arrays:
    return Arrays(backend)


# ---- which backend ---------------------------------------------------------------------------


def test_numpy_is_one_backend() -> None:
    assert get_backend("numpy") is get_backend("numpy")
    assert get_backend("numpy").name == "numpy"
    assert available()[0] == "numpy"


@pytest.mark.parametrize("name", ["", "torch", "numpy:0", "cupy:", "cupy:x", "cupy:-1", "NumPy"])
def test_unknown_name_is_an_error_that_repeats_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r}: expected 'numpy'"):
        get_backend(name)


def test_auto_is_numpy_with_a_reason_where_cupy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: int | None) -> Backend:
        raise BackendUnavailable("driver 4711 is missing")

    monkeypatch.setattr(backends, "_cupy_backend", fail)
    with pytest.warns(UserWarning, match="NumPy; driver 4711"):
        assert get_backend("auto") is get_backend("numpy")
    with pytest.raises(BackendUnavailable, match="4711"):
        get_backend("cupy")


@pytest.mark.gpu
def test_cupy_by_number_is_the_same_backend_and_auto_finds_it() -> None:
    assert get_backend("cupy:0") is get_backend("cupy") is get_backend("auto")
    assert "cupy:0" in available()


@pytest.mark.gpu
def test_a_device_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(BackendUnavailable, match="4711"):
        get_backend("cupy:4711")


def test_resolve_asks_argument_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    other, numpy = NumpyBackend(), get_backend("numpy")
    monkeypatch.delenv("NNX_BACKEND", raising=False)
    assert resolve() is numpy
    assert resolve(default=other) is other
    assert resolve(other) is other
    monkeypatch.setenv("NNX_BACKEND", "numpy")
    assert resolve(default=other) is numpy
    assert resolve(other) is other
    monkeypatch.setenv("NNX_BACKEND", "nonsense")
    assert resolve("numpy") is numpy
    with pytest.raises(ValueError, match="nonsense"):
        resolve()
    monkeypatch.setenv("NNX_BACKEND", "")
    assert resolve(default=other) is other


def test_backend_of_finds_the_arrays_backend(backend: Backend) -> None:
    a = backend.asarray([1.0, 2.0])
    assert backend_of(a) is backend
    assert backend_of(a, a[:1], a.sum()) is backend


def test_backend_of_names_what_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"got builtins\.list"):
        backend_of([1.0])
    with pytest.raises(TypeError, match=r"builtins\.float"):
        backend_of(np.ones(1), 1.0)


@pytest.mark.gpu
def test_backend_of_refuses_a_mix() -> None:
    with pytest.raises(TypeError, match=r"got numpy and cupy; .*get_backend\('numpy'\)"):
        backend_of(np.ones(1), get_backend("cupy").asarray(np.ones(1)))


def test_backends_is_not_importable_from_the_repository_root() -> None:
    root = Path(nnx.__file__).parents[1]
    if not (root / "backends" / "__init__.py").is_file():
        pytest.skip("nnx is installed away from its repository")
    found = subprocess.run(
        [sys.executable, "-c", "import backends"], cwd=root, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "`nnx.backends`, not `backends`" in found.stderr


@pytest.mark.unpoisoned
def test_every_backend_has_the_signatures_of_the_protocol() -> None:
    classes: list[Any] = [XpBackend, NumpyBackend]
    try:
        from nnx.backends.cupy_backend import CupyBackend
    except ImportError:
        pass
    else:
        classes.append(CupyBackend)
    names = [name for name in vars(Backend) if not name.startswith("_")]
    assert {"gemm", "relu", "softmax_nll", "dropout", "adam", "gather_rows"} <= set(names)
    for kind in classes:
        for name in names:
            wanted = inspect.signature(getattr(Backend, name))
            assert inspect.signature(getattr(kind, name)) == wanted, f"{kind.__name__}.{name}"


# ---- arrays ----------------------------------------------------------------------------------


def test_asarray_is_contiguous_and_keeps_bits(backend: Backend, dtype: Any) -> None:
    host = np.arange(12, dtype=dtype).reshape(3, 4)
    for view in (host, host.T, host[::2], host[:, ::-1]):
        there = backend.asarray(view)
        assert there.flags.c_contiguous
        assert_same_bits(backend.to_numpy(there), view)
    assert backend.asarray([1, 2], np.float32).dtype == np.float32


def test_empty_comes_poisoned_in_this_suite(backend: Backend, dtype: Any) -> None:
    assert np.isnan(backend.to_numpy(backend.empty((3, 2), dtype))).all()
    assert backend.to_numpy(backend.empty((2,), bool)).all()
    assert backend.to_numpy(backend.empty((2,), np.int64)).tolist() == [-(2**63)] * 2


@pytest.mark.unpoisoned
def test_empty_is_left_alone_on_request() -> None:
    assert XpBackend.empty.__name__ == "empty"


# ---- products --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(3, 4, 5), (1, 1, 1), (0, 3, 2), (2, 3, 0), (2, 0, 3), (33, 257, 31)]
)
def test_gemm(
    backend: Backend,
    send: Arrays,
    dtype: Any,
    rng: np.random.Generator,
    m: int,
    k: int,
    n: int,
    accumulate: bool,
) -> None:
    a, b, c = (rng.standard_normal(s).astype(dtype) for s in ((m, k), (k, n), (m, n)))
    rows = [[math.fsum(map(float.__mul__, r, q)) for q in b.T.tolist()] for r in a.tolist()]
    expected = np.array(rows, np.float64).reshape(m, n) + accumulate * c.astype(np.float64)
    pairs = [
        (send(a), send(b)),
        (send(np.ascontiguousarray(a.T)).T, send(b)),
        (send(a), send(np.ascontiguousarray(b.T)).T),
    ]
    for left, right in pairs:
        out = backend.asarray(c.copy()) if accumulate else backend.empty((m, n), dtype)
        assert backend.gemm(left, right, out, accumulate=accumulate) is out
        assert_close(backend.to_numpy(out), expected, depth=k, dtype=dtype)
    send.assert_untouched()


@pytest.mark.parametrize("accumulate", [False, True])
def test_gemm_batched_and_broadcast(
    backend: Backend, send: Arrays, dtype: Any, rng: np.random.Generator, accumulate: bool
) -> None:
    a, b = (rng.standard_normal(s).astype(dtype) for s in ((3, 4, 5), (3, 5, 2)))
    for left, right in ((send(a), send(b)), (send(a[0]), send(b)), (send(a), send(b[0]))):
        out = backend.empty((3, 4, 2), dtype)
        backend.gemm(left, right, out)
        if accumulate:
            backend.gemm(left, right, out, accumulate=True)
        left, right = backend.to_numpy(left), backend.to_numpy(right)
        for k in range(3):
            one, two = left[k] if left.ndim == 3 else left, right[k] if right.ndim == 3 else right
            expected, *_ = oracles.linear(one, two, None, np.zeros((4, 2)))
            expected = expected * (1 + accumulate)
            assert_close(backend.to_numpy(out)[k], expected, depth=5, dtype=dtype)
    send.assert_untouched()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (257, 3), (33, 31), (3, 5, 2), (2, 0, 3)])
def test_bias_grad(
    backend: Backend, send: Arrays, dtype: Any, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    dy = rng.standard_normal(shape).astype(dtype)
    expected = np.zeros((*shape[:-2], shape[-1]))
    for index, number in np.ndenumerate(dy):
        expected[(*index[:-2], index[-1])] += float(number)
    out = backend.empty(expected.shape, dtype)
    backend.bias_grad(send(dy), out)
    assert_close(backend.to_numpy(out), expected, depth=shape[-2], dtype=dtype)
    backend.bias_grad(send(dy), out, accumulate=True)
    assert_close(backend.to_numpy(out), 2 * expected, depth=shape[-2], dtype=dtype)
    send.assert_untouched()


# ---- ReLU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_relu(backend: Backend, send: Arrays, dtype: Any, rng: np.random.Generator, n: int) -> None:
    x, dy = (rng.standard_normal((n,)).astype(dtype) for _ in range(2))
    y, mask = backend.relu(send(x))
    dx = backend.relu_backward(send(dy), mask)
    expected = oracles.relu(x, dy)
    assert_same_bits(backend.to_numpy(y), expected[0].astype(dtype))
    assert_same_bits(backend.to_numpy(dx), expected[1].astype(dtype))
    send.assert_untouched()


def test_relu_selects(backend: Backend, send: Arrays, dtype: Any) -> None:
    x, dy = (g.ravel().astype(dtype) for g in np.meshgrid(SPECIAL, SPECIAL))
    y, mask = backend.relu(send(x))
    dx = backend.to_numpy(backend.relu_backward(send(dy), mask))
    np.testing.assert_array_equal(backend.to_numpy(y), oracles.relu(x, dy)[0].astype(dtype))
    np.testing.assert_array_equal(
        dx, np.array([d if a > 0 else 0 for a, d in zip(x, dy, strict=True)])
    )
    send.assert_untouched()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (33, 31), (257, 3), (3, 5, 2), (2, 33, 33)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_relu_is_the_pair(
    backend: Backend,
    send: Arrays,
    dtype: Any,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    accumulate: bool,
) -> None:
    z, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    bias, dbias = (rng.standard_normal((*shape[:-2], shape[-1])).astype(dtype) for _ in range(2))
    z[..., :1, :] = -bias[..., None, :]  # a row exactly on the kink
    shifted = z + bias[..., None, :]
    expected_y, mask = backend.relu(backend.asarray(shifted))
    expected_dz = backend.relu_backward(send(dy), mask)
    expected_dbias = backend.asarray(dbias.copy())
    backend.bias_grad(expected_dz, expected_dbias, accumulate=accumulate)

    inout = backend.asarray(z.copy())
    y, mask = backend.bias_relu(inout, send(bias))
    out = backend.asarray(dbias.copy())
    dz = backend.bias_relu_backward(send(dy), mask, out, accumulate=accumulate)
    assert y is inout
    for got, wanted in ((y, expected_y), (dz, expected_dz), (out, expected_dbias)):
        assert_same_bits(backend.to_numpy(got), backend.to_numpy(wanted))
    send.assert_untouched()


def test_bias_relu_selects(backend: Backend, dtype: Any) -> None:
    x, dy = (g.astype(dtype) for g in np.meshgrid(SPECIAL, SPECIAL))
    out = backend.empty((len(SPECIAL),), dtype)
    y, mask = backend.bias_relu(backend.asarray(x.copy()), backend.asarray(np.zeros(9, dtype)))
    with np.errstate(invalid="ignore"):  # the bias gradient sums inf and -inf
        dz = backend.bias_relu_backward(backend.asarray(dy), mask, out)
    expected = oracles.relu(x, dy)
    np.testing.assert_array_equal(backend.to_numpy(y), expected[0].astype(dtype))
    np.testing.assert_array_equal(backend.to_numpy(dz), expected[1].astype(dtype))


# ---- losses and metrics ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (31, 33), (2, 257), (257, 3), (5, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_nll(
    backend: Backend,
    send: Arrays,
    dtype: Any,
    rng: np.random.Generator,
    shape: tuple[int, int],
    weighted: bool,
) -> None:
    n, c = shape
    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    labels = rng.integers(0, c, n)
    labels[0], labels[-1] = 0, c - 1
    weight = rng.uniform(0.5, 2, n).astype(dtype) if weighted else None
    here = (send(logits), send(labels), None if weight is None else send(weight))
    loss, gradient = backend.softmax_nll(*here)
    expected, expected_gradient = oracles.softmax_nll(logits, labels, weight)
    assert_close(backend.to_numpy(loss), expected, dtype=dtype)
    assert_close(backend.to_numpy(gradient), expected_gradient, dtype=dtype)
    alone, nothing = backend.softmax_nll(*here, need_gradient=False)
    assert nothing is None
    assert_same_bits(backend.to_numpy(alone), backend.to_numpy(loss))
    send.assert_untouched()


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("classes", [1, 2, 33])
def test_count_correct_adds_and_takes_the_first_of_equal_maxima(
    backend: Backend,
    send: Arrays,
    dtype: Any,
    rng: np.random.Generator,
    models: int | None,
    classes: int,
) -> None:
    shape = (33, classes) if models is None else (models, 33, classes)
    scores = rng.integers(0, 3, shape).astype(dtype)  # many ties
    labels = rng.integers(0, classes, 33)
    total = backend.asarray(np.full(shape[:-2], 100, np.int64))
    backend.count_correct(send(scores), send(labels), total)

    def count(rows: np.ndarray) -> int:
        firsts = [row.index(max(row)) for row in rows.tolist()]
        return 100 + list(map(operator.eq, firsts, labels.tolist())).count(True)

    got = backend.to_numpy(total)
    assert got.dtype == np.int64
    assert got.tolist() == (count(scores) if models is None else [count(s) for s in scores])
    send.assert_untouched()


def test_count_correct_of_no_rows(backend: Backend, dtype: Any) -> None:
    total = backend.asarray(np.array(7, np.int64))
    labels = backend.asarray(np.empty(0, np.int64))
    backend.count_correct(backend.asarray(np.empty((0, 3), dtype)), labels, total)
    assert int(backend.to_numpy(total)) == 7


# ---- dropout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 2.0**-24, 1 - 2.0**-24, 1.0])
@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (3, 11), (257,)])
def test_dropout_drops_what_the_words_say(
    backend: Backend,
    send: Arrays,
    dtype: Any,
    rng: np.random.Generator,
    p: float,
    shape: tuple[int, ...],
) -> None:
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    state = planned(backend, [0.1], dtype, number=5)
    draw: dict[str, Any] = {"seed": 2**63 + 1, "stream": 3, "use": 2}
    y, mask = backend.dropout(send(x), p, **draw, state=state)
    dx = backend.dropout_backward(send(dy), mask, p)
    dropped = oracles.dropped(p, shape, 2**63 + 1, 3, 2, 5)
    for got, source in ((y, x), (dx, dy)):
        kept = source.astype(np.float64) / (1 - p if p < 1 else 1.0)
        assert_close(backend.to_numpy(got), np.where(dropped, 0, kept), dtype=dtype)
        assert not backend.to_numpy(got)[dropped].any()
    send.assert_untouched()


def test_dropout_keeps_a_unit_whose_word_is_exactly_p(backend: Backend, dtype: Any) -> None:
    words = oracles.words32(0, 0, 4096)
    edges = [(i, w) for i, w in enumerate(words) if w > 0 and w % 256 == 0]
    assert len(edges) > 3
    for i, word in edges[:4]:
        state = planned(backend, [0.1], dtype)
        ones = backend.asarray(np.ones(4096, dtype))
        p = (word >> 8) * 2.0**-24
        y, _ = backend.dropout(ones, p, seed=0, stream=0, use=0, state=state)
        np.testing.assert_array_equal(backend.to_numpy(y) == 0, oracles.dropped(p, (4096,), 0, 0))
        assert backend.to_numpy(y)[i] > 0


def test_dropout_selects(backend: Backend, dtype: Any) -> None:
    x = np.full(1000, np.inf, dtype)
    x[::2] = np.nan
    state = planned(backend, [0.1], dtype)
    y, mask = backend.dropout(backend.asarray(x), 0.5, seed=0, stream=0, use=0, state=state)
    dropped = oracles.dropped(0.5, (1000,), 0, 0)
    for got in (y, backend.dropout_backward(backend.asarray(x), mask, 0.5)):
        np.testing.assert_array_equal(backend.to_numpy(got), np.where(dropped, 0, x))


# ---- optimizers ------------------------------------------------------------------------------


RUNS = [(0, 64, 1.0, 1.0), (64, 192, 0.5, 0.0), (192, 256, 0.0, 1.0)]


@pytest.mark.parametrize("models", [None, 1, 3])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam"])
def test_optimizers_update_each_stretch_by_its_scales(
    backend: Backend,
    send: Arrays,
    dtype: Any,
    rng: np.random.Generator,
    models: int | None,
    name: str,
) -> None:
    rates = [0.1, 0.05, 0.2]
    value = rng.standard_normal((models or 1, 256)).astype(dtype)
    gradients = [rng.standard_normal(value.shape).astype(dtype) for _ in rates]
    losses = rng.standard_normal((3,) if models is None else (3, models)).astype(dtype)
    state, groups = planned(backend, rates, dtype, models=models), Groups(RUNS, backend)
    flat = backend.asarray(value.copy())
    m, v = (backend.asarray(np.zeros_like(value)) for _ in range(2))
    for i, gradient in enumerate(gradients):
        slots = {"adam": (m, v, None), "sgd": (None,)}.get(name, (m,))
        update = Update(flat, send(gradient), slots, groups, state, send(losses[i]), decay=0.3)
        if name == "adam":
            settings: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
            backend.adam(update, **settings)
        else:
            settings = {"momentum": 0.0 if name == "sgd" else 0.9, "nesterov": name == "nesterov"}
            backend.sgd(update, **settings)
    oracle: Any = oracles.adam if name == "adam" else oracles.sgd
    result = backend.to_numpy(flat)
    for start, stop, lr_scale, decay_scale in RUNS:
        cut = np.s_[:, start:stop]
        expected = oracle(
            value[cut],
            [g[cut] for g in gradients],
            [rate * lr_scale for rate in rates].__getitem__,
            weight_decay=0.3 * decay_scale,
            **settings,
        )
        # three steps of some six roundings each, and Adam divides small numbers
        assert_close(result[cut], expected, depth=100, dtype=dtype)
    assert_same_bits(result[:, 192:], value[:, 192:])  # frozen
    assert (state.number, state.position) == (3, 3)
    assert_same_bits(backend.to_numpy(state.log), losses)
    send.assert_untouched()


# ---- the running step and the data -----------------------------------------------------------


def test_state_plans_logs_and_counts(backend: Backend, dtype: Any) -> None:
    state = backend.step_state()
    state.number = 7
    state.plan(np.array([0.5, 0.25]), dtype=dtype, n_models=3)
    log = backend.to_numpy(state.log)
    assert log.shape == (2, 3)
    assert log.dtype == dtype
    assert np.isnan(log).all()
    assert (state.number, state.position, state.rate) == (7, 0, 0.5)
    state.count()
    assert (state.number, state.position, state.rate) == (8, 1, 0.25)


def test_reference_state_logs_the_loss() -> None:
    state = planned(get_backend("numpy"), [0.1, 0.1], np.float32)
    state.advance(np.float32(3))
    state.advance(None)
    np.testing.assert_array_equal(state.log, [3, np.nan])
    assert (state.number, state.position) == (2, 2)


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 2, 5)])
def test_gather_rows_takes_the_planned_batch(
    backend: Backend, send: Arrays, dtype: Any, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    x, t = rng.standard_normal(shape).astype(dtype), rng.integers(0, 9, 10)
    order = rng.permutation(10)
    groups = Groups([(0, 64, 1.0, 1.0)], backend)
    state = backend.step_state()
    state.plan(np.full(3, 0.1), dtype=dtype, order=order)
    value = backend.asarray(np.zeros((1, 64), dtype))
    sources = [send(x), send(t)]
    for start, n in ((0, 4), (4, 4), (8, 2)):
        rows = order[start : start + n]
        got = backend.gather_rows(sources, state, 4, n)
        assert_same_bits(backend.to_numpy(got[0]), x[rows])
        assert_same_bits(backend.to_numpy(got[1]), t[rows])
        update = Update(value, value, (None,), groups, state)
        backend.sgd(update, momentum=0, nesterov=False)  # what goes on to the next batch
    send.assert_untouched()


# ---- the arena -------------------------------------------------------------------------------


def take(arena: Arena, *requests: tuple[tuple[int, ...], Any]) -> list[Any]:
    with arena.step("key"):
        return [NumpyBackend().empty(shape, dtype) for shape, dtype in requests]


REQUESTS: list[tuple[tuple[int, ...], Any]] = [
    ((3, 5), np.float32),
    ((), np.float64),
    ((0, 4), np.float64),
    ((1,), bool),
    ((100,), np.int64),
]


def test_arena_arrays_are_apart_aligned_and_the_same_each_step() -> None:
    arena = Arena(np)
    take(arena, *REQUESTS)
    size = arena.nbytes
    second, third = take(arena, *REQUESTS), take(arena, *REQUESTS)
    base = second[0].ctypes.data
    for i, (a, (shape, dtype)) in enumerate(zip(second, REQUESTS, strict=True)):
        assert (a.shape, a.dtype) == (shape, np.dtype(dtype))
        assert (a.ctypes.data - base) % 256 == 0
        assert third[i] is a
        a.fill(i % 2)
    for i, a in enumerate(second):
        assert (a == i % 2).all()  # nobody's neighbour has overwritten it
        assert all(not np.shares_memory(a, b) for b in second[:i])
    assert arena.nbytes == size >= sum(a.nbytes for a in second)


def test_arena_grows_once_and_never_shrinks() -> None:
    arena = Arena(np)
    sizes = []
    for n in (10, 10, 1000, 10, 1000, 1000):
        take(arena, ((n,), np.float64))
        sizes.append(arena.nbytes)
    assert sizes == [80, 80, 8000, 8000, 8000, 8000]


def test_arena_follows_a_step_that_asks_for_something_else() -> None:
    arena = Arena(np)
    other_dtypes = [(shape, np.uint8) for shape, _ in REQUESTS]
    for requests in (REQUESTS, REQUESTS[::-1], REQUESTS[:2], other_dtypes, REQUESTS):
        for _ in range(2):
            arrays = take(arena, *requests)
            for i, a in enumerate(arrays):
                a.fill(i % 2)
            for i, (a, (shape, dtype)) in enumerate(zip(arrays, requests, strict=True)):
                assert (a.shape, a.dtype) == (shape, np.dtype(dtype))
                assert (a == i % 2).all()


def test_arena_serves_only_the_running_step_of_its_thread() -> None:
    arena, backend = Arena(np), NumpyBackend()
    take(arena, ((1000,), np.float64))
    found: list[Any] = []
    with arena.step("key"):
        thread = threading.Thread(target=lambda: found.append(running.arena))
        thread.start()
        thread.join()
        inner = Arena(np)
        with inner.step("key"):
            backend.empty((10,), np.float64)
        inside = backend.empty((10,), np.float64)
    outside = backend.empty((10,), np.float64)
    assert found == [None]
    assert inner.nbytes == 80
    assert np.shares_memory(inside, take(arena, ((10,), np.float64))[0])
    assert not np.shares_memory(outside, inside)


def test_arena_ends_its_step_after_an_error() -> None:
    arena = Arena(np)
    with pytest.raises(ZeroDivisionError), arena.step("key"):
        raise ZeroDivisionError
    assert running.arena is None


def test_arena_may_be_asked_for_nothing_first() -> None:
    arena = Arena(np)
    for _ in range(2):
        assert take(arena, ((0, 4), np.float32))[0].shape == (0, 4)


def test_arena_that_finds_no_room_for_its_slab_goes_on_in_pieces() -> None:
    """The step is done by then: an error would say that it failed."""

    class Scarce:
        dtype, uint8, room = np.dtype, np.uint8, 10_000

        def empty(self, shape: Any, dtype: Any) -> Any:
            if np.prod(shape) * np.dtype(dtype).itemsize > self.room:
                raise MemoryError
            return np.empty(shape, dtype)

    xp: Any = Scarce()
    arena = Arena(xp)
    for room in (10_000, 10_000, 100_000):
        xp.room = room
        with arena.step("key"):
            arrays = [arena.empty((1000,), np.float64) for _ in range(3)]
        assert not np.shares_memory(arrays[0], arrays[1])
        assert arena.nbytes == (0 if room == 10_000 else pytest.approx(24_000, rel=0.1))


@pytest.mark.gpu
def test_arena_of_one_library_serves_no_other() -> None:
    device, host = get_backend("cupy"), get_backend("numpy")
    with Arena(device.xp).step("key"):
        assert backend_of(host.empty((3,), np.float32)) is host
        assert backend_of(device.empty((3,), np.float32)) is device
