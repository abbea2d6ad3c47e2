"""Kernels of losses and metrics: softmax with negative log-likelihood, right answers counted."""

from typing import Any

import numpy as np
import pytest
from kernel_cases import REFERENCE, close

from nnx.backends import get_backend

gpu = pytest.mark.gpu


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
