"""The CUDA kernels: compiled for every architecture, and each against its definition.

The definition is `XpBackend` on NumPy in float64; the loops in `oracles` check that one in turn.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx.backends import XpBackend, get_backend
from nnx.backends.base import Array, Groups
from nnx.backends.philox import words
from nnx.initializers import zeros
from nnx.layers import Linear

gpu = pytest.mark.gpu
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


@gpu
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    "file", ["relu.cu", "softmax_nll.cu", "dropout.cu", "optimizers.cu", "batch.cu"]
)
def test_nvrtc_compiles(file: str, arch: int) -> None:
    from cupy.cuda import nvrtc

    from nnx.backends.cupy_backend import source

    program = nvrtc.createProgram(source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, ("-std=c++17", f"--gpu-architecture=compute_{arch}"))
        assert nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)


def test_every_cuda_file_is_compiled_by_a_test() -> None:
    from importlib.resources import files

    found = {f.name for f in files("nnx.backends").joinpath("cuda").iterdir()}
    assert found == {
        "common.cuh",
        "relu.cu",
        "softmax_nll.cu",
        "dropout.cu",
        "optimizers.cu",
        "batch.cu",
    }


@pytest.mark.unpoisoned
def test_overrides_have_the_signature_of_their_definition() -> None:
    from nnx.backends.base import Backend
    from nnx.backends.cupy_backend import CupyBackend
    from nnx.backends.numpy_backend import NumpyBackend

    names = [n for n, f in vars(XpBackend).items() if inspect.isfunction(f) and n[0] != "_"]
    assert "softmax_nll" in names
    for name in names:
        expected = inspect.signature(getattr(XpBackend, name))
        for other in (Backend, NumpyBackend, CupyBackend):
            assert inspect.signature(getattr(other, name)) == expected, (other, name)


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


# ---- softmax and negative log-likelihood -------------------------------------------------------


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 31), (4, 32), (9, 33), (300, 10), (2, 1000)])
def test_softmax_nll(shape: tuple[int, int], dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    logits = (30 * rng.standard_normal(shape)).astype(dtype)
    labels = rng.integers(0, shape[1], shape[0])
    labels[0], labels[-1] = 0, shape[1] - 1
    weight = rng.uniform(0, 2, shape[0]).astype(dtype)
    weight[::3] = 0
    wide = np.float64
    options: list[dict[str, Any]] = [
        {},
        {"weight": weight},
        {"weight": weight, "normalizer": 3.5, "grad_scale": 7.0},
        {"normalizer": np.asarray(2.5, dtype), "grad_scale": np.asarray(0.25, dtype)},
        {"weight": np.zeros_like(weight)},
        {"need_gradient": False},
    ]
    for option in options:
        exact: dict[str, Any] = {
            k: v.astype(wide) if isinstance(v, np.ndarray) else v for k, v in option.items()
        }
        expected, gradient = REFERENCE.softmax_nll(logits.astype(wide), labels, **exact)
        there = {k: cuda.asarray(v) if isinstance(v, np.ndarray) else v for k, v in option.items()}
        loss, actual = cuda.softmax_nll(cuda.asarray(logits), cuda.asarray(labels), **there)
        close(loss, expected, dtype)
        if gradient is None:
            assert actual is None
        else:
            close(actual, gradient, dtype)


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (4, 32), (9, 33), (300, 10), (2, 1000)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("models", [None, 3])
def test_softmax_nll_with_options(
    shape: tuple[int, int], soft: bool, models: int | None, dtype: Any, rng: np.random.Generator
) -> None:
    cuda, wide = get_backend("cupy"), np.float64
    n, c = shape
    ignored = c // 2
    logits = (30 * rng.standard_normal(shape if models is None else (models, *shape))).astype(dtype)
    target = rng.integers(0, c, logits.shape[:-1])
    if soft:
        target = rng.uniform(0, 1, logits.shape).astype(dtype)
        target[..., ::3, :] = np.eye(c)[ignored]
    classes, weight = rng.uniform(0, 2, c).astype(dtype), rng.uniform(0, 2, n).astype(dtype)
    options: list[dict[str, Any]] = [
        {},
        {"class_weight": classes},
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"ignore_index": ignored},
        {"ignore_index": -100},
        {"weight": weight, "class_weight": classes, "ignore_index": ignored},
        {"class_weight": classes, "label_smoothing": 0.3, "ignore_index": 0, "normalizer": 2.5},
        {
            "weight": weight,
            "class_weight": classes,
            "label_smoothing": 0.3,
            "ignore_index": ignored,
            "grad_scale": 7.0,
        },
    ]
    for shared in (False, True) if models else (False,):
        t = target[0] if shared else target
        for option in options:
            exact: dict[str, Any] = {
                k: v.astype(wide) if isinstance(v, np.ndarray) else v for k, v in option.items()
            }
            expected, gradient = REFERENCE.softmax_nll(
                logits.astype(wide), t.astype(wide) if soft else t, **exact
            )
            there = {
                k: cuda.asarray(v) if isinstance(v, np.ndarray) else v for k, v in option.items()
            }
            loss, actual = cuda.softmax_nll(cuda.asarray(logits), cuda.asarray(t), **there)
            close(loss, expected, dtype)
            close(actual, gradient, dtype)


@gpu
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_nll_with_options_repeats_bit_for_bit(soft: bool, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    logits = cuda.asarray(rng.standard_normal((513, 7)), np.float32)
    target = rng.uniform(0, 1, (513, 7)).astype(np.float32) if soft else rng.integers(0, 7, 513)
    target = cuda.asarray(target)
    options = {
        "weight": cuda.asarray(rng.uniform(0, 1, 513), np.float32),
        "class_weight": cuda.asarray(rng.uniform(0, 1, 7), np.float32),
    }
    runs = [cuda.softmax_nll(logits, target, label_smoothing=0.1, **options) for _ in range(3)]
    assert len({float(loss) for loss, _ in runs}) == 1
    assert len({cuda.to_numpy(gradient).tobytes() for _, gradient in runs}) == 1


@gpu
def test_softmax_nll_extremes(dtype: Any) -> None:
    cuda = get_backend("cupy")
    logits = np.array(
        [[1e4, 9992, -1e4], [-1e4, 1e4, 0], [-np.inf, 0, 0], [0, 0, 0], [1, np.nan, 0]], dtype
    )
    labels = np.array([0, 0, 1, 3, 2])
    for i in range(5):
        row, label = logits[i : i + 1], labels[i : i + 1]
        expected, gradient = REFERENCE.softmax_nll(row.astype(np.float64), label)
        loss, actual = cuda.softmax_nll(cuda.asarray(row), cuda.asarray(label))
        close(loss, expected, dtype)
        close(actual, gradient, dtype)
        assert np.isnan(expected) == (i >= 3)  # a label out of range, and a NaN


@gpu
def test_softmax_nll_of_many_models(dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    logits = rng.standard_normal((4, 37, 5)).astype(dtype)
    for labels in (rng.integers(0, 5, 37), rng.integers(0, 5, (4, 37))):
        for weight in (None, rng.uniform(0, 1, labels.shape).astype(dtype)):
            wide = None if weight is None else weight.astype(np.float64)
            there = None if weight is None else cuda.asarray(weight)
            expected, gradient = REFERENCE.softmax_nll(logits.astype(np.float64), labels, wide)
            loss, actual = cuda.softmax_nll(cuda.asarray(logits), cuda.asarray(labels), there)
            close(loss, expected, dtype)
            close(actual, gradient, dtype)


@gpu
def test_softmax_nll_repeats_bit_for_bit(rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    logits = cuda.asarray(rng.standard_normal((513, 7)), np.float32)
    labels = cuda.asarray(rng.integers(0, 7, 513))
    losses = {float(cuda.softmax_nll(logits, labels)[0]) for _ in range(3)}
    assert len(losses) == 1


# ---- dropout, optimizers, data -----------------------------------------------------------------


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


def _optimizer_calls() -> list[tuple[str, int, dict[str, Any]]]:
    return [
        ("sgd", 0, {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
        ("sgd", 1, {"momentum": 0.9, "nesterov": False, "weight_decay": 0.1}),
        ("sgd", 1, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("adam", 2, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}),
        ("adam", 2, {"beta1": 0.0, "beta2": 0.5, "eps": 1e-3, "weight_decay": 0.0}),
    ]


@gpu
@pytest.mark.parametrize(("name", "n_slots", "options"), _optimizer_calls())
@pytest.mark.parametrize("n_models", [1, 3])
def test_optimizers(
    name: str,
    n_slots: int,
    options: dict[str, Any],
    n_models: int,
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    cuda = get_backend("cupy")
    size, n_steps = 64 * 7, 3
    runs = [(0, 128, 1.0, 1.0), (128, 192, 0.0, 1.0), (192, 448, 0.5, 0.0)]
    start = [rng.standard_normal((n_models, size)) for _ in range(1 + n_slots)]
    start[-1] = np.abs(start[-1])  # second moments are not negative
    gradients = rng.standard_normal((n_steps, n_models, size))
    losses = rng.standard_normal((n_steps, n_models))
    rates = np.array([0.1, 0.05, 0.2])

    def train(backend: Any, kind: Any) -> tuple[list[Array], Any]:
        arrays = [backend.asarray(a.copy(), kind) for a in start]
        slots = arrays[1:] or [None]
        state, groups = backend.step_state(), Groups(runs, backend)
        state.plan(rates, dtype=kind, n_models=n_models)
        for gradient, loss in zip(gradients, losses, strict=True):
            g, value = backend.asarray(gradient, kind), backend.asarray(loss, kind)
            getattr(backend, name)(arrays[0], g, *slots, groups, state, value, **options)
        return arrays, state

    expected, _ = train(REFERENCE, np.float64)
    actual, state = train(cuda, dtype)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(cuda.to_numpy(a), e, rtol=20 * TOLERANCE[dtype][0], atol=1e-6)
        assert a.dtype == dtype
    close(state.log, losses.astype(dtype), dtype, exact=True)
    assert cuda.to_numpy(state.counters).tolist() == [n_steps, n_steps]
    assert (state.number, state.position) == (n_steps, n_steps)
    frozen = cuda.to_numpy(actual[0])[:, 128:192]
    np.testing.assert_array_equal(frozen, start[0][:, 128:192].astype(dtype))


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


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (33, 31), (9, 33), (70, 100)])
def test_count_correct(shape: tuple[int, int], dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    scores = rng.integers(0, 4, (2, *shape)).astype(dtype)  # many ties: the first counts
    scores[0, ::5, -1] = np.nan
    scores[1, ::4, 0] = -np.inf
    labels = scores.argmax(axis=-1)
    labels[:, ::3] = 0
    total = cuda.xp.full(2, 100, np.int64)
    cuda.count_correct(cuda.asarray(scores), cuda.asarray(labels), total)
    expected = 100 + (scores.argmax(axis=-1) == labels).sum(axis=-1)
    close(total, expected, np.dtype(np.int64), exact=True)
    one = cuda.xp.zeros((), np.int64)
    cuda.count_correct(cuda.asarray(scores[0]), cuda.asarray(labels[0]), one)
    assert int(one) == expected[0] - 100


# ---- the launch helper -------------------------------------------------------------------------


@gpu
def test_the_launch_helper_refuses_what_a_kernel_would_misread() -> None:
    cuda: Any = get_backend("cupy")
    xp = cuda.xp
    f32, f64 = np.dtype(np.float32), np.dtype(np.float64)
    x, mask = xp.zeros(64, f32), xp.zeros(2, np.uint32)
    wide = xp.zeros(64, f64)

    def launch(y: Any, m: Any, x: Any, n: int = 64) -> Callable[[], None]:
        return lambda: cuda._launch("relu", f32, n, (y, n), (m, 2), (x, n), n)

    for call, error, message in [
        (launch(x, mask, wide), TypeError, "float32, got float64"),
        (launch(x, mask.astype(np.int32), x), TypeError, "uint32, got int32"),
        (launch(x, mask, x[:63]), ValueError, "64 elements, got .63,"),
        (launch(xp.zeros(128, f32)[::2], mask, x), ValueError, "contiguous output"),
    ]:
        with pytest.raises(error, match=message):
            call()
    launch(x, mask, x)()


@gpu
def test_no_kernel_is_compiled_before_it_is_used() -> None:
    import subprocess
    import sys

    code = (
        "import nnx, nnx.backends.cupy_backend as c; nnx.get_backend('cupy');"
        "assert c._load.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@gpu
def test_the_whole_step_is_free_of_data_races(rng: np.random.Generator) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    cuda = get_backend("cupy")
    layer = Linear(5, 33, initializer=zeros).to(cuda)
    logits = cuda.asarray(rng.standard_normal((9, 5)), np.float32)
    labels = cuda.asarray(rng.integers(0, 5, 9))
    assert layer.bias is not None
    state = cuda.step_state()
    state.plan(np.full(4, 0.1), dtype=np.dtype(np.float32), order=np.arange(9))
    flat = cuda.xp.zeros((1, 640), np.float32)
    groups = Groups([(0, 640, 1.0, 1.0)], cuda)
    total = cuda.xp.zeros((), np.int64)
    cuda.softmax_nll(logits, labels)  # compiled, and its ticket made
    with cudasim.option("racecheck", 1):
        z = cuda.asarray(rng.standard_normal((9, 33)), np.float32)
        y, mask = cuda.bias_relu(z, layer.bias.value)
        cuda.bias_relu_backward(y, mask, layer.bias.grad)
        loss, _ = cuda.softmax_nll(logits, labels)
        soft = cuda.asarray(rng.uniform(0, 1, logits.shape), np.float32)
        for target in (labels, soft):
            cuda.softmax_nll(
                logits, target, class_weight=soft[0], label_smoothing=0.1, ignore_index=1
            )
        cuda.dropout(y, 0.5, seed=0, stream=0, use=0, state=state)
        cuda.gather_rows([logits, labels], state, 3, 3)
        cuda.count_correct(logits, labels, total)
        m, v = cuda.xp.zeros_like(flat), cuda.xp.zeros_like(flat)
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        cuda.adam(flat, flat, m, v, groups, state, loss[None], **options)
        cuda.synchronize()
