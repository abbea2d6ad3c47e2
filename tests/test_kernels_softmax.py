"""Kernels of losses and metrics: softmax with negative log-likelihood, right answers counted."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_cases import (
    REFERENCE,
    close,
    extreme_rows,
    same_bits_on_every_grid,
    send,
    special,
    traffic,
)
from oracles import cross_entropy

from nnx.backends import Backend, get_backend
from nnx.backends.arena import Arena
from nnx.backends.base import Array

gpu = pytest.mark.gpu
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


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


# ---- one test for each way that a row can go ---------------------------------------------------


def to_device(a: Any) -> Any:
    return get_backend("cupy").asarray(a) if isinstance(a, np.ndarray) else a


def check(
    logits: np.ndarray, target: np.ndarray, send: Callable[[Any], Any] = to_device, **options: Any
) -> None:
    """Compare the kernels with the definition in float64; the inputs stay as they were."""
    exact: dict[str, Any] = {
        k: v.astype(F64) if isinstance(v, np.ndarray) else v for k, v in options.items()
    }
    wide = target if target.dtype.kind == "i" else target.astype(F64)
    loss, gradient = REFERENCE.softmax_nll(logits.astype(F64), wide, **exact)
    there = [send(logits), send(target)]
    found = get_backend("cupy").softmax_nll(*there, **{k: send(v) for k, v in options.items()})
    close(found[0], loss, logits.dtype)
    if gradient is None:
        assert found[1] is None
    else:
        close(found[1], gradient, logits.dtype)
    for before, after in zip((logits, target), there, strict=True):
        np.testing.assert_array_equal(get_backend("cupy").to_numpy(after), before)


def options_for(shape: tuple[int, int], dtype: Any, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "weight": rng.uniform(0, 2, shape[0]).astype(dtype),
        "class_weight": rng.uniform(0, 2, shape[1]).astype(dtype),
        "label_smoothing": 0.3,
        "ignore_index": shape[1] // 2,
        "grad_scale": 7.0,
    }


def last_widths(dtype: Any, soft: bool) -> tuple[int, int]:
    """Of the rows that lanes of a warp take, and of those that are staged."""
    from nnx.backends.cupy_backend import _softmax_kernel

    widths = range(1, 20000)
    names = [_softmax_kernel(width, dtype.itemsize, soft)[0] for width in widths]
    assert names == sorted(names, key=["softmax_nll", "softmax_nll_wide", "softmax_nll_long"].index)
    return names.count("softmax_nll"), 19999 - names.count("softmax_nll_long")


@gpu
def test_a_row_goes_by_its_width() -> None:
    # 47 KiB of shared memory for 8 rows of a block, or for one, with 16 bytes to align each array
    assert last_widths(F32, False) == (1024, 12024)
    assert last_widths(F64, False) == (751, 6012)
    assert last_widths(F32, True) == (751, 6008)
    assert last_widths(F64, True) == (375, 3004)


WIDTHS = [1, 2, 3, 31, 32, 33, 751, 752, 1023, 1024, 1025, 6012, 6013, 12024, 12025, 50257]


@gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_softmax_nll_of_labels_at_every_width(
    width: int, dtype: Any, rng: np.random.Generator
) -> None:
    shape = (3, width)
    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    labels = np.array([0, width - 1, width // 3])
    check(logits, labels)
    check(logits, labels, **options_for(shape, dtype, rng))
    check(logits, labels, need_gradient=False)


@gpu
@pytest.mark.parametrize("width", [1, 33, 375, 376, 751, 752, 3004, 3005, 6008, 6009, 20011])
def test_softmax_nll_of_soft_targets_at_every_width(
    width: int, dtype: Any, rng: np.random.Generator
) -> None:
    shape = (3, width)
    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    target = rng.dirichlet(np.ones(width), 3).astype(dtype)
    target[1] = np.arange(width) == width // 2
    check(logits, target)
    check(logits, target, **options_for(shape, dtype, rng))


@gpu
@pytest.mark.parametrize("shape", [(33, 10), (3, 1025), (2, 12025)])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_nll_agrees_with_the_loops(
    shape: tuple[int, int], soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    labels = rng.integers(0, shape[1], shape[0])
    target = rng.dirichlet(np.ones(shape[1]), shape[0]).astype(dtype) if soft else labels
    options = options_for(shape, dtype, rng)
    loss, gradient = cross_entropy(logits, target, **options)
    there = {k: to_device(v) for k, v in options.items()}
    found = cuda.softmax_nll(to_device(logits), to_device(target), **there)
    close(found[0], np.asarray(loss), dtype)
    close(found[1], gradient, dtype)


@gpu
@pytest.mark.parametrize("shape", [(300, 10), (5, 33), (7, 1), (3, 1027), (2, 13001)])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_softmax_nll_of_rows_that_begin_anywhere(
    shape: tuple[int, int], offset: int, dtype: Any, rng: np.random.Generator
) -> None:
    def unaligned(a: Any) -> Any:
        return send(a, offset) if isinstance(a, np.ndarray) else a

    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    check(logits, rng.integers(0, shape[1], shape[0]), unaligned)
    target = rng.dirichlet(np.ones(shape[1]), shape[0]).astype(dtype)
    check(logits, target, unaligned, **options_for(shape, dtype, rng))


@gpu
@pytest.mark.parametrize("layout", ["transposed", "strided", "broadcast"])
def test_softmax_nll_of_other_layouts(layout: str, dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    views = {
        "transposed": lambda: cuda.asarray(rng.standard_normal((33, 9)), dtype).T,
        "strided": lambda: cuda.asarray(rng.standard_normal((18, 66)), dtype)[::2, ::2],
        "broadcast": lambda: cuda.xp.broadcast_to(
            cuda.asarray(rng.standard_normal(33), dtype), (9, 33)
        ),
    }
    logits, labels = views[layout](), rng.integers(0, 33, 9)
    host = cuda.to_numpy(logits)
    loss, gradient = REFERENCE.softmax_nll(host.astype(F64), labels)
    found = cuda.softmax_nll(logits, cuda.asarray(labels))
    close(found[0], loss, dtype)
    close(found[1], gradient, dtype)


@gpu
@pytest.mark.parametrize("width", [5, 40, 1500, 12500])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_nll_of_extreme_rows(
    width: int, soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    label = width // 2
    target = np.array([label])
    if soft:
        target = (np.arange(width) == label)[None].astype(dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        for logits in extreme_rows(width, label, dtype).values():
            check(logits, target)
            check(logits, target, label_smoothing=0.1)
        logits[0, ::2] = -math.inf  # half of it; the sums begin and end with one
        check(logits, target)
    for wrong in (-1, width, -(2**63), 2**63 - 1):
        loss, gradient = get_backend("cupy").softmax_nll(
            to_device(np.zeros((1, width), dtype)), to_device(np.array([wrong]))
        )
        assert np.isnan(float(loss))
        assert np.isnan(get_backend("cupy").to_numpy(gradient)).all()


@gpu
def test_a_small_loss_keeps_its_digits(dtype: Any) -> None:
    """log(1 + exp(-8)): `max + log(sum) - z` would be left with no digit at 1e4 in float32."""
    for width in (10, 1500, 12500):
        logits = np.full((1, width), -math.inf, dtype)
        logits[0, [1, 3]] = 1e4 - 8, 1e4
        check(logits, np.array([3]))


@gpu
@pytest.mark.parametrize("width", [7, 1100, 12100])
def test_every_way_repeats_bit_for_bit_and_models_do_not_mix(
    width: int, dtype: Any, rng: np.random.Generator
) -> None:
    cuda, (k, n) = get_backend("cupy"), (3, 300 if width == 7 else 5)
    logits = cuda.asarray(rng.standard_normal((k, n, width)), dtype)
    labels = cuda.asarray(rng.integers(0, width, (k, n)))
    loss, gradient = (cuda.to_numpy(a) for a in cuda.softmax_nll(logits, labels))
    for i in range(k):
        for _ in range(2):
            one, its = cuda.softmax_nll(logits[i].copy(), labels[i])
            np.testing.assert_array_equal(cuda.to_numpy(one), loss[i])
            np.testing.assert_array_equal(cuda.to_numpy(its), gradient[i])


@gpu
@pytest.mark.parametrize("shape", [(600, 10), (5, 1100), (4, 12100)])
def test_softmax_nll_does_not_depend_on_the_grid(
    shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    logits = to_device(rng.standard_normal(shape).astype(dtype))
    labels = to_device(rng.integers(0, shape[1], shape[0]))
    options: dict[str, Any] = {}
    if shape[0] == 600:  # enough rows for several blocks of the kernel of the weights
        options = {k: to_device(v) for k, v in options_for(shape, dtype, rng).items()}
    same_bits_on_every_grid(lambda: get_backend("cupy").softmax_nll(logits, labels, **options))


@gpu
def test_many_rows_are_summed_in_parts(
    dtype: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 4 parts where else there are up to 4,096: a block takes several tiles."""
    monkeypatch.setattr("nnx.backends.cupy_backend._PARTS", 4)
    for shape in ((300, 10), (1100, 3), (37, 40), (11, 1025)):
        logits = rng.standard_normal(shape).astype(dtype)
        labels, weight = rng.integers(0, shape[1], shape[0]), rng.uniform(0, 1, shape[0])
        check(logits, labels, weight=weight.astype(dtype))


