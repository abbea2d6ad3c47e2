"""Metrics: sums on the device, read once."""

from typing import Any

import numpy as np
import pytest

from nnx import Accuracy, accuracy
from nnx.backends import Backend


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8"])
def test_accuracy_counts_rows_with_the_maximum_at_the_label(
    backend: Backend, dtype: Any, kind: str
) -> None:
    scores = backend.asarray(np.array([[1, 2, 0], [3, 2, 1], [0, 0, 1], [5, 5, 5]], dtype))
    for labels, expected in (([1, 0, 2, 0], 1.0), ([1, 0, 2, 1], 0.75), ([0, 1, 1, 2], 0.0)):
        value = accuracy(scores, backend.asarray(np.array(labels, kind)))
        assert (value, type(value)) == (expected, float)


def test_the_first_of_equal_maxima_counts(backend: Backend, dtype: Any) -> None:
    scores = backend.asarray(np.array([[7, 7], [7, 7]], dtype))
    assert accuracy(scores, backend.asarray(np.array([0, 1]))) == 0.5


def test_labels_may_be_one_hot_rows(backend: Backend, dtype: Any) -> None:
    scores = backend.asarray(np.array([[1, 2, 0], [3, 2, 1]], dtype))
    rows = np.array([[0, 1, 0], [0, 0, 1]])
    for kind in ("int64", "float32", "bool"):
        assert accuracy(scores, backend.asarray(rows.astype(kind))) == 0.5


def test_accuracy_of_nothing_is_0(backend: Backend, dtype: Any) -> None:
    nothing = backend.asarray(np.empty((0, 3), dtype))
    assert accuracy(nothing, backend.asarray(np.empty(0, np.int64))) == 0


@pytest.mark.parametrize("models", [None, 3])
def test_accuracy_gathers_batches(
    backend: Backend, dtype: Any, rng: np.random.Generator, models: int | None
) -> None:
    shape = (10, 4) if models is None else (models, 10, 4)
    scores, labels = rng.standard_normal(shape).astype(dtype), rng.integers(0, 4, 10)
    metric = Accuracy()
    assert metric.name == "accuracy"
    total = metric.start(backend, models)
    for cut in (slice(0, 4), slice(4, 8), slice(8, 10)):
        metric.update(total, backend.asarray(scores[..., cut, :]), backend.asarray(labels[cut]))
    result = metric.result(backend.to_numpy(total), 10)
    expected = (scores.argmax(axis=-1) == labels).mean(axis=-1)
    np.testing.assert_array_equal(result, expected)
    assert isinstance(result, float if models is None else np.ndarray)
