"""Metrics: sums kept on the device over the batches of an epoch and read once at its end.

Samples count alike: weights are the loss's business. Where a quotient is 0/0 the metric is 0 (what
scikit-learn calls `zero_division=0`). Counts are int64 and other sums float64, so that an epoch's
total doesn't lose digits. With K models every result has a leading axis of K.

The classes go into `Trainer.fit(metrics=[...])`; the functions of the same names measure arrays of
a single model at once, and wait for the device.
"""

from __future__ import annotations

import math
from typing import Any

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
        """A fresh total: an array of any shape, after an axis of K models if there are."""
        raise NotImplementedError

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        """Add a batch to `total`."""
        raise NotImplementedError

    def result(self, total: np.ndarray, n: int) -> Any:
        """The metric over `n` samples, from the total on the host: a float, or one per model."""
        raise NotImplementedError


class Accuracy(Metric):
    """Fraction of samples whose largest output is at the label; of equal ones the first counts.

    Args:
        ignore_index: Samples with this label count for nothing, as in `SoftmaxNLL`.
    """

    name = "accuracy"

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        models = () if n_models is None else (n_models,)
        if self.ignore_index is None:
            return backend.xp.zeros(models, np.int64)
        return backend.xp.zeros((2, *models), np.int64)  # right ones, and those that count

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        backend = backend_of(total, prediction, target)
        if target.dtype.kind == "f":  # of a soft target the largest entry is the label
            labels = backend.empty(target.shape[:-1], np.int64)
            target = backend.xp.argmax(target, axis=-1, out=labels)
        if self.ignore_index is None:
            backend.count_correct(prediction, target, total)
            return
        counts = target != self.ignore_index
        target = backend.xp.where(counts, target, -1)
        backend.count_correct(prediction, target, total[0, ...])
        total[1] += counts.sum(axis=-1)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return _quotient(total, n) if self.ignore_index is None else _quotient(total[0], total[1])