@gpu
def test_softmax_nll_of_no_rows(dtype: Any) -> None:
    cuda = get_backend("cupy")
    loss, gradient = cuda.softmax_nll(cuda.xp.zeros((0, 5), dtype), cuda.xp.zeros(0, np.int64))
    close(loss, np.zeros(()), dtype)
    close(gradient, np.zeros((0, 5)), dtype)


@gpu
def test_a_row_of_2_to_the_20_classes(rng: np.random.Generator) -> None:
    check(rng.standard_normal((2, 2**20)).astype(np.float32), np.array([2**20 - 1, 5]))


# The least that can be moved: logits in, gradient out, 8 bytes of label for each row, the loss.
# Rows beyond shared memory are read twice.
@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("shape", "dtype", "kernel", "reads"),
    [
        ((512, 10), F32, "softmax_nll_f32", 1),
        ((128, 1000), F32, "softmax_nll_f32", 1),
        ((512, 10), F64, "softmax_nll_f64", 1),
        ((16, 700), F64, "softmax_nll_f64", 1),
        ((8, 8192), F32, "softmax_nll_wide_f32", 1),
        ((4, 5001), F64, "softmax_nll_wide_f64", 1),
        ((8, 32768), F32, "softmax_nll_long_f32", 2),
        ((3, 50257), F32, "softmax_nll_long_f32", 2),
        ((2, 2**18), F32, "softmax_nll_long_f32", 2),
        ((2, 2**14), F64, "softmax_nll_long_f64", 2),
    ],
)
def test_bytes_of_softmax_nll(
    shape: tuple[int, int], dtype: Any, kernel: str, reads: int, rng: np.random.Generator
) -> None:
    pytest.importorskip("cudasim", reason="bytes are counted by the simulated device")
    logits = to_device(rng.standard_normal(shape).astype(dtype))
    labels = to_device(rng.integers(0, shape[1], shape[0]))
    moved = traffic(lambda: get_backend("cupy").softmax_nll(logits, labels))
    least = (reads + 1) * logits.nbytes + labels.nbytes + dtype.itemsize
    assert moved == {kernel: pytest.approx(least, rel=0.1)}


