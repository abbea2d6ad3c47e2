"""Matrix products: one door, on NumPy and by cuBLAS, for every shape and stride that occurs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx.backends import Backend, BackendUnavailable, get_backend
from nnx.backends.base import Array

gpu = pytest.mark.gpu
View = Callable[[Array], Array]

# An operand (M, K) laid out in memory as (rows, columns), and the view of it that is multiplied.
LAYOUTS: dict[str, tuple[Callable[[int, int], tuple[int, ...]], View]] = {
    "rows": (lambda m, k: (m, k), lambda x: x),
    "transposed": (lambda m, k: (k, m), lambda x: x.T),
    "part of wider rows": (lambda m, k: (m, k + 3), lambda x: x[:, 2:-1]),
    "transposed part": (lambda m, k: (k, m + 3), lambda x: x[:, 1:-2].T),
    "every other row": (lambda m, k: (2 * m, k), lambda x: x[::2]),
    "every other column": (lambda m, k: (m, 2 * k), lambda x: x[:, ::2]),
    "backwards": (lambda m, k: (m, k), lambda x: x[::-1]),
}


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b` by sums of products in float64, one output element after the other."""
    m, k = a.shape
    out = np.zeros((m, b.shape[1]))
    for i in range(m):
        for j in range(b.shape[1]):
            out[i, j] = sum(float(a[i, t]) * float(b[t, j]) for t in range(k))
    return out


def close(actual: Array, expected: np.ndarray, dtype: Any, depth: int) -> None:
    rtol, atol = (1.3e-6, 1e-5) if dtype == np.float32 else (1e-13, 1e-13)
    scale = max(depth, 1) ** 0.5
    np.testing.assert_allclose(actual, expected, rtol=scale * rtol, atol=scale * atol)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 1), (1, 7, 4), (4, 1, 3), (9, 33, 6)], ids=str)
@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
def test_products_of_all_layouts(
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    size: tuple[int, int, int],
    a_layout: str,
    b_layout: str,
    accumulate: bool,
) -> None:
    m, k, n = size
    (a_shape, a_view), (b_shape, b_view) = LAYOUTS[a_layout], LAYOUTS[b_layout]
    a = rng.standard_normal(a_shape(m, k)).astype(dtype)
    b = rng.standard_normal(b_shape(k, n)).astype(dtype)
    start = rng.standard_normal((m, n)) if accumulate else np.full((m, n), np.nan)
    a_there, b_there, out = (backend.asarray(x) for x in (a, b, start.astype(dtype)))
    assert backend.gemm(a_view(a_there), b_view(b_there), out, accumulate=accumulate) is out
    expected = product(a_view(a), b_view(b))
    if accumulate:
        expected += start.astype(dtype)
    close(backend.to_numpy(out), expected, dtype, k)
    np.testing.assert_array_equal(backend.to_numpy(a_there), a)  # inputs are only read
    np.testing.assert_array_equal(backend.to_numpy(b_there), b)


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_parts_of_one_flat_vector(
    backend: Backend, dtype: Any, rng: np.random.Generator, accumulate: bool
) -> None:
    """K models: weights (K, n_in, n_out) are views of (K, P), and their gradients too."""
    n_models, n, n_in, n_out = 3, 5, 4, 6
    flat = rng.standard_normal((n_models, 64)).astype(dtype)
    x = rng.standard_normal((n_models, n, n_in)).astype(dtype)
    dy = rng.standard_normal((n_models, n, n_out)).astype(dtype)
    there = backend.asarray(flat.copy())
    weight = there[:, 7 : 7 + n_in * n_out].reshape(n_models, n_in, n_out)
    gradient = there[:, 33 : 33 + n_in * n_out].reshape(n_models, n_in, n_out)
    assert weight.base is not None
    old = flat[:, 33 : 33 + n_in * n_out].reshape(n_models, n_in, n_out)
    for shared in (False, True):
        x_there = backend.asarray(x[0] if shared else x)
        y = backend.asarray(np.full((n_models, n, n_out), np.nan, dtype))
        backend.gemm(x_there, weight, y)
        for i in range(n_models):
            w = flat[i, 7 : 7 + n_in * n_out].reshape(n_in, n_out)
            close(backend.to_numpy(y)[i], product(x[0 if shared else i], w), dtype, n_in)
        there[...] = backend.asarray(flat)
        dy_there = backend.asarray(dy)
        backend.gemm(x_there.swapaxes(-1, -2), dy_there, gradient, accumulate=accumulate)
        for i in range(n_models):
            expected = product(x[0 if shared else i].T, dy[i]) + (old[i] if accumulate else 0)
            close(backend.to_numpy(gradient)[i], expected, dtype, n)
        dx = backend.asarray(np.full((n_models, n, n_in), np.nan, dtype))
        backend.gemm(dy_there, weight.swapaxes(-1, -2), dx)
        for i in range(n_models):
            w = flat[i, 7 : 7 + n_in * n_out].reshape(n_in, n_out)
            close(backend.to_numpy(dx)[i], product(dy[i], w.T), dtype, n_out)


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [
        ((0, 3), (3, 2), (0, 2)),
        ((4, 3), (3, 0), (4, 0)),
        ((4, 0), (0, 2), (4, 2)),
        ((2, 4, 0), (2, 0, 3), (2, 4, 3)),
        ((0, 4, 2), (0, 2, 3), (0, 4, 3)),
    ],
)
def test_empty_products(backend: Backend, dtype: Any, a: Any, b: Any, out: Any) -> None:
    """No rows is nothing to do; a sum of no terms is 0, or adds nothing."""
    x, w = (backend.asarray(np.zeros(shape, dtype)) for shape in (a, b))
    y = backend.asarray(np.full(out, np.nan, dtype))
    backend.gemm(x, w, y)
    np.testing.assert_array_equal(backend.to_numpy(y), np.zeros(out))
    y = backend.asarray(np.full(out, 3, dtype))
    backend.gemm(x, w, y, accumulate=True)
    np.testing.assert_array_equal(backend.to_numpy(y), np.full(out, 3))


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [
        ((2, 3), (4, 5), (2, 5)),
        ((2, 3), (3, 5), (2, 4)),
        ((2, 3), (3, 5), (3, 5)),
        ((2, 4, 3), (3, 3, 5), (2, 4, 5)),
        ((2, 4, 3), (2, 3, 5), (4, 5)),
    ],
)
def test_shapes_of_no_product_are_refused(backend: Backend, a: Any, b: Any, out: Any) -> None:
    x, w, y = (backend.asarray(np.ones(shape, np.float32)) for shape in (a, b, out))
    with pytest.raises(ValueError, match=r"\d"):
        backend.gemm(x, w, y)


