"""Losses: values at the extremes, and a gradient that is the derivative of the returned value."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

from nnx import Loss, MeanSquaredError, SoftmaxNLL, check_gradients
from nnx.backends import Backend, backend_of

Arguments = dict[str, Any]


class Problem:
    """A loss with random predictions and targets, of either kind."""

    def __init__(
        self, kind: str, rng: np.random.Generator, dtype: Any, shape: tuple[int, ...] = (7, 4)
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.prediction = (3 * rng.standard_normal(shape)).astype(dtype)
        self.loss: Loss
        self.oracle: Any
        if kind == "nll":
            self.loss, self.oracle = SoftmaxNLL(), oracles.softmax_nll
            self.target = rng.integers(0, shape[-1], shape[:-1])
        else:
            self.loss, self.oracle = MeanSquaredError(), oracles.mean_squared_error
            self.target = rng.standard_normal(shape).astype(dtype)
        self.weight = rng.uniform(0.2, 2, math.prod(shape[:-1])).astype(dtype)

    def __call__(self, backend: Backend, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        return call(self.loss, backend, self.prediction, self.target, **arguments)


def call(
    loss: Loss, backend: Backend, prediction: np.ndarray, target: np.ndarray, **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient on the host, and no array written."""
    hosts = [prediction, target]
    weight = arguments.pop("weight", None)
    if weight is not None:
        hosts.append(weight)
    arrays = [backend.asarray(a) for a in hosts]
    before = [a.copy() for a in hosts]
    value, gradient = loss(*arrays, **arguments)
    assert backend_of(value) is backend
    for there, here in zip(arrays, before, strict=True):
        assert_same_bits(backend.to_numpy(there), here)
    assert gradient is not None
    return backend.to_numpy(value), backend.to_numpy(gradient)


both = pytest.mark.parametrize("kind", ["nll", "mse"])


# ---- values and gradients of both ------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 5), (7, 4), (33, 31), (257, 3), (2, 257), (0, 3), (2, 3, 4), (2, 0, 4), (5,)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_agrees_with_the_loops(
    kind: str,
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    weighted: bool,
) -> None:
    problem = Problem(kind, rng, dtype, shape)
    if len(shape) == 1 and kind == "mse":
        problem.weight = rng.uniform(0.2, 2, shape).astype(dtype)  # here an axis of samples
    weight = problem.weight if weighted else None
    value, gradient = problem(backend, weight=weight)
    expected = problem.oracle(problem.prediction, problem.target, weight)
    assert_close(value, expected[0], depth=math.prod(shape), dtype=dtype)
    assert_close(gradient, expected[1], dtype=dtype)


@both
def test_gradient_is_the_derivative_of_the_value(
    kind: str, backend: Backend, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, np.float64)
    for weight in (None, problem.weight):
        arguments: Arguments = {"weight": weight}
        _, gradient = problem(backend, **arguments)
        numeric = np.empty_like(gradient)
        for index in np.ndindex(gradient.shape):  # entry by entry, without nnx.check
            kept = problem.prediction[index]
            ends = []
            for h in (1e-5, -1e-5):
                problem.prediction[index] = kept + h
                ends.append(float(problem(backend, **arguments)[0]))
            problem.prediction[index] = kept
            numeric[index] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, rtol=1e-7, atol=1e-10)
        check_gradients(problem.loss, problem.prediction, problem.target, weight, backend=backend)


@both
def test_value_alone_is_the_same_value(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype)
    arrays = [backend.asarray(a) for a in (problem.prediction, problem.target, problem.weight)]
    both_of_them, gradient = problem.loss(*arrays)
    alone, nothing = problem.loss(*arrays, need_gradient=False)
    assert nothing is None
    assert gradient is not None
    assert_same_bits(backend.to_numpy(alone), backend.to_numpy(both_of_them))


