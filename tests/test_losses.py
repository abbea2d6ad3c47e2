"""Losses: values at the extremes, and a gradient that is the derivative of the returned value."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

from nnx import (
    NLL,
    SGD,
    BCEWithLogits,
    Hinge,
    Huber,
    Linear,
    Loss,
    MeanAbsoluteError,
    MeanSquaredError,
    Sequential,
    Softmax,
    SoftmaxMSE,
    SoftmaxNLL,
    SquaredHinge,
    Trainer,
    check_gradients,
    mlp,
)
from nnx.backends import Backend, backend_of

Arguments = dict[str, Any]


# Of each kind: how the loss is built, its oracle, and what its targets are.
KINDS: dict[str, tuple[Callable[..., Loss], Any, str]] = {
    "nll": (SoftmaxNLL, oracles.softmax_nll, "labels"),
    "soft nll": (SoftmaxNLL, oracles.cross_entropy, "soft"),
    "probabilities": (NLL, oracles.nll, "labels"),
    "soft probabilities": (NLL, oracles.nll, "soft"),
    "mses": (SoftmaxMSE, oracles.softmax_mse, "labels"),
    "soft mses": (SoftmaxMSE, oracles.softmax_mse, "soft"),
    "mse": (MeanSquaredError, oracles.mean_squared_error, "numbers"),
    "mae": (MeanAbsoluteError, oracles.mean_absolute_error, "numbers"),
    "huber": (Huber, oracles.huber, "numbers"),
    "bce": (BCEWithLogits, oracles.binary_cross_entropy, "chances"),
    "hinge": (Hinge, oracles.hinge, "signs"),
    "squared hinge": (SquaredHinge, oracles.squared_hinge, "signs"),
}
OF_CLASSES = ("labels", "soft")


def random_target(kind: str, rng: np.random.Generator, dtype: Any, shape: Any) -> np.ndarray:
    target: np.ndarray
    if kind == "labels":
        target = rng.integers(0, shape[-1], shape[:-1])
    elif kind == "numbers":
        target = rng.standard_normal(shape).astype(dtype)
    elif kind == "signs":
        target = rng.choice([-1.0, 1.0], shape).astype(dtype)
    else:
        target = rng.uniform(0, 1, shape).astype(dtype)
        target[target < 0.2] = 0
    return target


class Problem:
    """A loss with random predictions and targets."""

    def __init__(
        self, kind: str, rng: np.random.Generator, dtype: Any, shape: tuple[int, ...] = (7, 4)
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.prediction = (3 * rng.standard_normal(shape)).astype(dtype)
        if "probabilities" in kind:
            self.prediction = rng.uniform(0.2, 1, shape).astype(dtype)
        factory, self.oracle, self.target_kind = KINDS[kind]
        self.loss = factory()
        self.target = random_target(self.target_kind, rng, self.dtype, shape)
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


every = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("kind", ["nll", "mse"])


# ---- values and gradients of all ------------------------------------------------------------


@every
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
    if len(shape) == 1 and problem.target_kind not in OF_CLASSES:
        problem.weight = rng.uniform(0.2, 2, shape).astype(dtype)  # here an axis of samples
    weight = problem.weight if weighted else None
    value, gradient = problem(backend, weight=weight)
    flat = [problem.prediction, problem.target]
    if kind == "soft nll":
        flat = [a.reshape(-1, shape[-1]) for a in flat]
    expected = problem.oracle(*flat, weight)
    assert_close(value, expected[0], depth=math.prod(shape), dtype=dtype)
    assert_close(gradient, expected[1].reshape(shape), dtype=dtype)


@every
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


@every
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


@every
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


@every
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


@every
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


@every
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


@every
def test_a_sample_without_weight_counts_for_nothing_whatever_it_holds(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (5, 4))
    weight = np.array([1, 0, 2, 0, 1], dtype)
    expected = problem(backend, weight=weight)
    problem.prediction[1] = np.nan
    problem.prediction[3] = 1e30
    if problem.target_kind == "labels":
        problem.target[3] = 99
    value, gradient = problem(backend, weight=weight)
    assert_same_bits(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


@every
def test_empty_batch_is_0(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    value, gradient = Problem(kind, rng, dtype, (0, 4))(backend)
    assert_same_bits(value, np.zeros((), dtype))
    assert gradient.shape == (0, 4)


@every
def test_leading_axes_are_samples(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (2, 3, 4))
    flat = [a.reshape(6, *a.shape[2:]) for a in (problem.prediction, problem.target)]
    for weight in (None, problem.weight):
        value, gradient = problem(backend, weight=weight)
        expected = call(problem.loss, backend, flat[0], flat[1], weight=weight)
        assert_same_bits(value, expected[0])
        assert_same_bits(gradient, expected[1].reshape(2, 3, 4))
    square = problem(backend, weight=problem.weight.reshape(2, 3))
    assert_same_bits(square[1], gradient)


@every
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
    target = target if problem.target_kind == "labels" else target.astype(np.float64)
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


# ---- class weights, smoothing, ignored labels, soft targets: all together ----------------------


CLASS_WEIGHT = [0.5, 1.0, 2.0, 3.0]
COMBINATIONS = [
    pytest.param(
        {
            "class_weight": CLASS_WEIGHT if weights else None,
            "label_smoothing": 0.1 if smoothing else 0.0,
            "ignore_index": (1 if soft else -100) if ignore else None,
        },
        soft,
        weighted,
        id="-".join(
            name
            for name, on in zip(
                ("class weights", "smoothing", "ignore", "soft", "sample weights"),
                (weights, smoothing, ignore, soft, weighted),
                strict=True,
            )
            if on
        )
        or "plain",
    )
    for weights, smoothing, ignore, soft, weighted in itertools.product((False, True), repeat=5)
]


class Combination:
    """Logits, targets and weights for a combination of options; some samples are ignored."""

    def __init__(
        self, options: Arguments, soft: bool, weighted: bool, rng: np.random.Generator, dtype: Any
    ) -> None:
        self.loss, self.options = SoftmaxNLL(**options), options
        self.logits = (3 * rng.standard_normal((9, 4))).astype(dtype)
        ignore = options["ignore_index"]
        self.target = random_target("soft" if soft else "labels", rng, np.dtype(dtype), (9, 4))
        if soft:
            self.target[2] = self.target[5] = [0, 0.75, 0, 0]  # wholly on class 1
            self.target[6] = 0
            self.target[7] = [0.25, 0, 0, 0.75]
        elif ignore is not None:
            self.target[[2, 5]] = ignore
        self.weight = None
        if weighted:
            self.weight = rng.uniform(0.2, 2, 9).astype(dtype)
            self.weight[3] = 0

    def oracle(self, k: Any = slice(None), *scales: Any) -> tuple[float, np.ndarray]:
        weight = None if self.weight is None else self.weight[k]
        return oracles.cross_entropy(
            self.logits[k], self.target[k], weight, *scales, **self.options
        )


@pytest.mark.parametrize(("options", "soft", "weighted"), COMBINATIONS)
def test_every_combination_agrees_with_the_loops(
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    options: Arguments,
    soft: bool,
    weighted: bool,
) -> None:
    problem = Combination(options, soft, weighted, rng, dtype)
    arguments = (backend, problem.logits, problem.target)
    value, gradient = call(problem.loss, *arguments, weight=problem.weight)
    expected = problem.oracle()
    assert_close(value, expected[0], dtype=dtype)
    assert_close(gradient, expected[1], dtype=dtype)
    value, gradient = call(
        problem.loss, *arguments, weight=problem.weight, normalizer=3.5, grad_scale=4.0
    )
    expected = problem.oracle(slice(None), 3.5, 4.0)
    assert_close(value, expected[0], dtype=dtype)
    assert_close(gradient, expected[1], dtype=dtype)


@pytest.mark.parametrize(("options", "soft", "weighted"), COMBINATIONS)
def test_every_combination_for_k_models(
    backend: Backend,
    rng: np.random.Generator,
    options: Arguments,
    soft: bool,
    weighted: bool,
) -> None:
    problems = [Combination(options, soft, weighted, rng, np.float64) for _ in range(3)]
    logits = np.stack([p.logits for p in problems])
    loss = SoftmaxNLL(**options, n_models=3)
    for own in (True, False):  # targets and weights of each model, or of the first for all
        target = np.stack([p.target for p in problems]) if own else problems[0].target
        weight = problems[0].weight
        if weighted and own:
            weight = np.stack([np.asarray(p.weight) for p in problems])
        value, gradient = call(loss, backend, logits, target, weight=weight)
        for k, problem in enumerate(problems):
            if not own:
                problem.target, problem.weight = problems[0].target, problems[0].weight
            expected = problem.oracle()
            assert_close(value[k], expected[0])
            assert_close(gradient[k], expected[1])


@pytest.mark.parametrize(("options", "soft", "weighted"), COMBINATIONS)
def test_every_combination_is_differentiated(
    backend: Backend, rng: np.random.Generator, options: Arguments, soft: bool, weighted: bool
) -> None:
    problem = Combination(options, soft, weighted, rng, np.float64)
    check_gradients(problem.loss, problem.logits, problem.target, problem.weight, backend=backend)


@pytest.mark.parametrize("options", [pytest.param(p.values[0], id=p.id) for p in COMBINATIONS[::4]])
def test_a_one_hot_row_means_what_its_label_means(
    backend: Backend, rng: np.random.Generator, options: Arguments
) -> None:
    if options["ignore_index"] is not None:
        options = options | {"ignore_index": 2}
    logits, labels = rng.standard_normal((8, 4)), np.array([0, 1, 2, 3, 2, 1, 0, 3])
    for weight in (None, rng.uniform(0, 1, 8)):
        as_labels = call(SoftmaxNLL(**options), backend, logits, labels, weight=weight)
        as_rows = call(SoftmaxNLL(**options), backend, logits, np.eye(4)[labels], weight=weight)
        assert_close(as_rows[0], as_labels[0])
        assert_close(as_rows[1], as_labels[1])


@pytest.mark.parametrize(("options", "soft", "weighted"), COMBINATIONS)
def test_parts_add_up_in_every_combination(
    backend: Backend, rng: np.random.Generator, options: Arguments, soft: bool, weighted: bool
) -> None:
    problem = Combination(options, soft, weighted, rng, np.float64)
    whole = call(problem.loss, backend, problem.logits, problem.target, weight=problem.weight)
    factor = problem.loss.target_weight(problem.target)
    weights = np.ones(9) if problem.weight is None else problem.weight
    total = float((weights if factor is None else weights * factor).sum())
    parts = []
    for cut in (slice(0, 3), slice(3, 9)):
        weight = None if problem.weight is None else problem.weight[cut]
        arrays = (problem.logits[cut], problem.target[cut])
        parts.append(call(problem.loss, backend, *arrays, weight=weight, normalizer=total))
    assert_close(np.array(parts[0][0] + parts[1][0]), whole[0])
    assert_close(np.concatenate([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0]])
def test_a_batch_of_ignored_samples_is_0(
    backend: Backend, dtype: Any, soft: bool, smoothing: float, weights: Any
) -> None:
    logits = np.array([[1e4, 0, -1e4], [np.nan, 1, 2]], dtype)
    target = np.array([[0, 1, 0], [0, 0.5, 0]], dtype) if soft else np.array([1, 1])
    loss = SoftmaxNLL(weights, smoothing, ignore_index=1)
    for weight in (None, np.array([1, 2], dtype)):
        value, gradient = call(loss, backend, logits, target, weight=weight)
        assert_same_bits(value, np.zeros((), dtype))
        assert_same_bits(gradient, np.zeros((2, 3), dtype))


def test_an_ignored_label_may_be_any_integer(backend: Backend, dtype: Any) -> None:
    logits = np.array([[1, 2, 3], [3, 1, 0], [5, 5, 6]], dtype)
    expected = call(SoftmaxNLL(), backend, logits[:2], np.array([0, 2]))
    for ignored in (-100, -1, 3, 2**40):
        loss = SoftmaxNLL(ignore_index=ignored)
        value, gradient = call(loss, backend, logits, np.array([0, 2, ignored]))
        assert_close(value, expected[0])
        assert_close(gradient[:2], expected[1])
        assert_same_bits(gradient[2], np.zeros(3, dtype))
        value, _ = call(loss, backend, logits, np.array([0, 2, 99]))  # another is still wrong
        assert np.isnan(value)


def test_a_label_out_of_range_is_nan_whatever_the_class_weights(
    backend: Backend, dtype: Any
) -> None:
    for weights in ([0, 1, 1], [1, 1, 0]):
        for smoothing in (0.0, 0.1):
            for label in (-1, 3):
                loss = SoftmaxNLL(weights, smoothing)
                logits = np.zeros((2, 3), dtype)
                value, gradient = call(loss, backend, logits, np.array([1, label]))
                assert np.isnan(value)
                assert np.isnan(gradient[1]).all()
                assert np.isfinite(gradient[0]).all()


def test_smoothing_by_hand(backend: Backend, dtype: Any) -> None:
    # equal logits: every class has log 2; q = (0.9, 0.1); the gradient is (0.5, 0.5) - q
    value, gradient = call(
        SoftmaxNLL(label_smoothing=0.2), backend, np.zeros((1, 2), dtype), np.array([0])
    )
    assert_close(value, math.log(2), dtype=dtype)
    assert_close(gradient, np.array([[-0.4, 0.4]]), dtype=dtype)


def test_class_weights_by_hand(backend: Backend, dtype: Any) -> None:
    # losses log 2 and log 4 (p = 1/4) with weights 1 and 3: (log 2 + 3 log 4) / 4 = 1.75 log 2
    logits = np.array([[0, 0], [math.log(3), 0]], dtype)
    value, gradient = call(SoftmaxNLL([1, 3]), backend, logits, np.array([0, 1]))
    assert_close(value, 1.75 * math.log(2), dtype=dtype)
    assert_close(gradient, np.array([[-0.5, 0.5], [2.25, -2.25]]) / 4, dtype=dtype)


def test_soft_targets_need_not_be_normalized(backend: Backend, dtype: Any) -> None:
    # softmax (1/4, 3/4), y = (1, 2): l = log 4 + 2 log (4/3), gradient 3 softmax - y
    logits = np.array([[0, math.log(3)]], dtype)
    value, gradient = call(SoftmaxNLL(), backend, logits, np.array([[1, 2]], dtype))
    assert_close(value, math.log(4) + 2 * math.log(4 / 3), dtype=dtype)
    assert_close(gradient, np.array([[-0.25, 0.25]]), dtype=dtype)


def test_a_term_of_0_is_0_where_the_class_cannot_be(backend: Backend, dtype: Any) -> None:
    logits = np.array([[0, -np.inf, 0], [-np.inf, 2, 2]], dtype)
    target = np.array([[0.5, 0, 0.5], [0, 1, 0]], dtype)
    value, gradient = call(SoftmaxNLL(), backend, logits, target)
    assert_close(value, math.log(2), dtype=dtype)
    assert_close(gradient, np.array([[0, 0, 0], [0, -0.25, 0.25]]), dtype=dtype)
    loss = SoftmaxNLL(class_weight=[1, 0, 1], label_smoothing=0.3)  # weight 0 masks the class
    value, gradient = call(loss, backend, logits[:1], np.array([0]))
    assert_close(value, 0.9 * math.log(2), dtype=dtype)  # q = (0.8, 0, 0.1)
    assert_close(gradient, np.array([[-0.35, 0, 0.35]]), dtype=dtype)
    value, gradient = call(SoftmaxNLL(label_smoothing=0.3), backend, logits, np.array([0, 1]))
    assert_same_bits(value, np.array(np.inf, dtype))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("options", "soft", "weighted"), COMBINATIONS)
def test_logits_of_ten_thousand_in_every_combination(
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    options: Arguments,
    soft: bool,
    weighted: bool,
) -> None:
    problem = Combination(options, soft, weighted, rng, dtype)
    problem.logits = rng.choice([-1e4, 0.0, 1e4], (9, 4)).astype(dtype)
    value, gradient = call(
        problem.loss, backend, problem.logits, problem.target, weight=problem.weight
    )
    expected = problem.oracle()
    assert_close(value, expected[0], dtype=dtype)
    assert_close(gradient, expected[1], dtype=dtype)


def test_arguments_that_make_no_sense_are_errors() -> None:
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"SoftmaxNLL: expected label_smoothing in \[0, 1\]"):
            SoftmaxNLL(label_smoothing=bad)
    for weights in ([[1, 2]], 3.0, [1, -1], [1, math.inf], [math.nan]):
        with pytest.raises(ValueError, match=r"SoftmaxNLL: expected class_weight of .*, finite"):
            SoftmaxNLL(weights)
    with pytest.raises(TypeError, match="expected class_weight as numbers, got 'balanced'"):
        SoftmaxNLL("balanced")
    with pytest.raises(ValueError, match=r"logits \(..., 3\), one for each class weight.*\(4, 2\)"):
        SoftmaxNLL([1, 1, 1])(np.zeros((4, 2)), np.zeros(4, int))
    with pytest.raises(TypeError, match="expected float64 soft targets, got float32"):
        SoftmaxNLL()(np.zeros((4, 2)), np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"soft targets of shape \(4, 2\), got \(3, 2\)"):
        SoftmaxNLL()(np.zeros((4, 2)), np.zeros((3, 2)))


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(("options", "soft", "weighted"), COMBINATIONS)
def test_a_step_is_quiet_in_every_combination(
    rng: np.random.Generator, options: Arguments, soft: bool, weighted: bool
) -> None:
    """Class weights are sent once; afterwards nothing waits, allocates or copies."""
    from test_gpu_step import counted, quiet

    problem = Combination(options, soft, weighted, rng, np.float32)
    trainer = Trainer(mlp([6, 5, 4]), problem.loss, SGD(0.1), backend="cupy")
    on = trainer.backend.asarray
    x, target = on(rng.standard_normal((9, 6)), np.float32), on(problem.target)
    weight = None if problem.weight is None else on(problem.weight)
    trainer.train_step(x, target, weight)
    with counted() as counts:
        trainer.train_step(x, target, weight)
    quiet(counts)
    kernels = {name: n for name, n in counts.launches.items() if "nll" in name}
    several = weighted or options["class_weight"] or options["ignore_index"] is not None
    expected = {"softmax_nll_f32": 1} | ({"softmax_nll_weight_f32": 1} if several else {})
    assert not counts.launches or kernels == expected  # counted by the simulated device only


@pytest.mark.gpu
@pytest.mark.unpoisoned
@every
def test_a_step_is_quiet_with_every_loss(kind: str, rng: np.random.Generator) -> None:
    from test_gpu_step import counted, quiet

    problem = Problem(kind, rng, np.float32, (9, 4))
    layers = [Linear(6, 4, rng=rng), *([Softmax()] if "probabilities" in kind else [])]
    trainer = Trainer(Sequential(*layers), problem.loss, SGD(0.1), backend="cupy")
    on = trainer.backend.asarray
    x, target = on(rng.standard_normal((9, 6)), np.float32), on(problem.target)
    for weight in (None, on(problem.weight)):
        trainer.train_step(x, target, weight)
        trainer.train_step(x, target, weight)  # the slab has grown
        with counted() as counts:
            trainer.train_step(x, target, weight)
        quiet(counts)


# ---- in training -----------------------------------------------------------------------------


def test_training_takes_one_hot_rows_soft_targets_and_ignored_labels(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    x, labels = rng.standard_normal((30, 6)), rng.integers(0, 4, 30)

    def run(target: Any, loss: Loss, **arguments: Any) -> Any:
        trainer = Trainer(mlp([6, 5, 4], dtype="float64"), loss, SGD(0.5), backend=backend)
        trainer.fit(x, target, epochs=2, batch_size=8, **arguments)
        return trainer

    expected = run(labels, SoftmaxNLL()).history
    assert run(np.eye(4)[labels], SoftmaxNLL()).history == expected
    assert run(np.eye(4, dtype=int)[labels], SoftmaxNLL()).history == expected
    soft = run(np.eye(4)[labels] * 0.9 + 0.025, SoftmaxNLL()).history
    smoothed = run(labels, SoftmaxNLL(label_smoothing=0.1)).history
    for name, values in smoothed.items():
        np.testing.assert_allclose(soft[name], values, rtol=1e-12)
    with pytest.raises(ValueError, match="expected finite, non-negative soft targets"):
        run(np.eye(4)[labels] - 0.1, SoftmaxNLL())
    some = labels.copy()
    some[::3] = -100
    with pytest.raises(ValueError, match=r"expected labels in 0..3, got -100"):
        run(some, SoftmaxNLL())
    trainer = run(some, SoftmaxNLL(ignore_index=-100))
    kept = trainer.evaluate(x[some >= 0], some[some >= 0])["loss"]
    for batch_size in (4, 7, 30):  # the mean is over what counts, however it is cut
        scores = trainer.evaluate(x, some, batch_size=batch_size)
        assert scores["loss"] == pytest.approx(kept, rel=1e-12)
    weighted = run(labels, SoftmaxNLL(CLASS_WEIGHT))
    whole = weighted.evaluate(x, labels)["loss"]
    assert weighted.evaluate(x, labels, batch_size=7)["loss"] == pytest.approx(whole, rel=1e-12)


def test_training_checks_the_targets_of_each_loss_once() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3))
    loss: Loss

    def run(loss: Loss, target: Any) -> None:
        Trainer(mlp([3, 2]), loss, SGD(0.1)).fit(x, target)

    zeros = np.zeros((4, 2))
    for loss in (Hinge(), SquaredHinge()):
        run(loss, zeros - 1)
        with pytest.raises(
            ValueError, match=r"expected labels -1 and \+1, got 0; map .* 2 \* t - 1"
        ):
            run(loss, zeros)
    run(BCEWithLogits(), zeros.astype(bool))
    with pytest.raises(ValueError, match=r"targets in \[0, 1\], got -1"):
        run(BCEWithLogits(), zeros - 1)
    for loss in (NLL(), SoftmaxMSE(), SoftmaxNLL()):
        with pytest.raises(ValueError, match=r"expected labels in 0..1, got 2"):
            run(loss, np.array([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="expected 4 finite targets"):
        run(Huber(), np.full((4, 2), np.nan))


def test_what_targets_weigh() -> None:
    labels, soft = np.array([0, 3, -1]), np.array([[0, 0, 0, 2.0], [0.5, 0, 0, 0.5], [0] * 4])
    assert SoftmaxNLL().target_weight(labels) is None
    assert MeanSquaredError().target_weight(soft) is None
    loss = SoftmaxNLL(CLASS_WEIGHT, ignore_index=-1)
    np.testing.assert_array_equal(loss.target_weight(labels), [0.5, 3, 0])
    np.testing.assert_array_equal(loss.target_weight(soft), [3, 1.75, 0])
    np.testing.assert_array_equal(SoftmaxNLL(ignore_index=3).target_weight(soft), [0, 1, 1])


# ---- probabilities ---------------------------------------------------------------------------


def test_nll_by_hand(backend: Backend, dtype: Any) -> None:
    p = np.array([[0.8, 0.15, 0.05]], dtype)
    value, gradient = call(NLL(), backend, p, np.array([0]))
    assert float(value) == pytest.approx(0.22314, abs=5e-6)
    assert_close(gradient, np.array([[-1.25, 0, 0]]), dtype=dtype)


def test_nll_after_softmax_has_the_gradient_of_softmax_nll(
    backend: Backend, rng: np.random.Generator
) -> None:
    logits = 4 * rng.standard_normal((9, 5))
    for target in (rng.integers(0, 5, 9), rng.uniform(0, 1, (9, 5))):
        p, saved = Softmax().forward(backend.asarray(logits))
        assert float(p.min()) > 1e-12
        for weight in (None, backend.asarray(rng.uniform(0, 1, 9))):
            value, dp = NLL()(p, backend.asarray(target), weight)
            dx = Softmax().backward(dp, saved)
            expected = SoftmaxNLL()(backend.asarray(logits), backend.asarray(target), weight)
            assert_close(backend.to_numpy(value), backend.to_numpy(expected[0]))
            assert_close(backend.to_numpy(dx), backend.to_numpy(expected[1]))


def test_a_probability_of_0_at_the_label_is_an_infinite_loss(backend: Backend, dtype: Any) -> None:
    p = np.array([[0, 1, 0], [0.5, 0.5, 0]], dtype)
    value, gradient = call(NLL(), backend, p, np.array([0, 1]))
    assert_same_bits(value, np.array(np.inf, dtype))
    assert np.isfinite(gradient).all()
    value, gradient = call(NLL(), backend, p, np.array([1, 1]))  # 0 log 0 is 0
    assert_close(value, math.log(2) / 2, dtype=dtype)
    tiny = np.array([[1e-44, 1, 0]], dtype)  # not a normal number in float32
    _, gradient = call(NLL(), backend, tiny, np.array([0]))
    assert np.isfinite(gradient).all()


def test_softmax_mse_is_that_of_the_full_jacobian(
    backend: Backend, rng: np.random.Generator
) -> None:
    """As the text has it that this loss comes from: an array of samples x classes x classes."""
    logits, labels = rng.standard_normal((8, 5)), rng.integers(0, 5, 8)
    y = np.eye(5)[labels]
    s = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    jacobian = s[:, :, None] * (np.eye(5) - s[:, None, :])
    expected = (2 / 5 * (s - y)[:, :, None] * jacobian).sum(axis=1) / 8
    for target in (labels, y):
        value, gradient = call(SoftmaxMSE(), backend, logits, target)
        np.testing.assert_allclose(value, ((s - y) ** 2).mean(), rtol=1e-12)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [NLL(), SoftmaxMSE()], ids=repr)
@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_out_of_range_are_nan_for_all(
    backend: Backend, dtype: Any, loss: Loss, label: int
) -> None:
    p = np.full((2, 3), 0.25, dtype)
    value, gradient = call(loss, backend, p, np.array([1, label]))
    assert np.isnan(value)
    assert np.isfinite(gradient[0]).all()
    assert np.isnan(gradient[1]).any()


# ---- numbers, and yes or no ------------------------------------------------------------------


def by_hand(
    loss: Loss, backend: Backend, dtype: Any, p: Any, t: Any, value: float, gradient: Any
) -> None:
    found = call(loss, backend, np.array(p, dtype), np.array(t, dtype))
    assert_close(found[0], value, dtype=dtype)
    assert_close(found[1], np.array(gradient, np.float64), dtype=dtype)


def test_mean_absolute_error_by_hand(backend: Backend, dtype: Any) -> None:
    # |1|, |-2|, |0|, |4| have mean 1.75; at 0 the derivative is 0
    by_hand(MeanAbsoluteError(), backend, dtype, [[1, 2], [3, 4]], [[0, 4], [3, 0]], 1.75,
            [[0.25, -0.25], [0, 0.25]])  # fmt: skip


def test_huber_by_hand(backend: Backend, dtype: Any) -> None:
    # delta 2: 1/2, then 2 (3 - 1) = 4, on the edge 2^2 / 2 = 2, and 0
    by_hand(Huber(2), backend, dtype, [[1, -3], [2, 5]], [[0, 0], [0, 5]], 6.5 / 4,
            [[0.25, -0.5], [0.5, 0]])  # fmt: skip
    for delta in (0, -1, math.nan):
        with pytest.raises(ValueError, match="Huber: expected delta in"):
            Huber(delta)


def test_hinges_by_hand(backend: Backend, dtype: Any) -> None:
    # margins t p are 0.5, -2, 1 (on the kink) and 3: 1 - t p is 0.5, 3, 0 and -2
    p, t = [0.5, 2, -1, 3], [1, -1, -1, 1]
    by_hand(Hinge(), backend, dtype, p, t, 3.5 / 4, [-0.25, 0.25, 0, 0])
    by_hand(SquaredHinge(), backend, dtype, p, t, 9.25 / 4, [-0.25, 1.5, 0, 0])


def test_bce_by_hand(backend: Backend, dtype: Any) -> None:
    # at logit 0 both logarithms are log 2; at log 3 the chance is 3/4
    p, t = [[0, 0], [math.log(3), 0]], [[0, 1], [1, 0.5]]
    expected = (3 * math.log(2) + math.log(4 / 3)) / 4
    by_hand(BCEWithLogits(), backend, dtype, p, t, expected, [[0.125, -0.125], [-0.0625, 0]])


@pytest.mark.parametrize("pos_weight", [2.5, [0.5, 1.0, 4.0]])
def test_pos_weight_is_the_factor_of_the_positive_terms(
    backend: Backend, dtype: Any, rng: np.random.Generator, pos_weight: Any
) -> None:
    loss = BCEWithLogits(pos_weight)
    x = (3 * rng.standard_normal((7, 3))).astype(dtype)
    t = random_target("chances", rng, dtype, (7, 3))
    value, gradient = call(loss, backend, x, t)
    pairs = [
        [oracles._binary(float(a), float(b), np.broadcast_to(pos_weight, 3)[j])
         for j, (a, b) in enumerate(zip(row, wanted, strict=True))]
        for row, wanted in zip(x, t, strict=True)
    ]  # fmt: skip
    expected = np.array(pairs) / 21
    assert_close(value, expected[..., 0].sum(), depth=21, dtype=dtype)
    assert_close(gradient, expected[..., 1], dtype=dtype)
    check_gradients(loss, x, t.astype(np.float64), backend=backend)
    if isinstance(pos_weight, list):
        with pytest.raises(ValueError, match=r"logits \(..., 3\), one for each pos_weight"):
            loss(np.zeros((2, 4)), np.zeros((2, 4)))


def test_bce_keeps_the_digits_of_small_chances(backend: Backend) -> None:
    x, t = np.array([[-50.0, 50.0]]), np.array([[0.0, 1.0]])
    value, gradient = call(BCEWithLogits(), backend, x, t)
    assert value == pytest.approx(math.exp(-50), rel=1e-12)
    np.testing.assert_allclose(gradient, [[math.exp(-50) / 2, -math.exp(-50) / 2]], rtol=1e-12)


@every
def test_predictions_of_ten_thousand_are_no_trouble(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (9, 4))
    if "probabilities" not in kind:
        problem.prediction = rng.choice([-1e4, -1.0, 0.0, 1e4], (9, 4)).astype(dtype)
    value, gradient = problem(backend, weight=problem.weight)
    expected = problem.oracle(problem.prediction, problem.target, problem.weight)
    assert_close(value, expected[0], dtype=dtype)
    assert_close(gradient, expected[1], dtype=dtype)


@every
def test_strided_arrays_are_read_by_value(
    kind: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    problem = Problem(kind, rng, dtype, (10, 8))
    cut = np.s_[::2, ::2]
    rows = problem.target.ndim == 2
    target = problem.target[cut] if rows else problem.target[::2] % 4
    weight = problem.weight[:5]
    expected = call(problem.loss, backend, problem.prediction[cut], target, weight=weight)
    p, t = backend.asarray(problem.prediction)[cut], backend.asarray(problem.target)
    t = t[cut] if rows else t[::2] % 4
    every_other = backend.asarray(np.repeat(weight, 2))[::2]
    value, gradient = problem.loss(p, t, every_other)
    assert gradient is not None
    assert_close(backend.to_numpy(value), expected[0])
    assert_close(backend.to_numpy(gradient), expected[1])


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
    assert repr(SoftmaxNLL([1, 2], ignore_index=-1)) == (
        "SoftmaxNLL(class_weight=[1.0, 2.0], ignore_index=-1)"
    )
    assert repr(Huber()) == "Huber()"
    for loss in (SoftmaxNLL([1, 2], 0.1, -1, 3), Huber(2.0), BCEWithLogits([1, 2]), NLL(2)):
        assert repr(type(loss)(**loss.config())) == repr(loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_a_class_of_weight_zero_counts_for_nothing_whatever_the_batch(
    soft: bool, smoothing: float, backend: Backend, rng: np.random.Generator
) -> None:
    """Otherwise a batch of that class alone would have terms, but no denominator."""
    x, t = rng.standard_normal((8, 5)), np.array([0, 0, 0, 1, 2, 0, 1, 2])
    target = np.eye(3)[t] if soft else t
    loss = SoftmaxNLL([0, 1, 2], smoothing)
    model = mlp([5, 3], dtype="float64")
    trainer = Trainer(model, loss, SGD(), backend=backend)
    values = [trainer.evaluate(x, target, batch_size=n)["loss"] for n in (1, 2, 3, 8)]
    np.testing.assert_allclose(values, values[0], rtol=1e-12)
    counted = t != 0
    alone = trainer.evaluate(x[counted], target[counted])["loss"]
    np.testing.assert_allclose(values[0], alone, rtol=1e-12)
    logits = backend.asarray(rng.standard_normal((8, 3)))
    _, gradient = loss(logits, backend.asarray(target))
    assert gradient is not None
    assert (backend.to_numpy(gradient)[~counted] == 0).all()
    assert (backend.to_numpy(gradient)[counted] != 0).any()