@gpu
def test_mixed_dtypes_are_refused() -> None:
    """Read as they are, float64 would be pairs of float32."""
    cuda = get_backend("cupy")
    x, y = (cuda.asarray(np.ones((2, 2), kind)) for kind in (np.float32, np.float64))
    for a, b, out in ((x, x, y), (x, y, x), (y, x, x)):
        with pytest.raises(TypeError, match="float64"):
            cuda.gemm(a, b, out)


@gpu
def test_nan_in_the_output_does_not_leak_and_in_an_operand_does(dtype: Any) -> None:
    cuda = get_backend("cupy")
    a, b = cuda.asarray(np.eye(3, dtype=dtype)), cuda.asarray(np.ones((3, 2), dtype))
    out = cuda.asarray(np.full((3, 2), np.nan, dtype))
    cuda.gemm(a, b, out)
    np.testing.assert_array_equal(cuda.to_numpy(out), np.ones((3, 2)))
    b[1, 1] = np.nan
    cuda.gemm(a, b, out)
    assert np.isnan(cuda.to_numpy(out)[:, 1]).all()
    assert not np.isnan(cuda.to_numpy(out)[:, 0]).any()


@gpu
@pytest.mark.unpoisoned
def test_a_product_is_one_call_and_asks_for_nothing(rng: np.random.Generator) -> None:
    """Accumulation, transposes, and models with strided weights included."""
    import cupy

    cudasim = pytest.importorskip("cudasim", reason="calls are counted by the simulator")
    cuda = get_backend("cupy")
    flat = cuda.asarray(rng.standard_normal((3, 64)), np.float32)
    weight = flat[:, :24].reshape(3, 4, 6)
    x, y = cuda.xp.ones((3, 5, 4), np.float32), cuda.xp.ones((3, 5, 6), np.float32)
    requests: list[int] = []

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "requests"

        def malloc_preprocess(self, device_id: int, size: int, mem_size: int) -> None:
            requests.append(size)

    cuda.gemm(x, weight, y)  # makes the handle
    cuda.synchronize()
    cudasim.reset()
    with Hook():
        cuda.gemm(x, weight, y)
        cuda.gemm(y, weight.swapaxes(-1, -2), x)
        cuda.gemm(x.swapaxes(-1, -2), y, weight, accumulate=True)
    waits = cudasim.stats()["sync"]["total"]
    cuda.synchronize()
    stats = cudasim.stats()
    assert (stats["cublas"]["calls"], stats["kernel_launches"], waits) == (3, 0, 0)
    assert not requests