@both
@pytest.mark.parametrize("as_array", [False, True])
def test_normalizer_and_grad_scale(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator, as_array: bool
) -> None:
    problem = Problem(kind, rng, dtype)
    convert: Callable[[float], Any] = float
    if as_array:
        convert = lambda a: backend.asarray(np.array(a, dtype))  # noqa: E731
    for weight in (None, problem.weight):
        value, gradient = problem(
            backend, weight=weight, normalizer=convert(5.5), grad_scale=convert(1024.0)
        )
        expected = problem.oracle(problem.prediction, problem.target, weight, 5.5, 1024.0)
        assert_close(value, expected[0], dtype=dtype)
        assert_close(gradient / dtype.type(1024), expected[1] / 1024, dtype=dtype)


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_parts_add_up_to_that_of_the_batch(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator, weighted: bool
) -> None:
    problem = Problem(kind, rng, dtype, (10, 4))
    weight = problem.weight if weighted else None
    whole = problem(backend, weight=weight)
    total = float(problem.weight.sum()) if weighted else 10.0
    parts = [
        call(
            problem.loss,
            backend,
            problem.prediction[cut],
            problem.target[cut],
            weight=None if weight is None else weight[cut],
            normalizer=total,
        )
        for cut in (slice(0, 4), slice(4, 8), slice(8, 10))
    ]
    assert_close(np.sum([p[0] for p in parts], dtype=dtype), whole[0], depth=10)
    assert_close(np.concatenate([p[1] for p in parts]), whole[1], depth=10)


@both
def test_weight_two_is_a_sample_given_twice(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (5, 4))
    weight = np.array([1, 2, 1, 0, 3], dtype)
    value, gradient = problem(backend, weight=weight)
    rows = [0, 1, 1, 2, 4, 4, 4]
    twice = call(problem.loss, backend, problem.prediction[rows], problem.target[rows])
    assert_close(value, twice[0])
    assert_close(gradient[[0, 1, 2, 4]], twice[1][[0, 1, 3, 4]] * weight[[0, 1, 2, 4], None])
    np.testing.assert_array_equal(gradient[3], 0)


@both
def test_no_weight_at_all_is_a_loss_of_0_and_a_gradient_of_0(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (5, 4))
    for arguments in (
        {"weight": np.zeros(5, dtype)},
        {"normalizer": 0.0},
        {"weight": np.zeros(5, dtype), "normalizer": 3.0},
    ):
        value, gradient = problem(backend, **arguments)
        assert_same_bits(value, np.zeros((), dtype))
        np.testing.assert_array_equal(gradient, np.zeros((5, 4)))


