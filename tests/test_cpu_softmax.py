"""The C kernels of losses and metrics against their definition in float64, and loops."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from kernel_cases import REFERENCE, TOLERANCE, extreme_rows, special
from oracles import assert_same_bits, cross_entropy

from nnx.backends import get_backend, numpy_backend
from nnx.backends.base import Array

pytestmark = pytest.mark.kernels
F64 = np.dtype(np.float64)


def wide(a: Any) -> Any:
    return a.astype(F64) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a


def near(found: Any, expected: Any, dtype: Any) -> None:
    rtol, atol = TOLERANCE[np.dtype(dtype)]
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (dtype, np.shape(b))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def check(kernels: Any, logits: Array, target: Array, **options: Any) -> None:
    """Compare with the definition in float64; what is given stays as it is."""
    given = [a for a in (logits, target, *options.values()) if isinstance(a, np.ndarray)]
    before = [a.copy() for a in given]
    found = kernels.softmax_nll(logits, target, **options)
    exact = {name: wide(value) for name, value in options.items()}
    with np.errstate(invalid="ignore"):
        expected = REFERENCE.softmax_nll(wide(logits), wide(target), **exact)
    near(found, expected, logits.dtype)
    for a, b in zip(given, before, strict=True):
        assert_same_bits(a, b)


def arrays(
    rng: np.random.Generator, shape: tuple[int, ...], soft: bool, dtype: Any
) -> tuple[Array, Array]:
    """Logits and targets; of soft ones some are wholly of the class in the middle, or of two."""
    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    if not soft:
        return logits, rng.integers(0, shape[-1], shape[:-1])
    target = rng.uniform(0, 1, shape).astype(dtype)
    target[..., ::3, :] = np.arange(shape[-1]) == shape[-1] // 2
    target[..., 1::7, :] = 0
    target[..., 2::7, :] = target[..., :1, :]
    target[..., 2::7, 0] = 1
    return logits, target


@pytest.mark.parametrize("shape", [(7, 3), (35, 10), (3, 5, 10), (5, 33), (2, 3, 1100)])
@pytest.mark.parametrize("soft", [False, True])
def test_every_option_goes_with_every_other(
    kernels: Any, shape: tuple[int, ...], soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    c = shape[-1]
    logits, target = arrays(rng, shape, soft, dtype)
    weight = rng.uniform(0, 2, shape[:-1]).astype(dtype)
    weight[..., ::4] = 0
    classes = rng.uniform(0, 2, c).astype(dtype)
    classes[0] = 0
    each = rng.uniform(1, 2, shape[:-2]).astype(F64)  # one number for each model, or for the only
    choices: dict[str, list[Any]] = {
        "weight": [None, weight],
        "class_weight": [None, classes],
        "label_smoothing": [0.0, 0.3, 1.0],
        "ignore_index": [None, c // 2, -100],
        "normalizer": [None, 2.5, each],
        "grad_scale": [None, 7, each.astype(np.float32)],
    }
    combinations = list(itertools.product(*choices.values()))
    for i in rng.permutation(len(combinations))[: 324 if shape == (35, 10) else 60]:
        check(kernels, logits, target, **dict(zip(choices, combinations[i], strict=True)))
    options = {name: values[1] for name, values in choices.items()}
    check(kernels, logits, target, need_gradient=False)
    check(kernels, logits, target, need_gradient=False, **options)
    if len(shape) == 3:  # targets and weights for all models alike
        for option in ({}, options | {"weight": weight[0]}):
            check(kernels, logits, target[0], **option)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 10, 31, 32, 33, 63, 65, 1000, 1025, 4099])
@pytest.mark.parametrize("soft", [False, True])
def test_rows_of_every_width(
    kernels: Any, width: int, soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    for n in (1, 34):
        logits, target = arrays(rng, (n, width), soft, dtype)
        options = {"weight": rng.uniform(0, 2, n).astype(dtype), "label_smoothing": 0.1}
        check(kernels, logits, target)
        check(kernels, logits, target, **options)
        check(kernels, logits, target, need_gradient=False)


@pytest.mark.parametrize("shape", [(33, 10), (3, 1025)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loops_say_the_same(
    kernels: Any, shape: tuple[int, int], soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    logits, target = arrays(rng, shape, soft, dtype)
    options: dict[str, Any] = {
        "weight": rng.uniform(0, 2, shape[0]).astype(dtype),
        "class_weight": rng.uniform(0, 2, shape[1]).astype(dtype),
        "label_smoothing": 0.3,
        "ignore_index": shape[1] // 2,
        "grad_scale": 7.0,
    }
    for option in ({}, options):
        near(
            kernels.softmax_nll(logits, target, **option),
            cross_entropy(logits, target, **option),
            dtype,
        )


@pytest.mark.parametrize("width", [5, 40, 1500])
@pytest.mark.parametrize("soft", [False, True])
def test_extreme_rows(kernels: Any, width: int, soft: bool, dtype: Any) -> None:
    label = width // 2
    target = (np.arange(width) == label)[None].astype(dtype) if soft else np.array([label])
    for logits in extreme_rows(width, label, dtype).values():
        check(kernels, logits, target)
        check(kernels, logits, target, label_smoothing=0.1)
        # beside a row of weight 0, which leaves no trace, and one that is as it should be
        rows, targets = np.repeat(logits, 3, axis=0), np.repeat(target, 3, axis=0)
        rows[2] = 0
        for first in (0.0, 1.0):
            check(kernels, rows, targets, weight=np.array([first, 0, 1], dtype))
    logits[0, ::2] = -math.inf  # half of it; the sums begin and end with one
    check(kernels, logits, target)


@pytest.mark.parametrize("width", [4, 50])
@pytest.mark.parametrize("wrong", [-1, 4, 50, -(2**63), 2**63 - 1])
def test_a_label_out_of_range_is_nan_unless_it_counts_for_nothing(
    kernels: Any, width: int, wrong: int, dtype: Any, rng: np.random.Generator
) -> None:
    if 0 <= wrong < width:
        return
    logits = rng.standard_normal((3, width)).astype(dtype)
    labels = np.array([1, wrong, 2])
    loss, gradient = kernels.softmax_nll(logits, labels)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), [False, True, False])
    for option in ({}, {"label_smoothing": 0.1}, {"class_weight": np.arange(width).astype(dtype)}):
        check(kernels, logits, labels, **option)
        check(kernels, logits, labels, **option, weight=np.array([1, 0, 1], dtype))
        check(kernels, logits, labels, **option, ignore_index=wrong)
    both = np.stack([np.array([1, 0, 2]), labels])  # the first of two models has none
    check(kernels, np.stack([logits, logits]), both)
    loss, gradient = kernels.softmax_nll(logits, labels, ignore_index=wrong)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(gradient[1], np.zeros(width))


@pytest.mark.parametrize("width", [2, 40])
def test_a_scale_that_is_not_finite_is_no_reason_to_select(
    kernels: Any, width: int, dtype: Any, rng: np.random.Generator
) -> None:
    logits, labels = rng.standard_normal((2, width)).astype(dtype), np.array([0, 1])
    for logits[0, 0], scale in itertools.product((1.0, math.nan), (0.0, math.inf, math.nan)):
        for weight in (None, np.array([0, 1], dtype)):
            check(kernels, logits, labels, weight=weight, grad_scale=scale)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 2, 5), (0, 40)])
def test_no_rows(kernels: Any, shape: tuple[int, ...], dtype: Any) -> None:
    logits, labels = np.zeros(shape, dtype), np.zeros(shape[:-1], np.int64)
    for weight in (None, np.zeros(shape[:-1], dtype)):
        check(kernels, logits, labels, weight=weight)
        check(kernels, logits, logits, weight=weight)


@pytest.mark.parametrize("shape", [(3, 1000, 10), (3001, 10), (300, 1000), (2, 40, 1025)])
@pytest.mark.parametrize("soft", [False, True])
def test_threads_leave_no_trace(
    kernels: Any, shape: tuple[int, ...], soft: bool, dtype: Any, rng: np.random.Generator
) -> None:
    cpu: Any = numpy_backend.CPU
    logits, target = arrays(rng, shape, soft, dtype)
    labels = rng.integers(0, shape[-1], shape[:-1])
    options = {
        "weight": rng.uniform(0, 2, shape[:-1]).astype(dtype),
        "class_weight": rng.uniform(0, 2, shape[-1]).astype(dtype),
        "ignore_index": 1,
    }
    found, threads = [], cpu.info()["threads"]
    try:
        for n in (1, 2, 3):
            cpu.set_num_threads(n)
            total = np.zeros((2, *shape[:-2]), np.int64)
            kernels.count_correct(logits, labels, total, ignore_index=1)
            runs = (kernels.softmax_nll(logits, target, **o) for o in ({}, options))
            found.append([total, *itertools.chain(*runs)])
    finally:
        cpu.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same_bits(a, b)


def test_what_the_kernels_do_not_take_is_left_to_numpy(
    dtype: Any, rng: np.random.Generator
) -> None:
    backend = get_backend("numpy")
    logits, labels = rng.standard_normal((6, 8)).astype(dtype), rng.integers(0, 8, 6)
    for z in (logits[:, ::2], np.asfortranarray(logits), logits[::-1]):
        y = labels % z.shape[1]
        near(backend.softmax_nll(z, y), REFERENCE.softmax_nll(wide(z), y), dtype)
    total = np.zeros((), np.int64)
    backend.count_correct(logits[:, ::2], labels, total)
    assert total == (logits[:, ::2].argmax(axis=1) == labels).sum()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_and_weights_of_other_kinds_are_converted(
    kernels: Any, kind: Any, dtype: Any, rng: np.random.Generator
) -> None:
    logits, labels = rng.standard_normal((6, 8)).astype(dtype), rng.integers(0, 8, 6)
    weight = rng.integers(0, 3, 6)
    check(kernels, logits, labels.astype(kind), weight=weight.astype(kind))


def test_arguments_that_do_not_fit_are_declined_and_nothing_is_written(dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    other = np.float64 if dtype == np.float32 else np.float32
    z, one, many = np.zeros, np.ones, np.full
    good: dict[str, Any] = {
        "logits": z((3, 5), dtype),
        "target": z(3, np.int64),
        "weight": one(3, dtype),
        "class_weight": one(5, dtype),
        "label_smoothing": 0.0,
        "ignore_index": None,
        "normalizer": None,
        "grad_scale": None,
        "loss": many((), np.nan, dtype),
        "gradient": many((3, 5), np.nan, dtype),
        "work": None,
    }
    unaligned = z(15 * dtype.itemsize + 1, np.uint8)[1:].view(dtype).reshape(3, 5)
    swapped = z((3, 5), dtype).astype(dtype.newbyteorder())
    read_only = many((3, 5), np.nan, dtype)
    read_only.flags.writeable = False
    bad: dict[str, list[Any]] = {
        "logits": [z(5, dtype), z((5, 3), dtype), z((1, 1, 3, 5), dtype), z((3, 5), np.int64)],
        "target": [z(2, np.int64), z((1, 3), np.int64), z(3, np.int32), z((1, 5), dtype), None],
        "weight": [one(4, dtype), one((3, 1), dtype), one(3, other), one((), dtype)],
        "class_weight": [one(4, dtype), one((1, 5), dtype), one(5, other)],
        "label_smoothing": ["much", None],
        "ignore_index": [2**70, 1.5, "one"],
        "normalizer": [one(1), one(3), one((), np.int64), "one"],
        "grad_scale": [one(1), one((), np.int64), "one"],
        "loss": [many(1, np.nan, dtype), many((), np.nan, other), None],
        "gradient": [many((5, 3), np.nan, dtype), many((3, 5), np.nan, other), read_only],
    }
    bad["logits"] += [z((3, 5), other), unaligned, swapped, z((3, 10), dtype)[:, ::2], [[0.0]]]
    bad["target"] += [z((3, 5), other), z((5, 3), dtype)]
    for name, values in bad.items():
        for value in values:
            call = good | {name: value}
            assert not cpu.softmax_nll(*call.values()), (name, value)
            for out in (good["loss"], good["gradient"], call["loss"], call["gradient"]):
                assert out is None or np.isnan(out).all()
    rows = good | {"logits": z((3000, 1), dtype), "target": z(3000, np.int64), "weight": None}
    rows |= {"class_weight": None, "gradient": None}
    for work in (None, z(5999, dtype), z(6000, other)):
        assert not cpu.softmax_nll(*(rows | {"work": work}).values())
    assert cpu.softmax_nll(*(rows | {"work": z(6000, dtype)}).values())
    assert cpu.softmax_nll(*good.values())
    assert not cpu.softmax_nll(*list(good.values())[:-1])

    scores, labels, total = np.zeros((3, 5), dtype), np.zeros(3, np.int64), np.zeros((), np.int64)
    two = np.zeros(2, np.int64)
    for arguments in (
        (scores[0], labels, total, 1, None),
        (scores[:, :0], labels, total, 1, None),
        (scores, labels[:2], total, 1, None),
        (scores, labels, two, 1, None),
        (scores, labels, total, 1, 0),
        (scores, labels, total, 0, None),
        (scores, labels, total, "one", None),
        (scores, labels, two, 1, "one"),
        (scores, labels, total.astype(np.int32), 1, None),
        (scores.astype(np.int64), labels, total, 1, None),
    ):
        assert not cpu.count_correct(*arguments)
    assert not total.any()
    assert not two.any()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 2), (33, 31), (300, 10), (3, 1600)])
@pytest.mark.parametrize("models", [None, 2])
def test_right_answers(
    kernels: Any, shape: tuple[int, int], models: int | None, dtype: Any, rng: np.random.Generator
) -> None:
    n, c = shape
    scores = special(rng, shape if models is None else (models, n, c), dtype).round(1)
    for labels in (rng.integers(-1, c + 1, scores.shape[:-1]), rng.integers(0, c, n)):
        every = np.broadcast_to(labels, scores.shape[:-1])
        for k in (1, 2, c + 1):
            right = np.zeros(every.shape, bool)
            for at, label in np.ndenumerate(every):
                row = [(not math.isnan(a), -a) for a in scores[at].tolist()]  # NaN before numbers
                row = [(number, value if number else 0.0) for number, value in row]
                order = sorted(range(c), key=row.__getitem__)
                right[at] = label in order[:k]
            total = np.full(scores.shape[:-2], 100)
            kernels.count_correct(scores, labels, total, k=k)
            np.testing.assert_array_equal(total, 100 + right.sum(axis=-1))
            total, counts = np.full((2, *scores.shape[:-2]), 100), every != 0
            kernels.count_correct(scores, labels, total, k=k, ignore_index=0)
            sums = [(right & counts).sum(axis=-1), counts.sum(axis=-1)]
            np.testing.assert_array_equal(total, 100 + np.array(sums))


def rowwise(x: np.ndarray, dy: np.ndarray, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Softmax or its logarithm and the gradient, row by row in float64 by the Jacobian."""
    y, dx = np.empty(x.shape), np.empty(x.shape)
    for i in np.ndindex(x.shape[:-1]):
        row = x[i].astype(np.float64)
        most = max(row)
        total = math.fsum(math.exp(v - most) for v in row)
        y[i] = [v - most - math.log(total) if log else math.exp(v - most) / total for v in row]
        p = np.exp(y[i]) if log else y[i]
        jacobian = np.eye(len(row)) - p if log else np.diag(p) - np.outer(p, p)
        dx[i] = dy[i].astype(np.float64) @ jacobian
    return y, dx


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log-softmax"])
@pytest.mark.parametrize(
    "shape", [(1,), (3,), (5, 1), (7, 10), (2, 3, 31), (4, 32), (3, 33), (2, 1025), (2, 2100)]
)
def test_softmax_alone(
    kernels: Any, shape: tuple[int, ...], log: bool, dtype: Any, rng: np.random.Generator
) -> None:
    x, dy = (5 * rng.standard_normal(shape)).astype(dtype), rng.standard_normal(shape).astype(dtype)
    given = x.copy(), dy.copy()
    y = kernels.softmax(x, log=log)
    dx = kernels.softmax_backward(dy, y, log=log)
    expected, slope = rowwise(x, dy, log)
    rtol, atol = TOLERANCE[np.dtype(dtype)]
    for found, right in ((y, expected), (dx, slope)):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            found, right, rtol=2 * rtol, atol=atol * max(1, abs(right).max())
        )
    for a, b in zip((x, dy), given, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log-softmax"])
@pytest.mark.parametrize("n", [4, 40])
def test_softmax_of_special_rows(kernels: Any, n: int, log: bool, dtype: Any) -> None:
    """Huge scores, NaN, infinities, and what is next to nothing: as in the definition."""
    big = float(np.finfo(dtype).max)
    least = -100.0 if dtype == np.float32 else -730.0  # its exp is subnormal, not 0
    x = np.zeros((8, n), dtype)
    x[:, :3] = [
        *([big, -big, 0], [big, big, big], [-big, -big, -big], [np.nan, 0, 1]),
        *([0, np.inf, 1], [-np.inf, 0, 1], [least, 0, 0], [0, 1, np.nan]),
    ]
    x = np.vstack([x, np.full((1, n), -np.inf, dtype), x[3:4, ::-1]])
    with np.errstate(all="ignore"):
        expected = REFERENCE.softmax(x, log=log)
    found = kernels.softmax(x, log=log)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=0)
    assert np.isnan(found[[3, 4, 7, 8, 9]]).all()
    assert log or found[6, 0] > 0
    assert not np.isnan(found[[0, 1, 2, 5, 6]]).any()