@gpu
def test_products_are_right_on_a_stream_of_ones_own(rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    a = rng.standard_normal((17, 9)).astype(np.float32)
    stream = cuda.xp.cuda.Stream(non_blocking=True)
    there = cuda.asarray(a)
    cuda.synchronize()
    with stream:
        out = cuda.xp.empty((17, 17), np.float32)
        cuda.gemm(there, there.T, out)
    stream.synchronize()
    close(cuda.to_numpy(out), product(a, a.T), np.float32, 9)


@gpu
def test_without_a_handle_products_run_by_cupy(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from nnx.backends import cublas, cupy_backend

    class Absent:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"no symbol {name}")

    cuda = cupy_backend.CupyBackend(0)
    monkeypatch.setattr(cublas, "_library", Absent)
    a = rng.standard_normal((3, 4)).astype(np.float32)
    x, out = cuda.asarray(a), cuda.xp.zeros((3, 3), np.float32)
    monkeypatch.setenv("NNX_STRICT", "1")
    with pytest.raises(BackendUnavailable, match="no symbol cublasCreate_v2"):
        cuda.gemm(x, x.T, out)
    monkeypatch.delenv("NNX_STRICT")
    with pytest.warns(RuntimeWarning, match="no symbol cublasCreate_v2"):
        cuda.gemm(x, x.T, out)
    close(cuda.to_numpy(out), product(a, a.T), np.float32, 4)
    cuda.gemm(x, x.T, out, accumulate=True)  # warns once
    close(cuda.to_numpy(out), 2 * product(a, a.T), np.float32, 4)


@gpu
def test_a_handle_has_room_in_what_the_pool_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuBLAS asks the device, where nothing is left if CuPy's pool holds it all, in use or not."""
    from nnx.backends import cublas, cupy_backend

    cuda = cupy_backend.CupyBackend(0)
    pool, library = cuda.xp.get_default_memory_pool(), cublas._library()

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def cublasCreate_v2(self, handle: Any) -> int:
            return 1 if pool.total_bytes() >= kept else int(library.cublasCreate_v2(handle))

    monkeypatch.setattr(cublas, "_library", Full)
    x = cuda.xp.ones((2, 2), np.float32)
    cuda.xp.empty(2**23)  # the pool keeps it
    kept = pool.total_bytes()
    close(cuda.to_numpy(cuda.gemm(x, x, cuda.xp.empty_like(x))), np.full((2, 2), 2), np.float32, 2)


@gpu
def test_what_cublas_refuses_is_named() -> None:
    from nnx.backends import cublas

    cuda: Any = get_backend("cupy")
    x = cuda.xp.zeros((2, 2), np.float32)
    cuda.gemm(x, x, cuda.xp.zeros((2, 2), np.float32))
    p = cublas.plan((2, 2), (8, 4), (2, 2), (8, 4), (2, 2), (8, 4), 4)
    assert p is not None
    with pytest.raises(cublas.CublasError, match=r"\(2, 2\) @ \(2, 2\).*status 7 \(invalid value"):
        cuda._cublas().gemm(p._replace(b_step=1), *[x.data.ptr] * 3, x.dtype, False)


@gpu
@pytest.mark.parametrize(
    ("asked", "expected"), [("0", False), ("1", True), ("2", True), ("", False), ("on", False)]
)
def test_tf32_only_on_request(
    asked: str, expected: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from nnx.backends import cublas, cupy_backend

    monkeypatch.setenv("CUPY_TF32", asked)
    cuda: Any = cupy_backend.CupyBackend(0)
    constants = cuda._cublas()._constants
    assert (constants[np.dtype(np.float32)].compute == 77) is expected
    assert constants[np.dtype(np.float64)].compute == 70
    assert cublas.tf32() is expected