# Soft targets come in too, and the weights are a launch of their own: 8 bytes of label and 4 of
# weight for each row.
@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(("shape", "reads"), [((512, 10), 1), ((8, 6000), 1), ((2, 2**15), 2)])
def test_bytes_of_softmax_nll_with_options(
    shape: tuple[int, int], reads: int, rng: np.random.Generator
) -> None:
    pytest.importorskip("cudasim", reason="bytes are counted by the simulated device")
    cuda = get_backend("cupy")
    logits = to_device(rng.standard_normal(shape).astype(F32))
    target = to_device(rng.dirichlet(np.ones(shape[1]), shape[0]).astype(F32))
    (moved,) = traffic(lambda: cuda.softmax_nll(logits, target)).values()
    assert moved <= 1.1 * ((2 * reads + 1) * logits.nbytes + 4)
    labels, weight = to_device(rng.integers(0, 10, 4096)), to_device(np.ones(4096, F32))
    logits = to_device(rng.standard_normal((4096, 10)).astype(F32))
    moved = traffic(lambda: cuda.softmax_nll(logits, labels, weight))["softmax_nll_weight_f32"]
    assert moved <= 1.1 * (labels.nbytes + weight.nbytes + 4)


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_softmax_nll_asks_for_no_memory_whatever_it_is_given(
    kind: Any, rng: np.random.Generator
) -> None:
    from test_gpu_step import counted, quiet

    cuda = get_backend("cupy")
    logits = to_device(rng.standard_normal((9, 5)).astype(F32))
    labels, weight = to_device(rng.integers(0, 5, 9).astype(kind)), to_device(np.ones(9, kind))
    scale, arena = to_device(np.array(2.0)), Arena(cuda.xp)
    for _ in range(3):
        with counted() as counts, arena.step(0):
            loss, _ = cuda.softmax_nll(logits, labels, weight, grad_scale=scale, ignore_index=3)
    quiet(counts)
    expected, _ = REFERENCE.softmax_nll(
        cuda.to_numpy(logits).astype(F64), cuda.to_numpy(labels).astype(np.int64), ignore_index=3
    )
    close(loss, expected, F32)


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(9, 3), (9, 33), (2, 1025), (2, 12025)])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_nll_is_free_of_races(
    shape: tuple[int, int], soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    logits = rng.standard_normal(shape).astype(dtype)
    labels = rng.integers(0, shape[1], shape[0])
    target = rng.dirichlet(np.ones(shape[1]), shape[0]).astype(dtype) if soft else labels
    check(logits, target, **options_for(shape, dtype, rng))
    with cudasim.option("racecheck", 1):
        check(logits, target)
        check(logits, target, **options_for(shape, dtype, rng))


# ---- metrics -----------------------------------------------------------------------------------


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


def in_order(row: list[float]) -> list[int]:
    """Classes, the largest score first; of equal ones the lower class, NaN before numbers."""
    keys = [(0, 0.0) if math.isnan(a) else (1, -a) for a in row]
    return sorted(range(len(row)), key=keys.__getitem__)


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (33, 31), (9, 33), (1100, 3), (3, 1600)])
@pytest.mark.parametrize("models", [None, 2])
def test_count_correct_among_k_with_labels_to_ignore(
    backend: Backend,
    shape: tuple[int, int],
    models: int | None,
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    n, c = shape
    scores = special(rng, shape if models is None else (models, n, c), dtype).round(1)
    labels = rng.integers(-1, c + 1, scores.shape[:-1])
    there = backend.asarray(scores)
    orders = [in_order(row) for row in scores.reshape(-1, c).tolist()]
    flat = labels.reshape(-1).tolist()
    for k in (1, 2, c + 1):
        right = [label in order[:k] for order, label in zip(orders, flat, strict=True)]
        expected = np.reshape(right, labels.shape)
        total = backend.asarray(np.full(scores.shape[:-2], 100))
        backend.count_correct(there, backend.asarray(labels), total, k=k)
        np.testing.assert_array_equal(backend.to_numpy(total), 100 + expected.sum(axis=-1))
        total = backend.asarray(np.full((2, *scores.shape[:-2]), 100))
        backend.count_correct(there, backend.asarray(labels), total, k=k, ignore_index=0)
        counts = labels != 0
        sums = [(expected & counts).sum(axis=-1), counts.sum(axis=-1)]
        np.testing.assert_array_equal(backend.to_numpy(total), 100 + np.array(sums))
    np.testing.assert_array_equal(backend.to_numpy(there), scores)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (33, 31), (1100, 3), (3, 40)])
