"""Metrics: sums kept on the device over the batches of an epoch and read once at its end.

Samples count alike: weights are the loss's business. Where a quotient is 0/0 the metric is 0 (what
scikit-learn calls `zero_division=0`). Counts are int64 and other sums float64, so that an epoch's
total doesn't lose digits. With K models every result has a leading axis of K.

The classes go into `Trainer.fit(metrics=[...])`; the functions of the same names measure arrays of
a single model at once, and wait for the device.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import numpy as np

from nnx._checks import check_range
from nnx.backends import Array, Backend, backend_of


class Metric:
    """A figure over samples, gathered batch by batch without waiting for the device.

    Attributes:
        name: Its column in the history.
    """

    name: str

    def start(self, backend: Backend, n_models: int | None) -> Array:
        """A fresh total: an array of any shape."""
        raise NotImplementedError

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        """Add a batch to `total`."""
        raise NotImplementedError

    def result(self, total: np.ndarray, n: int) -> Any:
        """The metric over `n` samples, from the total on the host: a float, or one per model."""
        raise NotImplementedError


class _Share(Metric):
    """Fraction of samples whose label is among the k largest outputs."""

    k: int
    ignore_index: int | None

    def start(self, backend: Backend, n_models: int | None) -> Array:
        return _start(backend, n_models, np.int64, self.ignore_index)

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        backend = backend_of(total, prediction, target)
        rows, n_models = _per_model(total, self.ignore_index)
        scores, labels = _rows(backend, prediction, target, n_models)
        labels = labels[0] if len(labels) == 1 else labels  # the same for all models
        backend.count_correct(scores, labels, rows, k=self.k, ignore_index=self.ignore_index)

    def result(self, total: np.ndarray, n: int) -> Any:
        return _quotient(total, n) if self.ignore_index is None else _quotient(*total)


class Accuracy(_Share):
    """Fraction of samples whose largest output is at the label; of equal ones the first counts.

    NaN counts as larger than any number.

    Args:
        ignore_index: Samples with this label count for nothing, as in `SoftmaxNLL`.
    """

    name = "accuracy"
    k = 1

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index


class TopKAccuracy(_Share):
    """Fraction of samples whose label is among the k largest outputs.

    Of equal outputs those of lower classes count as larger, so that k=1 is `Accuracy`.

    Args:
        k: At least 1.
        ignore_index: Samples with this label count for nothing, as in `SoftmaxNLL`.
    """

    def __init__(self, k: int = 5, ignore_index: int | None = None) -> None:
        if k != int(k) or k < 1:
            raise ValueError(f"TopKAccuracy: expected an integer k of at least 1, got {k!r}")
        self.k = int(k)
        self.ignore_index = ignore_index
        self.name = f"top_{k}_accuracy"


class LogLoss(Metric):
    """Mean negative log-likelihood of the labels, without weights or smoothing.

    Args:
        from_logits: Whether predictions are logits; else probabilities, of which those below the
            dtype's epsilon count as epsilon, as in scikit-learn.
        ignore_index: Samples with this label count for nothing, as in `SoftmaxNLL`; for labels.

    Shape:
        Class scores `(N, C)` with labels `(N,)` or soft targets `(N, C)`; or one output per sample,
        `(N,)` or `(N, 1)`, the logit or probability of class 1, with targets of 0 and 1.
    """

    name = "log_loss"

    def __init__(self, from_logits: bool = True, ignore_index: int | None = None) -> None:
        self.from_logits, self.ignore_index = from_logits, ignore_index

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        return _start(backend, n_models, np.float64, self.ignore_index)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        backend, ignore = backend_of(total, prediction, target), self.ignore_index
        rows, n_models = _per_model(total, ignore)
        losses = rows if ignore is None else rows[0]
        width, labels = prediction.shape[-1], None
        one = width == 1 or prediction.ndim == 1 + total.ndim - (ignore is not None)
        if one:
            y = _flat(prediction, n_models)
            labels = t = _like(target, y.shape)
        elif target.dtype.kind != "f":
            y, labels = _rows(backend, prediction, target, n_models)
            t = labels
        elif ignore is None:
            y = prediction.reshape(n_models, -1, width)
            t = target.reshape(-1, *y.shape[1:])
        else:
            raise TypeError(
                f"LogLoss: expected integer labels with ignore_index, got {target.dtype} of shape "
                f"{target.shape}"
            )
        if self.from_logits and not one:
            t = t[0] if len(t) == 1 else t  # the same for all models
            loss, _ = backend.softmax_nll(
                y, t, ignore_index=ignore, normalizer=1.0, need_gradient=False
            )
            backend.xp.add(losses, loss, out=losses)
        else:
            terms = self._terms(backend, y, t, one)
            backend.add_sums(terms.reshape(n_models, -1, 1), losses[:, None])
        if labels is not None and ignore is not None:
            shape = (n_models, labels.shape[1])
            t = _spread(backend, labels, shape, np.float64)
            counts = backend.empty(shape, np.float64)
            backend.elementwise("where(t == ignored, 0, 1)", counts, t=t, ignored=float(ignore))
            backend.add_sums(counts[..., None], rows[1][:, None])

    def _terms(self, backend: Backend, y: Array, t: Array, one: bool) -> Array:
        """What the loss is the sum of: one output's `(K, M)`, or `(K, N, C)` of probabilities."""
        operands: dict[str, Any] = {} if self.from_logits else {"low": float(np.finfo(y.dtype).eps)}
        if one and self.from_logits:
            value = "maximum(y, 0) - y * t + log1p(exp(-abs(y)))"  # log(1 + exp(y)) - t y
        elif one:
            value = "-(t * log(maximum(y, low)) + (1 - t) * log(maximum(1 - y, low)))"
        elif t.ndim == y.ndim:
            value = "-t * log(maximum(y, low))"
        else:  # a label out of range makes the loss NaN
            t = t[..., None]
            value = "where(t == j, -log(maximum(y, low)), where(t < 0, nan, where(t < n, 0, nan)))"
            j = backend.xp.broadcast_to(_classes(cast(Any, backend), y.shape[-1], y.dtype), y.shape)
            operands |= {"j": j, "n": y.shape[-1], "nan": math.nan}
        if self.ignore_index is not None:
            value = f"where(t == ignored, 0, {value})"
            operands["ignored"] = self.ignore_index
        t = _spread(backend, t, y.shape, y.dtype)
        return backend.elementwise(value, backend.empty(y.shape, y.dtype), y=y, t=t, **operands)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return _quotient(total, n) if self.ignore_index is None else _quotient(*total)


