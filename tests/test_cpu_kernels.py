"""The C kernels against the XpBackend bodies, for every instruction set that runs here."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cpu_kernels import instructions
from kernel_calls import CALLS
from kernel_cases import REFERENCE, SHAPES, TOLERANCE, special

from nnx.backends import get_backend, numpy_backend

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("name", CALLS)
def test_every_operation_is_that_of_its_definition(kernels: Any, name: str, dtype: Any) -> None:
    found = CALLS[name](kernels, dtype, np.random.default_rng(3))
    expected = CALLS[name](REFERENCE, dtype, np.random.default_rng(3))
    rtol, atol = TOLERANCE[np.dtype(dtype)]
    for a, b in zip(found, expected, strict=True):
        largest = float(np.max(np.abs(b), where=np.isfinite(b), initial=1))  # sums may cancel
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * largest)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of inf - inf
@pytest.mark.parametrize("shape", SHAPES)
def test_relu_and_bias(kernels: Any, shape: tuple[int, int], dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x, dy = special(rng, shape, dtype), special(rng, shape, dtype)
    bias = rng.standard_normal(shape[1]).astype(dtype)
    for accumulate in (False, True):
        start = rng.standard_normal(shape[1]).astype(dtype)
        results = []
        for backend in (kernels, REFERENCE):
            z, dbias, total = x.copy(), start.copy(), start.copy()
            y, mask = backend.bias_relu(z, bias)
            dz = backend.bias_relu_backward(dy, mask, dbias, accumulate=accumulate)
            backend.bias_grad(dy, total, accumulate=accumulate)
            only, of_only = backend.relu(x)
            results.append([y, dz, dbias, total, only, backend.relu_backward(dy, of_only)])
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_array_that_no_kernel_takes_is_left_to_numpy(dtype: Any) -> None:
    backend, rng = get_backend("numpy"), np.random.default_rng(2)
    x = special(rng, (6, 8), dtype)[:, ::2]
    y, mask = backend.relu(x)
    np.testing.assert_array_equal(y, REFERENCE.relu(x)[0])
    dy = np.asfortranarray(rng.standard_normal((6, 4)).astype(dtype))
    np.testing.assert_array_equal(backend.relu_backward(dy, mask), np.where(x > 0, dy, 0))
    _, mask = backend.relu(np.ascontiguousarray(x))  # the kernel's own mask, and NumPy's backward
    np.testing.assert_array_equal(backend.relu_backward(dy, mask), np.where(x > 0, dy, 0))


def test_the_best_kernels_are_in_use() -> None:
    cpu: Any = numpy_backend.CPU
    assert cpu.info()["instructions"] == instructions()[-1]


def test_biases_of_models_lie_apart_in_the_flat_vector(kernels: Any, dtype: Any) -> None:
    rng = np.random.default_rng(4)
    z, dy = (rng.standard_normal((3, 5, 7)).astype(dtype) for _ in range(2))
    bias = rng.standard_normal((3, 64)).astype(dtype)[:, 9:16]
    results = []
    for backend in (kernels, REFERENCE):
        flat = np.full((3, 64), 0.5, dtype)
        y, mask = backend.bias_relu(z.copy(), bias)
        shared, _ = backend.bias_relu(z.copy(), bias[1])
        dz = backend.bias_relu_backward(dy, mask, flat[:, 9:16], accumulate=True)
        backend.bias_grad(dy, flat[:, 20:27])
        results.append([y, shared, dz, flat])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (4, 2, 3), (9, 300, 33), (70, 5, 129), (7, 0, 5)]
)
@pytest.mark.parametrize("transposed", ["", "a", "b"])
def test_small_products(kernels: Any, m: int, k: int, n: int, transposed: str, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    a = rng.standard_normal((k, m) if transposed == "a" else (m, k)).astype(dtype)
    b = rng.standard_normal((n, k) if transposed == "b" else (k, n)).astype(dtype)
    a, b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
    expected = np.array([[sum(x * y for x, y in zip(r, c, strict=True)) for c in b.T] for r in a])
    out = np.full((m, n), np.nan, dtype)
    kernels.gemm(a, b, out)
    loose = 1e-4 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(out, expected.reshape(m, n), rtol=loose, atol=loose)
    twice = kernels.gemm(a, b, out.copy(), accumulate=True)
    np.testing.assert_allclose(twice, 2 * out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 3 * 4096 + 5])
def test_all_finite(kernels: Any, n: int, dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    a = np.random.default_rng(6).standard_normal(n).astype(dtype) * (np.finfo(dtype).max / 10)
    assert cpu.all_finite(a) is True
    for value in (np.nan, np.inf, -np.inf):
        for i in {0, n // 2, n - 1}:
            b = a.copy()
            b[i] = value
            assert cpu.all_finite(b) is False
    assert cpu.all_finite(a[::2]) is (None if n > 1 else True)
    assert cpu.all_finite(np.zeros(n, np.int64)) is None


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("transposed", ["", "a", "b"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(65, 90, 300), (500, 70, 33), (129, 130, 131), (3, 700, 900), (300, 3, 900)]
)
def test_large_products_in_parts(
    m: int, k: int, n: int, transposed: str, n_threads: int, dtype: Any
) -> None:
    cpu: Any = numpy_backend.CPU
    rng = np.random.default_rng(5)
    a = rng.standard_normal((k, m) if transposed == "a" else (m, k)).astype(dtype)
    b = rng.standard_normal((n, k) if transposed == "b" else (k, n)).astype(dtype)
    a, b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
    bias, out = rng.standard_normal(n).astype(dtype), np.full((m, n), np.nan, dtype)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    loose = 1e-3 if dtype == np.float32 else 1e-11
    with numpy_backend.THREADS.of(1 << 40):
        cpu.set_num_threads(n_threads)
        try:
            for accumulate, of, relu in (
                (False, expected, False),
                (True, 2 * expected, False),
                (False, np.maximum(expected + bias, 0), True),
                (False, expected + bias, False),
            ):
                shift = None if of is expected or accumulate else bias
                assert cpu.gemm(a, b, out, accumulate, shift, relu)
                np.testing.assert_allclose(out, of, rtol=loose, atol=loose)
        finally:
            cpu.set_num_threads(numpy_backend.THREADS.limit)


def test_products_of_models_one_by_one(dtype: Any) -> None:
    rng, backend = np.random.default_rng(6), get_backend("numpy")
    for m, k, n in ((5, 4, 3), (100, 80, 90)):
        x, shared = (rng.standard_normal(s).astype(dtype) for s in ((3, m, k), (m, k)))
        weight = rng.standard_normal((3, k, n)).astype(dtype)
        with numpy_backend.THREADS.of(1 << 40):
            for a in (x, shared):
                out = backend.gemm(a, weight, np.full((3, m, n), np.nan, dtype))
                np.testing.assert_allclose(out, a @ weight, rtol=1e-4, atol=1e-4)


def test_a_product_with_a_vector_is_left_to_numpy(dtype: Any) -> None:
    rng, backend = np.random.default_rng(7), get_backend("numpy")
    for m, k, n in ((1, 100, 90), (500, 600, 1)):
        a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
        bias, out = rng.standard_normal(n).astype(dtype), np.full((m, n), np.nan, dtype)
        with numpy_backend.THREADS.of(1 << 40):
            backend.affine(a, b, bias, out, relu=True)
        np.testing.assert_allclose(out, np.maximum(a @ b + bias, 0), rtol=1e-4, atol=1e-4)


def test_kernels_of_other_sources_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu: Any = numpy_backend.CPU
    assert cpu.interface() == numpy_backend.INTERFACE
    monkeypatch.delenv("NNX_DISABLE_CPU_KERNELS", raising=False)
    assert numpy_backend._load() is cpu
    for other in (
        SimpleNamespace(__file__="x.so"),
        SimpleNamespace(__file__="x.so", interface=int),
    ):
        monkeypatch.setitem(sys.modules, "nnx.backends._cpu", other)
        with pytest.warns(RuntimeWarning, match=r"x\.so were built from other sources"):
            assert numpy_backend._load() is None
