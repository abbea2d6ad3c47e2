"""Metrics: sums kept on the device over the batches of an epoch and read once at its end."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnx.backends import Array, Backend, backend_of


class Metric:
    """A mean over samples, gathered batch by batch without waiting for the device."""

    name: str

    def start(self, backend: Backend, n_models: int | None) -> Array:
        """A fresh total."""
        raise NotImplementedError

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        """Add a batch to `total`."""
        raise NotImplementedError

    def result(self, total: np.ndarray, n: int) -> Any:
        """The metric over `n` samples: a float, or one per model."""
        raise NotImplementedError


class Accuracy(Metric):
    """Fraction of samples whose largest output is at the label; of equal ones the first counts."""

    name = "accuracy"

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        return backend.xp.zeros(() if n_models is None else (n_models,), np.int64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        backend_of(total, prediction, target).count_correct(prediction, target, total)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return total / n if total.ndim else int(total) / n


def accuracy(scores: Array, labels: Array) -> float:
    """Fraction of rows of `scores` `(N, C)` whose maximum is at the label; 0 for no rows.

    Args:
        scores: Logits or probabilities.
        labels: Integers `(N,)`, or one-hot rows `(N, C)`.
    """
    backend = backend_of(scores, labels)
    if labels.ndim == 2:
        labels = labels.argmax(axis=1)
    metric = Accuracy()
    total = metric.start(backend, None)
    metric.update(total, scores, labels.astype(np.int64))
    return float(backend.to_numpy(total)) / max(len(scores), 1)