@both
def test_a_sample_without_weight_counts_for_nothing_whatever_it_holds(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (5, 4))
    weight = np.array([1, 0, 2, 0, 1], dtype)
    expected = problem(backend, weight=weight)
    problem.prediction[1] = np.nan
    problem.prediction[3] = 1e30
    if kind == "nll":
        problem.target[3] = 99
    value, gradient = problem(backend, weight=weight)
    assert_same_bits(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


@both
def test_empty_batch_is_0(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    value, gradient = Problem(kind, rng, dtype, (0, 4))(backend)
    assert_same_bits(value, np.zeros((), dtype))
    assert gradient.shape == (0, 4)


@both
def test_leading_axes_are_samples(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (2, 3, 4))
    flat = [problem.prediction.reshape(6, 4), problem.target.reshape(6, *problem.target.shape[2:])]
    for weight in (None, problem.weight):
        value, gradient = problem(backend, weight=weight)
        expected = call(problem.loss, backend, flat[0], flat[1], weight=weight)
        assert_same_bits(value, expected[0])
        assert_same_bits(gradient, expected[1].reshape(2, 3, 4))
    square = problem(backend, weight=problem.weight.reshape(2, 3))
    assert_same_bits(square[1], gradient)


@both
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("weights", [None, "shared", "own"])
def test_k_models_have_the_losses_of_k_batches(
    kind: str,
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    shared: bool,
    weights: str | None,
) -> None:
    problem = Problem(kind, rng, dtype, (3, 5, 4))
    target = problem.target[0] if shared else problem.target
    weight = {None: None, "shared": problem.weight[:5], "own": problem.weight.reshape(3, 5)}[
        weights
    ]
    loss = type(problem.loss)(n_models=3)
    value, gradient = call(loss, backend, problem.prediction, target, weight=weight)
    assert value.shape == (3,)
    for k in range(3):
        expected = problem.oracle(
            problem.prediction[k],
            target if shared else target[k],
            weight if weight is None or weights == "shared" else weight[k],
        )
        assert_close(value[k], expected[0], dtype=dtype)
        assert_close(gradient[k], expected[1], dtype=dtype)
    normalizer = backend.asarray(np.array([1, 2, 4], dtype))
    scaled, _ = call(
        loss, backend, problem.prediction, target, weight=weight, normalizer=normalizer
    )
    totals = (
        np.full(3, 5.0) if weight is None else np.broadcast_to(weight, (3, 5)).sum(1, np.float64)
    )
    assert_close(scaled, value.astype(np.float64) * totals / [1, 2, 4], depth=5, dtype=dtype)
    target = target if kind == "nll" else target.astype(np.float64)
    check_gradients(loss, problem.prediction, target, weight, backend=backend)


@both
def test_shapes_that_do_not_belong_together_are_errors(kind: str) -> None:
    loss: Loss = SoftmaxNLL() if kind == "nll" else MeanSquaredError()
    several: Loss = type(loss)(n_models=3)

    def target(*shape: int) -> np.ndarray:
        return np.zeros(shape[:-1], np.int64) if kind == "nll" else np.zeros(shape)

    what = "labels" if kind == "nll" else "targets"
    with pytest.raises(ValueError, match=rf"expected {what} of shape \(5,.*got \(4,"):
        loss(np.zeros((5, 2)), target(4, 2))
    with pytest.raises(ValueError, match=rf"expected {what} of shape \(2, 3.*got \(3, 2"):
        loss(np.zeros((2, 3, 4)), target(3, 2, 4))
    with pytest.raises(ValueError, match=rf"expected {what} of shape \(3, 5.*got \(2, 5"):
        several(np.zeros((3, 5, 2)), target(2, 5, 2))
    with pytest.raises(ValueError, match=r"sample weights of shape \(5,\), got \(4,\)"):
        loss(np.zeros((5, 2)), target(5, 2), np.ones(4))
    with pytest.raises(ValueError, match=r"sample weights of shape \(2, 3\), got \(3, 2\)"):
        loss(np.zeros((2, 3, 4)), target(2, 3, 4), np.ones((3, 2)))
    for shape in ((5, 2), (2, 5, 2), (1, 3, 5, 2), (5,)):
        with pytest.raises(ValueError, match=r"expected predictions \(3, N, n\) of 3 models"):
            several(np.zeros(shape), target(*shape))


# ---- softmax and negative log-likelihood -----------------------------------------------------


def test_a_gap_of_ten_thousand_is_exact(backend: Backend, dtype: Any) -> None:
    logits = np.array([[1e4, 0], [0, 1e4], [-1e4, 0]], dtype)
    value, gradient = call(SoftmaxNLL(), backend, logits, np.array([1, 1, 1]))
    assert_close(value, 1e4 / 3, dtype=dtype)
    third = 1 / 3
    assert_close(gradient, np.array([[third, -third], [0, 0], [0, 0]]), dtype=dtype)
    for label, expected in ((0, 0.0), (1, 1e4)):
        value, gradient = call(SoftmaxNLL(), backend, logits[:1], np.array([label]))
        assert_same_bits(value, np.array(expected, dtype))
        assert_same_bits(np.abs(gradient), np.full((1, 2), float(label), dtype))


def test_a_small_loss_beside_large_logits_keeps_its_digits(backend: Backend, dtype: Any) -> None:
    # log(1 + exp(-8)) = 3.354e-4; `max + log(sum) - z[label]` gives 0 in float32
    value, gradient = call(SoftmaxNLL(), backend, np.array([[1e4, 9992]], dtype), np.array([0]))
    eps = float(np.finfo(dtype).eps)
    assert value == pytest.approx(math.log1p(math.exp(-8)), rel=eps / 3e-4)
    assert float(value) == pytest.approx(3.354e-4, rel=1e-3)
    assert gradient[0, 1] == pytest.approx(math.exp(-8) / (1 + math.exp(-8)), rel=10 * eps)


def test_logits_of_minus_infinity_are_classes_that_cannot_be(backend: Backend, dtype: Any) -> None:
    logits = np.array([[0, -np.inf, 0], [1, 2, -np.inf]], dtype)
    value, gradient = call(SoftmaxNLL(), backend, logits, np.array([0, 1]))
    expected = oracles.softmax_nll([[0, 0], [1, 2]], [0, 1])
    assert_close(value, expected[0], dtype=dtype)
    assert_close(gradient[:, :2], np.array([[-0.25, 0], expected[1][1]]), dtype=dtype)
    assert_close(gradient[:, 2], np.array([0.25, 0]), dtype=dtype)
    value, gradient = call(SoftmaxNLL(), backend, logits, np.array([1, 0]))
    assert_same_bits(value, np.array(np.inf, dtype))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("label", [-1, 3, -(2**62), 2**62])
def test_a_label_out_of_range_shows_as_nan(backend: Backend, dtype: Any, label: int) -> None:
    logits = np.arange(12, dtype=dtype).reshape(4, 3)
    value, gradient = call(SoftmaxNLL(), backend, logits, np.array([0, label, 2, 1]))
    assert np.isnan(value)
    assert np.isnan(gradient[1]).all()
    assert np.isfinite(gradient[[0, 2, 3]]).all()
    several = SoftmaxNLL(n_models=2)
    losses, _ = call(several, backend, np.stack([logits, logits]), np.array([[0] * 4, [label] * 4]))
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])