@pytest.mark.parametrize("models", [None, 2])
@pytest.mark.parametrize("given", ["scores", "classes", "one score"])
def test_confusion(
    backend: Backend,
    shape: tuple[int, int],
    models: int | None,
    given: str,
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    n, c = shape if given != "one score" else (shape[0], 2)
    outer = (n,) if models is None else (models, n)
    scores, threshold = special(rng, (*outer, c), dtype).round(1), None
    predicted = [in_order(row)[0] for row in scores.reshape(-1, c).tolist()]
    if given == "classes":
        scores = rng.integers(-1, c + 1, outer)
        predicted = scores.reshape(-1).tolist()
    elif given == "one score":
        scores, threshold = special(rng, outer, dtype), 0.1
        predicted = [int(a > dtype.type(0.1)) for a in scores.reshape(-1)]
    for shared in (True, False):
        labels = rng.integers(-1, c + 1, n if shared else outer)
        expected = np.full((models or 1, c, c), 100)
        wanted = np.broadcast_to(labels, outer).reshape(-1).tolist()
        for i, (label, p) in enumerate(zip(wanted, predicted, strict=True)):
            if 0 <= label < c and 0 <= p < c:
                expected[i // n, label, p] += 1
        total = backend.asarray(np.full_like(expected, 100))
        if models is None:
            total = total[0]
        backend.confusion(
            backend.asarray(scores), backend.asarray(labels), total, threshold=threshold
        )
        np.testing.assert_array_equal(backend.to_numpy(total), expected if models else expected[0])


# (9000, 1) has several parts in each model; 300 columns are more than threads
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (33, 1), (257, 3), (9000, 1), (20, 300)])
@pytest.mark.parametrize("models", [None, 2])
def test_add_sums(
    backend: Backend,
    shape: tuple[int, int],
    models: int | None,
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    terms = rng.standard_normal(shape if models is None else (models, *shape)).astype(dtype)
    start = rng.standard_normal((models or 1, shape[1]))
    blocks = terms.reshape(models or 1, *shape)
    expected = [
        [a + math.fsum(column) for a, column in zip(row, block.T.tolist(), strict=True)]
        for row, block in zip(start.tolist(), blocks, strict=True)
    ]
    found = []
    for _ in range(2):
        total = backend.asarray((start if models else start[0]).copy())
        backend.add_sums(backend.asarray(terms), total)
        found.append(backend.to_numpy(total))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_allclose(found[0].reshape(start.shape), expected, rtol=1e-13, atol=1e-12)


@gpu
@pytest.mark.parametrize("shape", [(300, 10), (5, 1100)])
def test_metrics_do_not_depend_on_the_grid(
    shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    cuda, zeros = get_backend("cupy"), get_backend("cupy").xp.zeros
    scores = to_device(rng.standard_normal(shape).astype(dtype))
    labels = to_device(rng.integers(0, shape[1], shape[0]))
    terms = to_device(rng.standard_normal((9000, 1)).astype(dtype))

    def run() -> list[Array]:
        total, table, sums = zeros(2, np.int64), zeros((shape[1],) * 2, np.int64), zeros(1)
        cuda.count_correct(scores, labels, total, k=2, ignore_index=1)
        cuda.confusion(scores, labels, table)
        cuda.add_sums(terms, sums)
        return [total, table, sums]

    same_bits_on_every_grid(run)


# Scores and 8 bytes of label for each row come in; a total goes out. For a sum the terms come in.
@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(512, 10), (128, 1000), (3, 12001)])
def test_bytes_of_metrics(shape: tuple[int, int], dtype: Any, rng: np.random.Generator) -> None:
    pytest.importorskip("cudasim", reason="bytes are counted by the simulated device")
    cuda, zeros = get_backend("cupy"), get_backend("cupy").xp.zeros
    scores = to_device(rng.standard_normal(shape).astype(dtype))
    labels = to_device(rng.integers(0, 10, shape[0]))
    one, table, sums = zeros((), np.int64), zeros((10, 10), np.int64), zeros(1)
    calls: list[tuple[Callable[[], None], int]] = [
        (lambda: cuda.count_correct(scores, labels, one), scores.nbytes + labels.nbytes + 8),
        (lambda: cuda.add_sums(scores.reshape(-1, 1), sums), scores.nbytes + 8),
    ]
    if shape[1] == 10:
        least = scores.nbytes + labels.nbytes + table.nbytes
        calls.append((lambda: cuda.confusion(scores, labels, table), least))
    for call, least in calls:
        (moved,) = traffic(call).values()
        assert moved <= 1.1 * least


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(40, 3), (9, 33), (2, 1600)])
def test_metrics_are_free_of_races(
    shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    cuda, zeros = get_backend("cupy"), get_backend("cupy").xp.zeros
    scores = to_device(rng.standard_normal(shape).astype(dtype))
    labels = to_device(rng.integers(0, shape[1], shape[0]))
    totals = [zeros(2, np.int64), zeros((shape[1],) * 2, np.int64), zeros(shape[1])]

    def run(total: Array, table: Array, sums: Array) -> None:
        cuda.count_correct(scores, labels, total, k=2, ignore_index=1)
        cuda.confusion(scores, labels, table)
        cuda.add_sums(scores, sums)
        cuda.synchronize()

    run(*totals)
    with cudasim.option("racecheck", 1):
        run(*totals)