class ConfusionMatrix(Metric):
    """How often each label met each prediction: int64 `(C, C)`, row label, column prediction.

    The prediction is the class of the largest output, of equal ones the first. A sample whose label
    is outside 0..C-1 isn't counted. `precision_recall_f1` reads the matrix class by class.

    Args:
        n_classes: C, at least 1.

    Shape:
        Class scores `(N, C)`, or predicted classes as integers, with labels `(N,)` or one-hot rows.
    """

    name = "confusion_matrix"

    def __init__(self, n_classes: int) -> None:
        if n_classes != int(n_classes) or n_classes < 1:
            raise ValueError(
                f"ConfusionMatrix: expected an integer n_classes of at least 1, got {n_classes!r}"
            )
        self.n_classes = n_classes

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        shape = (self.n_classes, self.n_classes)
        return backend.xp.zeros(shape if n_models is None else (n_models, *shape), np.int64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        backend, c = backend_of(total, prediction, target), self.n_classes
        rows = total.reshape(-1, c, c)
        if prediction.dtype.kind == "f":
            if prediction.shape[-1] != c:
                raise ValueError(
                    f"ConfusionMatrix: expected scores of {c} classes, got {prediction.shape}"
                )
            predicted, labels = _rows(backend, prediction, target, len(rows))
        else:
            predicted = backend.cast(_flat(prediction, len(rows)), np.int64)
            labels = backend.cast(_like(target, predicted.shape), np.int64)
        backend.confusion(predicted, labels, rows)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return total


class _Binary(Metric):
    """The confusion matrix of classes 0 and 1, and a quotient of its entries."""

    def __init__(self, threshold: float = 0.5, *, from_logits: bool = False) -> None:
        check_range(type(self).__name__, "threshold", threshold, 0, 1)
        self.threshold, self.from_logits = threshold, from_logits

    def start(self, backend: Backend, n_models: int | None) -> Array:
        return backend.xp.zeros((2, 2) if n_models is None else (n_models, 2, 2), np.int64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        backend = backend_of(total, prediction, target)
        rows, p, limit = total.reshape(-1, 2, 2), prediction, self.threshold
        if p.ndim == total.ndim and p.shape[-1] == 2:
            difference = backend.empty(p.shape[:-1], p.dtype)
            one, other = p[..., 1], p[..., 0] if self.from_logits else 0
            p = backend.xp.subtract(one, other, out=difference)
            if target.dtype.kind == "f" and target.ndim >= 2 and target.shape[-1] == 2:
                target = target[..., 1]
        if self.from_logits:  # sigmoid(z) > t where z > log(t / (1 - t))
            limit = math.log(limit / (1 - limit))
        p = _flat(p, len(rows))
        truth = _like(target, p.shape)
        labels = backend.xp.greater(truth, 0.5, out=backend.empty(truth.shape, np.int64))
        backend.confusion(p, labels, rows, threshold=limit)


class Precision(_Binary):
    """`tp / (tp + fp)`: of the samples said to be of class 1, the fraction that is.

    A sample is said to be of class 1 where its probability is strictly above the threshold: at
    p == threshold it is of class 0.

    Args:
        threshold: Of the probability, in (0, 1).
        from_logits: Whether predictions are logits, whose probability is `sigmoid(z)`, or
            `softmax(z)[1]` of two; else they are probabilities.

    Shape:
        `(N,)` or `(N, 1)`: that of class 1. `(N, 2)`: one for each class. Targets are 0 and 1.
    """

    name = "precision"

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        tp, fp, _ = _hits(total)
        return _quotient(tp, tp + fp)


class Recall(_Binary):
    """`tp / (tp + fn)`: of the samples of class 1, the fraction found; otherwise as `Precision`."""

    name = "recall"

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        tp, _, fn = _hits(total)
        return _quotient(tp, tp + fn)


class F1(_Binary):
    """`2 tp / (2 tp + fp + fn)`, the harmonic mean of `Precision` and `Recall`; used as these."""

    name = "f1"

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        tp, fp, fn = _hits(total)
        return _quotient(2 * tp, 2 * tp + fp + fn)


class _Error(Metric):
    """A mean over samples and outputs of a function of prediction y and target t."""

    term: str

    def start(self, backend: Backend, n_models: int | None) -> Array:
        return _start(backend, n_models, np.float64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        backend, (rows, n_models) = backend_of(total, prediction, target), _per_model(total)
        y = _flat(prediction, n_models)
        if not y.size:
            return
        t = _like(target, y.shape)
        dtype = np.result_type(y.dtype, t.dtype)
        y, t = backend.cast(y, dtype), _spread(backend, t, y.shape, dtype)
        n_outputs = y.shape[1] // prediction.shape[total.ndim]
        terms = backend.elementwise(
            f"{self.term} / n", backend.empty(y.shape, dtype), y=y, t=t, n=n_outputs
        )
        backend.add_sums(terms[..., None], rows[:, None])

    def result(self, total: np.ndarray, n: int) -> Any:
        return _quotient(total, n)


class MSE(_Error):
    """Mean squared error, over samples and outputs."""

    name = "mse"
    term = "(y - t) * (y - t)"


class MAE(_Error):
    """Mean absolute error, over samples and outputs."""

    name = "mae"
    term = "abs(y - t)"


class R2(Metric):
    """Coefficient of determination, `1 - sum (t - y)^2 / sum (t - mean(t))^2`.

    The mean over the outputs. Where the targets are constant it is 1 if they are met exactly, else
    0. One pass: the second sum is `sum d^2 - (sum d)^2 / n` with d the distance from the first
    target, which keeps the digits that the squares of large targets would lose.

    Args:
        n_outputs: D, of targets `(N, D)`; 1 also for `(N,)`.
    """

    name = "r2"

    def __init__(self, n_outputs: int = 1) -> None:
        if n_outputs != int(n_outputs) or n_outputs < 1:
            raise ValueError(f"R2: expected an integer n_outputs of at least 1, got {n_outputs!r}")
        self.n_outputs = n_outputs

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        # samples, first target, sum d, sum d^2, sum (t - y)^2; of each output
        models = () if n_models is None else (n_models,)
        return backend.xp.zeros((5, *models, self.n_outputs), np.float64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        backend, d = backend_of(total, prediction, target), self.n_outputs
        sums = total.reshape(5, -1, d)
        y = _flat(prediction, sums.shape[1])
        n = y.shape[1] // d
        if n * d != y.shape[1]:
            raise ValueError(f"R2: expected {d} outputs, got predictions {prediction.shape}")
        if not n:
            return
        shape, kind = (len(y), n, d), np.float64
        t = _spread(backend, _like(target, y.shape).reshape(-1, n, d), shape, kind)
        y = backend.cast(y, kind).reshape(shape)
        count, first = sums[0], sums[1]
        backend.elementwise("where(n == 0, t, f)", first, n=count, t=t[:, 0], f=first)
        backend.xp.add(count, n, out=count)
        terms = backend.empty((3, *shape), kind)
        first = backend.xp.broadcast_to(first[:, None], shape)
        distance = backend.elementwise("t - f", terms[0], t=t, f=first)
        backend.elementwise("e * e", terms[1], e=distance)
        backend.elementwise("(t - y) * (t - y)", terms[2], t=t, y=y)
        backend.add_sums(terms, sums[2:])

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        count, _, first, second, error = total
        spread = second - first * first / np.maximum(count, 1)
        constant = spread <= 0
        found = 1 - error / np.where(constant, 1, spread)
        found = np.where(constant, (error == 0) & (count > 0), found).mean(axis=-1)
        return found if found.ndim else float(found)


def _quotient(total: Any, n: Any) -> Any:
    """`total / n`, and 0 where n is 0: a float, or float64 one per model."""
    total, n = np.asarray(total), np.asarray(n)
    found = np.where(n == 0, 0.0, total / np.where(n == 0, 1, n))
    return found if found.ndim else float(found)


def _flat(a: Array, n_models: int) -> Array:
    """`(K, -1)`, also where it is empty."""
    return a.reshape(n_models, a.size // n_models)


def _like(target: Array, shape: tuple[int, ...]) -> Array:
    """The target of predictions of M rows each, `(K, M)`; `(1, M)` if all models share it."""
    n_models, n = shape
    if target.size == n_models * n:
        return target.reshape(shape)
    if target.size != n:
        raise ValueError(
            f"metrics: expected a target of {n} elements for each model, got shape {target.shape}"
        )
    return target.reshape(1, n)


def _start(
    backend: Backend, n_models: int | None, dtype: Any, ignore_index: int | None = None
) -> Array:
    """Zeros `()` or `(K,)`; with labels to ignore `(2,)` or `(2, K)`, to count the others too."""
    models = () if n_models is None else (n_models,)
    return backend.xp.zeros(models if ignore_index is None else (2, *models), dtype)


def _per_model(total: Array, ignore_index: int | None = None) -> tuple[Array, int]:
    """What `_start` made, with an axis of K in any case; and K."""
    rows = total.reshape(-1) if ignore_index is None else total.reshape(2, -1)
    return rows, rows.shape[-1]


def _spread(backend: Backend, a: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """`a` in this dtype, and a view of this shape."""
    a = backend.cast(a, dtype)
    return a if a.shape == shape else backend.xp.broadcast_to(a, shape)


@functools.cache
def _classes(backend: Backend, n: int, dtype: Any) -> Array:
    """0 to n - 1, sent once."""
    return backend.asarray(np.arange(n), dtype)


def _hits(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, false positives, false negatives of confusion matrices `(..., 2, 2)`."""
    return matrix[..., 1, 1], matrix[..., 0, 1], matrix[..., 1, 0]


def _rows(backend: Backend, prediction: Array, target: Array, n_models: int) -> tuple[Array, Array]:
    """Scores `(K, N, C)` and labels, int64 `(K or 1, N)`.

    Of one-hot rows and soft targets the label is the largest entry's.
    """
    scores = prediction.reshape(n_models, -1, prediction.shape[-1])
    if target.ndim == prediction.ndim or (target.dtype.kind == "f" and target.ndim >= 2):
        labels = backend.empty(target.shape[:-1], np.int64)
        target = backend.xp.argmax(target, axis=-1, out=labels)
    return scores, backend.cast(_like(target, scores.shape[:2]), np.int64)


# ---- of arrays -----------------------------------------------------------------------------------


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


def _once(metric: Metric, prediction: Array, target: Array) -> Any:
    """The metric of one batch, of a single model."""
    backend = backend_of(prediction, target)
    total = metric.start(backend, None)
    metric.update(total, prediction, target)
    return metric.result(backend.to_numpy(total), len(prediction))


def top_k_accuracy(scores: Array, labels: Array, k: int = 5) -> float:
    """See `TopKAccuracy`; labels are integers `(N,)` or one-hot rows."""
    return float(_once(TopKAccuracy(k), scores, labels))


def log_loss(prediction: Array, target: Array, *, from_logits: bool = True) -> float:
    """See `LogLoss`."""
    return float(_once(LogLoss(from_logits), prediction, target))


def confusion_matrix(prediction: Array, labels: Array, n_classes: int) -> np.ndarray:
    """See `ConfusionMatrix`; on the host."""
    matrix: np.ndarray = _once(ConfusionMatrix(n_classes), prediction, labels)
    return matrix


def precision_recall_f1(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, `(..., C)`, of confusion matrices `(..., C, C)`."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    said, are = matrix.sum(axis=-2), matrix.sum(axis=-1)
    return _quotient(hits, said), _quotient(hits, are), _quotient(2 * hits, said + are)


def precision(
    prediction: Array, target: Array, threshold: float = 0.5, *, from_logits: bool = False
) -> float:
    """See `Precision`."""
    return float(_once(Precision(threshold, from_logits=from_logits), prediction, target))


def recall(
    prediction: Array, target: Array, threshold: float = 0.5, *, from_logits: bool = False
) -> float:
    """See `Recall`."""
    return float(_once(Recall(threshold, from_logits=from_logits), prediction, target))


def f1(
    prediction: Array, target: Array, threshold: float = 0.5, *, from_logits: bool = False
) -> float:
    """See `F1`."""
    return float(_once(F1(threshold, from_logits=from_logits), prediction, target))


def mse(prediction: Array, target: Array) -> float:
    """See `MSE`."""
    return float(_once(MSE(), prediction, target))


def mae(prediction: Array, target: Array) -> float:
    """See `MAE`."""
    return float(_once(MAE(), prediction, target))


def r2(prediction: Array, target: Array) -> float:
    """See `R2`."""
    n_outputs = prediction.size // max(len(prediction), 1)
    return float(_once(R2(max(n_outputs, 1)), prediction, target))
