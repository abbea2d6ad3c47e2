"""Metrics: sums on the device, read once. Oracles are loops over Python floats."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnx
from nnx import (
    F1,
    MAE,
    MSE,
    R2,
    Accuracy,
    ConfusionMatrix,
    LogLoss,
    Metric,
    Precision,
    Recall,
    TopKAccuracy,
    accuracy,
    metrics,
)
from nnx.backends import Backend
from nnx.backends.arena import Arena


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


# ---- oracles: of one model, float64 loops ------------------------------------------------------


def _softmax_loss(row: list[float], label: int) -> float:
    return math.log(math.fsum(math.exp(z - row[label]) for z in row))


def oracle_log_loss(y: Any, t: Any) -> float:
    return math.fsum(map(_softmax_loss, y.tolist(), t.tolist())) / max(len(y), 1)


def oracle_binary_log_loss(y: Any, t: Any) -> float:
    terms = [
        math.log1p(math.exp(-z if label else z))
        for z, label in zip(y.ravel().tolist(), t.ravel().tolist(), strict=True)
    ]
    return math.fsum(terms) / max(len(y), 1)


def oracle_top_k(k: int) -> Callable[[Any, Any], float]:
    def share(y: Any, t: Any) -> float:
        hits = [
            label in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
            for row, label in zip(y.tolist(), t.tolist(), strict=True)
        ]
        return sum(hits) / max(len(hits), 1)

    return share


def oracle_matrix(y: Any, t: Any) -> Any:
    matrix = [[0] * y.shape[1] for _ in range(y.shape[1])]
    for row, label in zip(y.tolist(), t.tolist(), strict=True):
        matrix[label][row.index(max(row))] += 1
    return np.array(matrix)


def _counts(y: Any, t: Any, threshold: float) -> tuple[int, int, int]:
    pairs = list(zip((y.ravel() > y.dtype.type(threshold)).tolist(), t.ravel() == 1, strict=True))
    return pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))


def oracle_precision(y: Any, t: Any) -> float:
    tp, fp, _ = _counts(y, t, 0.3)
    return tp / (tp + fp) if tp + fp else 0.0


def oracle_recall(y: Any, t: Any) -> float:
    tp, _, fn = _counts(y, t, 0.3)
    return tp / (tp + fn) if tp + fn else 0.0


def oracle_f1(y: Any, t: Any) -> float:
    p, r = oracle_precision(y, t), oracle_recall(y, t)
    return 2 * p * r / (p + r) if p + r else 0.0


def oracle_mse(y: Any, t: Any) -> float:
    gaps = (y.astype(np.float64) - t.astype(np.float64)).ravel().tolist()
    return math.fsum(g * g for g in gaps) / max(len(gaps), 1)


def oracle_mae(y: Any, t: Any) -> float:
    gaps = (y.astype(np.float64) - t.astype(np.float64)).ravel().tolist()
    return math.fsum(map(abs, gaps)) / max(len(gaps), 1)


def oracle_r2(y: Any, t: Any) -> float:
    found = []
    for a, b in zip(np.atleast_2d(y.T).tolist(), np.atleast_2d(t.T).tolist(), strict=True):
        if not b:
            return 0.0
        mean = math.fsum(b) / len(b)
        error = math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        spread = math.fsum((q - mean) ** 2 for q in b)
        found.append(1 - error / spread if spread else float(error == 0))
    return math.fsum(found) / len(found)


def logits(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.standard_normal((n, 5)).round(1), rng.integers(0, 5, n)


def one_logit(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return 3 * rng.standard_normal((n, 1)), rng.integers(0, 2, n)


def probabilities(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.choice([0.1, 0.3, 0.5, 0.9], n), rng.integers(0, 2, n)


def numbers(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.standard_normal((n, 3)), rng.standard_normal((n, 3))


CASES: dict[str, tuple[Callable[[], Metric], Any, Any]] = {
    "accuracy": (Accuracy, logits, oracle_top_k(1)),
    "top 1": (lambda: TopKAccuracy(1), logits, oracle_top_k(1)),
    "top 3": (lambda: TopKAccuracy(3), logits, oracle_top_k(3)),
    "top 9": (lambda: TopKAccuracy(9), logits, oracle_top_k(9)),
    "log loss": (LogLoss, logits, oracle_log_loss),
    "binary log loss": (LogLoss, one_logit, oracle_binary_log_loss),
    "confusion matrix": (lambda: ConfusionMatrix(5), logits, oracle_matrix),
    "precision": (lambda: Precision(0.3), probabilities, oracle_precision),
    "recall": (lambda: Recall(0.3), probabilities, oracle_recall),
    "f1": (lambda: F1(0.3), probabilities, oracle_f1),
    "mse": (MSE, numbers, oracle_mse),
    "mae": (MAE, numbers, oracle_mae),
    "r2": (lambda: R2(3), numbers, oracle_r2),
}
each = pytest.mark.parametrize("name", CASES)


def gather(
    metric: Metric, backend: Backend, y: Any, t: Any, cuts: list[int], models: int | None = None
) -> Any:
    """The metric over batches that end at `cuts`."""
    total = metric.start(backend, models)
    n = len(y) if models is None else y.shape[1]
    for a, b in zip([0, *cuts], [*cuts, n], strict=True):
        batch = np.s_[a:b] if models is None else np.s_[:, a:b]
        shared = models is None or t.shape[0] != models
        target = t[a:b] if shared else t[:, a:b]
        metric.update(total, backend.asarray(y[batch]), backend.asarray(target))
    return metric.result(backend.to_numpy(total), n)


@each
@pytest.mark.parametrize("n", [0, 1, 37])
def test_metrics_agree_with_the_loops(
    name: str, backend: Backend, dtype: Any, rng: np.random.Generator, n: int
) -> None:
    make, draw, oracle = CASES[name]
    y, t = draw(rng, n)
    y = y.astype(dtype)
    expected = oracle(y, t) if n or name == "confusion matrix" else 0.0
    for cuts in ([], [n // 3, n // 2]):
        found = gather(make(), backend, y, t, cuts)
        rtol = 1e-6 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
        if name == "confusion matrix":
            assert (found.dtype, found.shape) == (np.int64, (5, 5))
        else:
            assert type(found) is float


@each
@pytest.mark.parametrize("shared", [True, False])
def test_metrics_of_models(
    name: str, backend: Backend, dtype: Any, rng: np.random.Generator, shared: bool
) -> None:
    make, draw, oracle = CASES[name]
    pairs = [draw(rng, 37) for _ in range(3)]
    y = np.stack([y for y, _ in pairs]).astype(dtype)
    t = pairs[0][1] if shared else np.stack([t for _, t in pairs])
    found = gather(make(), backend, y, t, [10, 20], models=3)
    expected = [oracle(y[k], t if shared else t[k]) for k in range(3)]
    rtol = 1e-6 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
    assert found.shape[0] == 3


def one_hot(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.standard_normal((n, 5)), np.eye(5, dtype=np.float32)[rng.integers(0, 5, n)]


def classes(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.integers(0, 5, n), rng.integers(0, 5, n).astype(np.int32)


def shares(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.dirichlet(np.ones(5), n), rng.integers(0, 5, n).astype(np.int32)


def two_logits(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return rng.standard_normal((n, 2)), rng.integers(0, 2, n)


# launches of an update: those of CASES, and what else may come
LAUNCHES: dict[str, tuple[Callable[[], Metric], Any, int]] = {
    "accuracy": (*CASES["accuracy"][:2], 1),
    "accuracy, labels ignored": (lambda: Accuracy(3), logits, 1),
    "accuracy, one-hot rows": (Accuracy, one_hot, 2),
    "top 3": (*CASES["top 3"][:2], 1),
    "top 3, labels ignored": (lambda: TopKAccuracy(3, 1), logits, 1),
    "log loss": (*CASES["log loss"][:2], 2),
    "log loss, labels ignored": (lambda: LogLoss(ignore_index=1), logits, 5),
    "log loss, one-hot rows": (LogLoss, one_hot, 2),
    "log loss of probabilities": (lambda: LogLoss(False), shares, 4),
    "binary log loss": (*CASES["binary log loss"][:2], 3),
    "confusion matrix": (*CASES["confusion matrix"][:2], 1),
    "confusion matrix, classes": (lambda: ConfusionMatrix(5), classes, 2),
    "precision": (*CASES["precision"][:2], 2),
    "precision of two logits": (lambda: Precision(from_logits=True), two_logits, 3),
    "recall": (*CASES["recall"][:2], 2),
    "f1": (*CASES["f1"][:2], 2),
    "mse": (*CASES["mse"][:2], 2),
    "mae": (*CASES["mae"][:2], 2),
    "r2": (*CASES["r2"][:2], 8),
}


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("models", [None, 3])
def test_no_update_waits_or_asks_for_memory(
    name: str, models: int | None, rng: np.random.Generator
) -> None:
    from test_gpu_step import counted, quiet

    backend = nnx.get_backend("cupy")
    make, draw, launches = LAUNCHES[name]
    y, t = draw(rng, 37)
    y, t = (a.astype(np.float32) if a.dtype == np.float64 else a for a in (y, t))
    y = y if models is None else np.stack([y] * models)
    metric, y, t = make(), backend.asarray(y), backend.asarray(t)
    total, arena = metric.start(backend, models), Arena(backend.xp)
    for _ in range(3):
        with counted() as counts, arena.step(None):
            metric.update(total, y, t)
    quiet(counts)
    if counts.launches:  # the simulated device counts them
        assert counts.total == launches


# ---- by hand -----------------------------------------------------------------------------------


def test_precision_recall_and_f1_by_hand(backend: Backend, dtype: Any) -> None:
    # above 0.5: 0.9 0.8 0.7 (labels 1 0 1); not above: 0.5 0.2 (labels 1 0)
    p = backend.asarray(np.array([0.9, 0.8, 0.7, 0.5, 0.2], dtype))
    t = backend.asarray(np.array([1, 0, 1, 1, 0]))
    for target in (t, t.astype(dtype), t[:, None]):
        assert metrics.precision(p, target) == 2 / 3
        assert metrics.recall(p, target) == 2 / 3
        assert metrics.f1(p, target) == pytest.approx(2 / 3, rel=1e-15)
    assert metrics.recall(p, t, 0.45) == 1  # 0.5 is found too
    assert metrics.precision(p, t, 0.85) == 1


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.3])
def test_a_probability_at_the_threshold_is_of_class_0(
    backend: Backend, dtype: Any, threshold: float
) -> None:
    p = np.array([threshold, np.nextafter(dtype.type(threshold), dtype.type(1))], dtype)
    one = backend.asarray(np.array([1, 1]))
    assert metrics.recall(backend.asarray(p), one, threshold) == 0.5
    zero = backend.asarray(np.zeros(2, dtype))  # of a logit, sigmoid(0) == 0.5
    assert metrics.recall(zero, one, from_logits=True) == 0
    assert metrics.recall(zero, one, 0.49, from_logits=True) == 1


def test_precision_of_two_outputs_is_that_of_class_1(backend: Backend, dtype: Any) -> None:
    z = np.array([[0, 2], [1, 0], [0, -3], [4, 4.5]], dtype)
    t = np.array([1, 1, 0, 0])
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    for target in (t, np.eye(2, dtype=dtype)[t]):
        b, target = backend.asarray(z), backend.asarray(target)
        assert metrics.precision(b, target, from_logits=True) == 0.5
        assert metrics.precision(backend.asarray(p), target) == 0.5
        assert metrics.precision(backend.asarray(p), target, 0.7) == 1


def test_recall_falls_as_the_threshold_rises(backend: Backend, rng: np.random.Generator) -> None:
    p, t = backend.asarray(rng.uniform(0, 1, 50)), backend.asarray(rng.integers(0, 2, 50))
    found = [metrics.recall(p, t, threshold) for threshold in np.linspace(0.01, 0.99, 30).tolist()]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9 > 0.1 > found[-1]


def test_confusion_matrix_by_hand(backend: Backend, dtype: Any) -> None:
    scores = np.array([[3, 1, 0], [0, 2, 2], [1, 1, 5], [9, 0, 0], [0, 0, 1]], dtype)  # 0 1 2 0 2
    labels = np.array([0, 1, 1, 2, 2])
    expected = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1]])
    predicted = backend.asarray(np.array([0, 1, 2, 0, 2], np.int32))
    for target in (labels, np.eye(3, dtype=dtype)[labels], np.eye(3, dtype=int)[labels]):
        found = metrics.confusion_matrix(backend.asarray(scores), backend.asarray(target), 3)
        np.testing.assert_array_equal(found, expected)
    found = metrics.confusion_matrix(predicted, backend.asarray(labels), 3)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64
    p, r, f = metrics.precision_recall_f1(found)
    np.testing.assert_allclose(p, [1 / 2, 1, 1 / 2])
    np.testing.assert_allclose(r, [1, 1 / 2, 1 / 2])
    np.testing.assert_allclose(f, [2 / 3, 2 / 3, 1 / 2])


def test_a_label_out_of_range_is_not_counted(backend: Backend, dtype: Any) -> None:
    scores = backend.asarray(np.array([[1, 0], [1, 0], [1, 0]], dtype))
    labels = backend.asarray(np.array([0, -1, 2]))
    found = metrics.confusion_matrix(scores, labels, 2)
    np.testing.assert_array_equal(found, [[1, 0], [0, 0]])
    assert metrics.top_k_accuracy(scores, labels, 2) == 1 / 3
    assert math.isnan(metrics.log_loss(scores, labels))


def test_labels_and_one_hot_rows_give_the_same(backend: Backend, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    scores, labels = backend.asarray(rng.standard_normal((20, 5)), dtype), rng.integers(0, 5, 20)
    for kind in ("int64", "bool", dtype):
        one, two = backend.asarray(labels), backend.asarray(np.eye(5)[labels].astype(kind))
        assert accuracy(scores, one) == accuracy(scores, two)
        for k in (1, 2):
            found = [metrics.top_k_accuracy(scores, t, k) for t in (one, two)]
            assert found[0] == found[1]
        if kind == dtype:
            found = [metrics.log_loss(scores, t) for t in (one, two)]
            assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_not_a_number_counts_as_the_largest(backend: Backend, dtype: Any) -> None:
    scores = backend.asarray(np.array([[np.nan, 1, 0], [0, np.nan, 2]], dtype))
    labels = backend.asarray(np.array([1, 1]))
    assert accuracy(scores, labels) == 0.5
    assert metrics.top_k_accuracy(scores, labels, 1) == 0.5
    assert metrics.top_k_accuracy(scores, labels, 2) == 1  # only NaN is above the 1


def test_log_loss_by_hand(backend: Backend, dtype: Any) -> None:
    p = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], dtype)
    t = backend.asarray(np.array([0, 2]))
    expected = (math.log(2) + math.log(8)) / 2
    rel = 1e-6
    assert metrics.log_loss(backend.asarray(p), t, from_logits=False) == pytest.approx(expected)
    assert metrics.log_loss(backend.asarray(np.log(p)), t) == pytest.approx(expected, rel=rel)
    soft = backend.asarray(np.array([[0.5, 0.5, 0], [0, 0, 1]], dtype))
    expected = (math.log(2) / 2 + math.log(4) / 2 + math.log(8)) / 2
    assert metrics.log_loss(backend.asarray(p), soft, from_logits=False) == pytest.approx(expected)
    assert metrics.log_loss(backend.asarray(np.log(p)), soft) == pytest.approx(expected, rel=rel)
    one = backend.asarray(np.array([0.5, 0.25], dtype))
    t = backend.asarray(np.array([1, 0]))
    expected = (math.log(2) - math.log(0.75)) / 2
    assert metrics.log_loss(one, t, from_logits=False) == pytest.approx(expected, rel=rel)


def test_log_loss_of_extremes(backend: Backend, dtype: Any) -> None:
    z = backend.asarray(np.array([[1e4, -1e4], [-1e4, 1e4]], dtype))
    assert metrics.log_loss(z, backend.asarray(np.array([0, 0]))) == 1e4
    one = backend.asarray(np.array([1e4, -1e4], dtype))
    assert metrics.log_loss(one, backend.asarray(np.array([0, 0]))) == 5e3
    p = backend.asarray(np.array([[1, 0], [0, 1]], dtype))
    limit = -math.log(np.finfo(dtype).eps) / 2
    found = metrics.log_loss(p, backend.asarray(np.array([0, 0])), from_logits=False)
    assert found == pytest.approx(limit, rel=1e-6)
    flat = backend.asarray(np.array([1, 0], dtype))
    found = metrics.log_loss(flat, backend.asarray(np.array([0, 0])), from_logits=False)
    assert found == pytest.approx(limit, rel=1e-6)


def test_errors_of_numbers_by_hand(backend: Backend, dtype: Any) -> None:
    y = backend.asarray(np.array([1, 2, 4], dtype))
    t = backend.asarray(np.array([2, 2, 2.5], dtype))
    assert metrics.mse(y, t) == pytest.approx((1 + 0 + 2.25) / 3, rel=1e-12)
    assert metrics.mae(y, t) == pytest.approx((1 + 0 + 1.5) / 3, rel=1e-12)
    # mean 13/6; spread 2/36 + 4/36 = 1/6; error 3.25
    assert metrics.r2(y, t) == pytest.approx(1 - 3.25 * 6, rel=1e-12)
    assert metrics.mse(y[:, None], t) == metrics.mse(y, t)  # a column isn't spread out to (3, 3)


def test_r2_of_constant_and_of_far_targets(backend: Backend) -> None:
    far = 1e8 + np.array([0, 1, 2, 3.0])
    y = far + np.array([0.5, 0, 0, 0])
    found = gather(R2(), backend, y, far, [1, 3])
    assert found == pytest.approx(1 - 0.25 / 5, rel=1e-12)
    same = backend.asarray(np.full(3, 0.1))
    assert metrics.r2(same, same) == 1
    assert metrics.r2(same + 1, same) == 0


@pytest.mark.parametrize(
    "empty", [metrics.precision, metrics.recall, metrics.f1, metrics.mse, metrics.mae, metrics.r2]
)
def test_nothing_over_nothing_is_0(backend: Backend, dtype: Any, empty: Any) -> None:
    nothing = backend.asarray(np.empty(0, dtype))
    assert empty(nothing, nothing) == 0
    zero = backend.asarray(np.zeros(3, dtype))
    if empty in (metrics.precision, metrics.recall, metrics.f1):
        assert empty(zero, zero) == 0
    p, r, f = metrics.precision_recall_f1(np.zeros((2, 2), np.int64))
    assert not np.concatenate([p, r, f]).any()


# ---- in training -------------------------------------------------------------------------------


def test_the_trainer_gathers_them_all(backend: Backend, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((30, 4)), rng.integers(0, 3, 30)
    trainer = nnx.Trainer(nnx.mlp([4, 8, 3]), nnx.SoftmaxNLL(), nnx.Adam(0.01), backend=backend)
    wanted = [Accuracy(), TopKAccuracy(2), LogLoss(), ConfusionMatrix(3)]
    trainer.fit(x, t, epochs=2, batch_size=8, validation=(x, t), metrics=wanted)
    scores = trainer.evaluate(x, t, batch_size=7, metrics=wanted)
    y = trainer.predict(x)
    np.testing.assert_array_equal(scores["confusion_matrix"], oracle_matrix(y, t))
    assert scores["top_2_accuracy"] == oracle_top_k(2)(y, t)
    assert scores["log_loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert trainer.history["log_loss"] == pytest.approx(trainer.history["loss"], rel=1e-5)
    trainer.history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = scores["confusion_matrix"]
    assert rows[-1]["validation_confusion_matrix[1,2]"] == str(last[1, 2])
    assert rows[-1]["validation_confusion_matrix[2,0]"] == str(last[2, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKAccuracy(0), "TopKAccuracy: expected an integer k of at least 1, got 0"),
        (lambda: ConfusionMatrix(2.5), "ConfusionMatrix: .* got 2.5"),  # type: ignore[arg-type]
        (lambda: Precision(0), r"Precision: expected threshold in \(0, 1\), got 0"),
        (lambda: R2(0), "R2: expected an integer n_outputs of at least 1, got 0"),
        (
            lambda: metrics.mse(np.zeros(3), np.zeros(4)),
            r"target of 3 elements .* got shape \(4,\)",
        ),
        (
            lambda: metrics.confusion_matrix(np.zeros((3, 2)), np.zeros(3, int), 3),
            r"scores of 3 classes, got \(3, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


IGNORING: dict[str, tuple[Callable[[int], Metric], Any, Any]] = {
    "accuracy": (Accuracy, logits, oracle_top_k(1)),
    "top 2": (lambda i: TopKAccuracy(2, i), logits, oracle_top_k(2)),
    "log loss": (lambda i: LogLoss(ignore_index=i), logits, oracle_log_loss),
    "binary log loss": (lambda i: LogLoss(ignore_index=i), one_logit, oracle_binary_log_loss),
    "log loss of probabilities": (
        lambda i: LogLoss(False, i),
        shares,
        lambda y, t: math.fsum(-math.log(p[j]) for p, j in zip(y, t, strict=True)) / max(len(y), 1),
    ),
}


@pytest.mark.parametrize("name", IGNORING)
@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_metrics_leave_out_ignored_labels(
    name: str,
    models: int | None,
    ignored: int,
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    make, draw, oracle = IGNORING[name]
    y, t = draw(rng, 23)
    y = (y if models is None else np.stack([y + 0.1 * k for k in range(models)])).astype(dtype)
    t[::3] = ignored
    rtol = 1e-6 if dtype == np.float32 else 1e-12
    for cuts in ([], [3, 11]):
        found = gather(make(ignored), backend, y, t, cuts, models)
        kept = t != ignored
        expected = [oracle(one[kept], t[kept]) for one in y.reshape(-1, *y.shape[-2:])]
        np.testing.assert_allclose(np.reshape(found, -1), expected, rtol=rtol)
    t[:] = ignored
    np.testing.assert_array_equal(gather(make(ignored), backend, y, t, [], models), 0)


def test_log_loss_ignores_labels_only(backend: Backend, dtype: Any) -> None:
    rows = np.eye(3, dtype=dtype)
    with pytest.raises(TypeError, match="LogLoss: expected integer labels with ignore_index"):
        gather(LogLoss(ignore_index=1), backend, rows, rows, [])


@pytest.mark.parametrize("n_models", [None, 3])
def test_accuracy_leaves_out_ignored_labels(n_models: int | None, backend: Backend) -> None:
    """4 of 7 labels count, of which 3 are right; alone, nothing counts and the accuracy is 0."""
    scores = np.eye(3)[[0, 1, 2, 0, 1, 2, 0]]
    labels = np.array([0, 1, -100, -100, 1, 0, -100])
    if n_models:
        scores = np.repeat(scores[None], n_models, axis=0)
    metric = nnx.Accuracy(ignore_index=-100)
    for kept, expected in ((np.s_[:], 3 / 4), (np.s_[2:4], 0.0)):
        total = metric.start(backend, n_models)
        cut = scores[:, kept] if n_models else scores[kept]
        metric.update(total, backend.asarray(cut), backend.asarray(labels[kept]))
        result = metric.result(backend.to_numpy(total), len(labels))
        np.testing.assert_array_equal(result, np.full(n_models or (), expected))


def test_the_default_accuracy_ignores_what_the_loss_ignores(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    t = np.arange(60) % 3
    x = 4 * np.eye(3)[t] + rng.standard_normal((60, 3))
    t[::2] = -1
    trainer = nnx.Trainer(
        nnx.mlp([3, 3]), nnx.SoftmaxNLL(ignore_index=-1), nnx.Adam(0.1), backend=backend
    )
    history = trainer.fit(x, t, epochs=20, batch_size=7, validation=(x, t))
    assert history["accuracy"][-1] > 0.9
    assert history["validation_accuracy"][-1] > 0.9