def test_softmax_of_nothing_and_of_other_layouts(dtype: Any, rng: np.random.Generator) -> None:
    backend = get_backend("numpy")
    for shape in ((0, 3), (2, 0, 5)):
        empty = np.empty(shape, dtype)
        assert backend.softmax(empty).shape == backend.softmax_backward(empty, empty).shape == shape
    x = rng.standard_normal((6, 8)).astype(dtype)
    for z in (x[:, ::2], np.asfortranarray(x)):
        y = backend.softmax(z)
        near([y], [REFERENCE.softmax(wide(z))], dtype)
        near(
            [backend.softmax_backward(z, y)], [REFERENCE.softmax_backward(wide(z), wide(y))], dtype
        )


def test_softmax_on_threads(kernels: Any, dtype: Any, rng: np.random.Generator) -> None:
    cpu: Any = numpy_backend.CPU
    x, dy = rng.standard_normal((2, 700, 100)).astype(dtype)
    found, threads = [], cpu.info()["threads"]
    try:
        for n in (1, 2):
            cpu.set_num_threads(n)
            y = kernels.softmax(x)
            found.append([y, kernels.softmax_backward(dy, y), kernels.softmax(x, log=True)])
    finally:
        cpu.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


def test_softmax_declines_what_does_not_fit(dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    x, out = np.ones((3, 5), dtype), np.full((3, 5), 7, dtype)
    other = np.float64 if dtype == np.float32 else np.float32
    for wrong in (None, 3, x[:, :4].copy(), x.astype(other), x[:, ::2], np.asarray(x[0, 0])):
        assert not cpu.softmax(wrong, out, False)
        assert not cpu.softmax_backward(wrong, x, out, False)
        assert not cpu.softmax_backward(x, wrong, out, False)
    still = out.copy()
    still.flags.writeable = False
    assert not cpu.softmax(x, still, False)
    assert not cpu.softmax(x)
    assert not cpu.softmax_backward(x)
    assert (out == 7).all()