def test_nan_logits_show_as_nan(backend: Backend, dtype: Any) -> None:
    logits = np.array([[0, np.nan, 1], [1, 2, 3]], dtype)
    value, gradient = call(SoftmaxNLL(), backend, logits, np.array([0, 1]))
    assert np.isnan(value)
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(gradient[1]).all()


def test_rows_of_the_gradient_sum_to_zero(
    backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem("nll", rng, dtype, (33, 257))
    for weight in (None, problem.weight):
        _, gradient = problem(backend, weight=weight)
        atol = 8 * float(np.finfo(dtype).eps) * float(np.abs(gradient).max())
        np.testing.assert_allclose(gradient.sum(axis=1, dtype=np.float64), 0, atol=atol)


def test_equal_logits_give_the_logarithm_of_the_number_of_classes(
    backend: Backend, dtype: Any
) -> None:
    value, _ = call(SoftmaxNLL(), backend, np.full((3, 10), 7, dtype), np.array([0, 5, 9]))
    assert_close(value, math.log(10), dtype=dtype)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_labels_may_be_any_integers(backend: Backend, rng: np.random.Generator, kind: str) -> None:
    problem = Problem("nll", rng, np.float64, (300, 4))
    expected = problem(backend)
    problem.target = problem.target.astype(kind)
    value, gradient = problem(backend)
    assert_same_bits(value, expected[0])
    assert_same_bits(gradient, expected[1])


@pytest.mark.parametrize("kind", ["float32", "float64", "bool"])
def test_labels_that_are_no_integers_are_an_error(kind: str) -> None:
    with pytest.raises(TypeError, match=f"SoftmaxNLL: expected integer labels, got {kind}"):
        SoftmaxNLL()(np.zeros((3, 2)), np.zeros(3, kind))


# ---- mean squared error ----------------------------------------------------------------------


def test_mean_squared_error_by_hand(backend: Backend, dtype: Any) -> None:
    # differences (1, -2), (0, 4): squares 5 and 16, means 2.5 and 8, mean of both 5.25;
    # gradient 2 / 2 * difference / 2
    prediction, target = np.array([[1, 2], [3, 4]], dtype), np.array([[0, 4], [3, 0]], dtype)
    value, gradient = call(MeanSquaredError(), backend, prediction, target)
    assert_same_bits(value, np.array(5.25, dtype))
    assert_same_bits(gradient, np.array([[0.5, -1], [0, 2]], dtype))


def test_mean_squared_error_of_columns_and_vectors_agree(
    backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem("mse", rng, dtype, (7, 1))
    column = problem(backend, weight=problem.weight)
    vector = call(
        problem.loss, backend, problem.prediction[:, 0], problem.target[:, 0], weight=problem.weight
    )
    assert_same_bits(vector[0], column[0])
    assert_same_bits(vector[1], column[1][:, 0])


def test_mean_squared_error_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"targets of shape \(5, 1\), got \(5,\)"):
        MeanSquaredError()(np.zeros((5, 1)), np.zeros(5))


@both
def test_predictions_that_are_no_floats_are_an_error(kind: str) -> None:
    loss: Loss = SoftmaxNLL() if kind == "nll" else MeanSquaredError()
    for dtype in ("int64", "float16"):
        with pytest.raises(TypeError, match=f"expected float32 or float64, got {dtype}"):
            loss(np.zeros((3, 2), dtype), np.zeros((3, 2), dtype))


def test_targets_of_another_dtype_are_an_error() -> None:
    with pytest.raises(TypeError, match="expected float32 targets, got float64"):
        MeanSquaredError()(np.zeros((3, 2), np.float32), np.zeros((3, 2)))


@pytest.mark.gpu
@both
def test_arrays_of_two_backends_are_an_error(kind: str) -> None:
    import nnx

    loss: Loss = SoftmaxNLL() if kind == "nll" else MeanSquaredError()
    target = np.zeros(3, np.int64) if kind == "nll" else np.zeros((3, 2))
    with pytest.raises(TypeError, match="cupy and numpy"):
        loss(nnx.get_backend("cupy").asarray(np.zeros((3, 2))), target)


def test_losses_describe_themselves() -> None:
    assert repr(SoftmaxNLL()) == "SoftmaxNLL()"
    assert repr(MeanSquaredError(n_models=3)) == "MeanSquaredError(n_models=3)"
    assert SoftmaxNLL(**SoftmaxNLL(n_models=2).config()).n_models == 2