class TopKAccuracy(Metric):
    """Fraction of samples whose label is among the k largest outputs.

    Of equal outputs those of lower classes count as larger, so that k=1 is `Accuracy`.

    Args:
        k: At least 1.
    """

    def __init__(self, k: int = 5) -> None:
        if k != int(k) or k < 1:
            raise ValueError(f"TopKAccuracy: expected an integer k of at least 1, got {k!r}")
        self.k = k
        self.name = f"top_{k}_accuracy"

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        return backend.xp.zeros(() if n_models is None else (n_models,), np.int64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        xp = backend_of(total, prediction, target).xp
        scores, labels, valid = _rows(xp, prediction, target, total.size)
        at_label = xp.take_along_axis(scores, labels[..., None], axis=-1)
        earlier = xp.arange(scores.shape[-1]) < labels[..., None]
        # counted from below, so that NaN is among the largest
        rank = scores.shape[-1] - (scores <= at_label).sum(axis=-1)
        rank += ((scores == at_label) & earlier).sum(axis=-1)
        total += ((rank < self.k) & valid).sum(axis=-1).reshape(total.shape)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return _quotient(total, n)


class LogLoss(Metric):
    """Mean negative log-likelihood of the labels, without weights or smoothing.

    Args:
        from_logits: Whether predictions are logits; else probabilities, of which those below the
            dtype's epsilon count as epsilon, as in scikit-learn.

    Shape:
        Class scores `(N, C)` with labels `(N,)` or soft targets `(N, C)`; or one output per sample,
        `(N,)` or `(N, 1)`, the logit or probability of class 1, with targets of 0 and 1.
    """

    name = "log_loss"

    def __init__(self, from_logits: bool = True) -> None:
        self.from_logits = from_logits

    def start(self, backend: Backend, n_models: int | None) -> Array:  # noqa: D102
        return backend.xp.zeros(() if n_models is None else (n_models,), np.float64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        backend = backend_of(total, prediction, target)
        xp, dtype = backend.xp, prediction.dtype
        if not self.from_logits:
            low = float(np.finfo(dtype).eps)
            prediction = xp.clip(prediction, low, None)
        if prediction.ndim - total.ndim == 1 or prediction.shape[-1] == 1:
            z = _flat(prediction, total.size)
            t = _like(target, z).astype(dtype)
            if self.from_logits:  # log(1 + exp(z)) - t z
                loss = xp.maximum(z, 0) - z * t + xp.log1p(xp.exp(-xp.abs(z)))
            else:
                loss = -(t * xp.log(z) + (1 - t) * xp.log(xp.clip(1 - z, low, None)))
            total += loss.sum(axis=-1, dtype=np.float64).reshape(total.shape)
            return
        logits = prediction if self.from_logits else xp.log(prediction)
        soft = target.dtype.kind == "f"
        scores, labels, valid = _rows(xp, logits, target, total.size, need_labels=not soft)
        # a label out of range makes the loss NaN
        targets = target.reshape(-1, *scores.shape[1:]) if soft else xp.where(valid, labels, -1)
        for k in range(total.size):
            t = targets[k if len(targets) > 1 else 0]
            if self.from_logits:
                loss, _ = backend.softmax_nll(scores[k], t, normalizer=1.0, need_gradient=False)
            elif soft:
                loss = -(scores[k] * t).sum(dtype=np.float64)
            else:
                at_label = xp.take_along_axis(scores[k], t[:, None], axis=1)[:, 0]
                loss = -xp.where(t < 0, math.nan, at_label).sum(dtype=np.float64)
            total.reshape(-1)[k : k + 1] += loss

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return _quotient(total, n)


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
        xp, c = backend_of(total, prediction, target).xp, self.n_classes
        n_models = total.size // c**2
        if prediction.dtype.kind == "f":
            if prediction.shape[-1] != c:
                raise ValueError(
                    f"ConfusionMatrix: expected scores of {c} classes, got {prediction.shape}"
                )
            scores, labels, valid = _rows(xp, prediction, target, n_models)
            predicted = scores.argmax(axis=-1)
        else:
            predicted = _flat(prediction, n_models).astype(np.int64)
            labels = _like(target, predicted).astype(np.int64)
            valid = (labels >= 0) & (labels < c) & (predicted >= 0) & (predicted < c)
        cell = xp.where(valid, labels * c + predicted, 0) + xp.arange(n_models)[:, None] * c**2
        count = xp.broadcast_to(valid, cell.shape).reshape(-1).astype(np.uint64)
        # CuPy adds uint64 by atomics, but not int64; integers come out the same in any order
        xp.add.at(total.reshape(-1).view(np.uint64), cell.reshape(-1), count)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        return total


class _Binary(Metric):
    """Counts of true positives, false positives and false negatives, and a quotient of them."""

    def __init__(self, threshold: float = 0.5, *, from_logits: bool = False) -> None:
        check_range(type(self).__name__, "threshold", threshold, 0, 1)
        self.threshold, self.from_logits = threshold, from_logits

    def start(self, backend: Backend, n_models: int | None) -> Array:
        return backend.xp.zeros((3,) if n_models is None else (n_models, 3), np.int64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        p, limit = prediction, self.threshold
        if p.ndim == total.ndim + 1 and p.shape[-1] == 2:
            p = p[..., 1] - p[..., 0] if self.from_logits else p[..., 1]
            if target.dtype.kind == "f" and target.ndim >= 2 and target.shape[-1] == 2:
                target = target[..., 1]
        if self.from_logits:  # sigmoid(z) > t where z > log(t / (1 - t))
            limit = math.log(limit / (1 - limit))
        positive = _flat(p, total.size // 3) > p.dtype.type(limit)
        truth = _like(target, positive) > 0.5
        rows = total.reshape(-1, 3)
        for i, hits in enumerate((positive & truth, positive & ~truth, ~positive & truth)):
            rows[:, i] += hits.sum(axis=-1)


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
        tp, fp, _ = np.moveaxis(total, -1, 0)
        return _quotient(tp, tp + fp)


class Recall(_Binary):
    """`tp / (tp + fn)`: of the samples of class 1, the fraction found; otherwise as `Precision`."""

    name = "recall"

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        tp, _, fn = np.moveaxis(total, -1, 0)
        return _quotient(tp, tp + fn)


class F1(_Binary):
    """`2 tp / (2 tp + fp + fn)`, the harmonic mean of `Precision` and `Recall`; used as these."""

    name = "f1"

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        tp, fp, fn = np.moveaxis(total, -1, 0)
        return _quotient(2 * tp, 2 * tp + fp + fn)


class _Error(Metric):
    """A mean over samples and outputs of a function of the difference."""

    def start(self, backend: Backend, n_models: int | None) -> Array:
        return backend.xp.zeros(() if n_models is None else (n_models,), np.float64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        xp = backend_of(total, prediction, target).xp
        y = _flat(prediction, total.size)
        if not y.size:
            return
        n_outputs = y.shape[1] // prediction.shape[total.ndim]
        terms = self._term(xp, y - _like(target, y))
        total += terms.sum(axis=-1, dtype=np.float64).reshape(total.shape) / n_outputs

    def result(self, total: np.ndarray, n: int) -> Any:
        return _quotient(total, n)

    def _term(self, xp: Any, difference: Array) -> Array:
        raise NotImplementedError


class MSE(_Error):
    """Mean squared error, over samples and outputs."""

    name = "mse"

    def _term(self, xp: Any, difference: Array) -> Array:
        return difference * difference


class MAE(_Error):
    """Mean absolute error, over samples and outputs."""

    name = "mae"

    def _term(self, xp: Any, difference: Array) -> Array:
        return xp.abs(difference)


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
        # for each output: samples, first target, sum d, sum d^2, sum (t - y)^2
        shape = (5, self.n_outputs)
        return backend.xp.zeros(shape if n_models is None else (n_models, *shape), np.float64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:  # noqa: D102
        xp, d = backend_of(total, prediction, target).xp, self.n_outputs
        rows = total.reshape(-1, 5, d)
        y = _flat(prediction, len(rows))
        n = y.shape[1] // d
        if n * d != y.shape[1]:
            raise ValueError(f"R2: expected {d} outputs, got predictions {prediction.shape}")
        if not n:
            return
        t = _like(target, y).reshape(-1, n, d).astype(np.float64)
        y = y.reshape(-1, n, d)
        rows[:, 1] = xp.where(rows[:, 0] == 0, t[:, 0], rows[:, 1])
        distance, error = t - rows[:, 1][:, None], t - y
        rows[:, 0] += n
        rows[:, 2] += distance.sum(axis=1)
        rows[:, 3] += (distance * distance).sum(axis=1)
        rows[:, 4] += (error * error).sum(axis=1)

    def result(self, total: np.ndarray, n: int) -> Any:  # noqa: D102
        count, _, first, second, error = np.moveaxis(total, -2, 0)
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


def _like(target: Array, flat: Array) -> Array:
    """The target of flat predictions `(K, M)`: `(K, M)`, or `(1, M)` if all models share it."""
    if target.size == flat.size:
        return target.reshape(flat.shape)
    if target.size != flat.shape[1]:
        raise ValueError(
            f"metrics: expected a target of {flat.shape[1]} elements for each model, "
            f"got shape {target.shape}"
        )
    return target.reshape(1, -1)


def _rows(
    xp: Any, prediction: Array, target: Array, n_models: int, *, need_labels: bool = True
) -> tuple[Array, Array, Array]:
    """Scores `(K, N, C)`, labels int64 `(K or 1, N)` with 0 for those out of range, and which are.

    Of one-hot rows and soft targets the label is the largest entry's.
    """
    n_classes = prediction.shape[-1]
    scores = prediction.reshape(n_models, prediction.size // (n_models * n_classes), n_classes)
    if not need_labels:
        return scores, None, None
    if target.ndim == prediction.ndim or (target.dtype.kind == "f" and target.ndim >= 2):
        target = target.argmax(axis=-1)
    labels = _like(target, scores[..., 0]).astype(np.int64)
    valid = (labels >= 0) & (labels < n_classes)
    return scores, xp.where(valid, labels, 0), valid


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
