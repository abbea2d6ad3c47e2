"""The checker must be able to fail: it is fed wrong backward passes of every usual kind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import assert_same_bits

from nnx import (
    SGD,
    Dropout,
    Layer,
    Linear,
    Loss,
    MeanSquaredError,
    ReLU,
    Sequential,
    Softmax,
    SoftmaxNLL,
    Tanh,
    Trainer,
    check_gradients,
    mlp,
)
from nnx.backends import Backend, backend_of

Backward = Callable[[Any, Any, Any], Any]
"""(layer, dy, what forward saved) -> dx"""


def linear(**options: Any) -> Linear:
    return Linear(4, 4, rng=np.random.default_rng(0), dtype=np.float64, **options)


class Wrong(Layer):
    """The forward pass of a layer, and a backward pass that isn't its derivative."""

    def __init__(self, layer: Layer, backward: Backward) -> None:
        self.layer = layer
        self.wrong = backward

    def forward(self, x: Any, *, step: Any = None) -> tuple[Any, Any]:
        y, saved = self.layer.forward(x, step=step)
        return y, (saved, y)

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        return self.wrong(self.layer, dy, saved)


def right(layer: Any, dy: Any, saved: Any) -> Any:
    return layer.backward(dy, saved[0])


def mask_dropped(layer: Any, dy: Any, saved: Any) -> Any:
    return dy


def wrong_sign(layer: Any, dy: Any, saved: Any) -> Any:
    return -layer.backward(dy, saved[0])


def transposed_weight(layer: Any, dy: Any, saved: Any) -> Any:
    layer.backward(dy, saved[0])
    return dy @ layer.weight.value


def transposed_weight_gradient(layer: Any, dy: Any, saved: Any) -> Any:
    dx = layer.backward(dy, saved[0])
    layer.weight.grad[...] = layer.weight.grad.T.copy()
    return dx


def bias_gradient_a_mean(layer: Any, dy: Any, saved: Any) -> Any:
    dx = layer.backward(dy, saved[0])
    layer.bias.grad[...] = dy.mean(axis=0)
    return dx


def bias_gradient_missing(layer: Any, dy: Any, saved: Any) -> Any:
    dx = layer.backward(dy, saved[0])
    layer.bias.grad.fill(0)
    return dx


def bias_gradient_of_the_last_row(layer: Any, dy: Any, saved: Any) -> Any:
    dx = layer.backward(dy, saved[0])
    layer.bias.grad[...] = dy[-1]
    return dx


def without_the_sum(layer: Any, dy: Any, saved: Any) -> Any:
    y = saved[1]
    return dy * y * (1 - y)  # the diagonal of softmax's Jacobian only


def derivative_of_the_output(layer: Any, dy: Any, saved: Any) -> Any:
    return dy * (1 - saved[1])  # tanh' = 1 - y^2


def not_a_number(layer: Any, dy: Any, saved: Any) -> Any:
    dx = layer.backward(dy, saved[0])
    dx[0, 0] = np.nan
    return dx


def infinite(layer: Any, dy: Any, saved: Any) -> Any:
    dx = layer.backward(dy, saved[0])
    dx[0, 0] = np.inf
    return dx


def zero(layer: Any, dy: Any, saved: Any) -> Any:
    layer.backward(dy, saved[0])
    return 0 * dy


def off_by_one_in_a_million(layer: Any, dy: Any, saved: Any) -> Any:
    return layer.backward(dy, saved[0]) * (1 + 1e-6)


def scale_forgotten(layer: Any, dy: Any, saved: Any) -> Any:
    return layer.backward(dy, saved[0]) * (1 - layer.p)


CASES: list[tuple[Callable[[], Layer], Backward, str]] = [
    (ReLU, mask_dropped, "input"),
    (ReLU, wrong_sign, "input"),
    (ReLU, zero, "input"),
    (linear, transposed_weight, "input"),
    (linear, transposed_weight_gradient, "layer.weight"),
    (linear, bias_gradient_a_mean, "layer.bias"),
    (linear, bias_gradient_missing, "layer.bias"),
    (linear, bias_gradient_of_the_last_row, "layer.bias"),
    (linear, off_by_one_in_a_million, "input"),
    (linear, not_a_number, "input"),
    (linear, infinite, "input"),
    (Softmax, without_the_sum, "input"),
    (Tanh, derivative_of_the_output, "input"),
    (lambda: Dropout(0.5), mask_dropped, "input"),
    (lambda: Dropout(0.5), scale_forgotten, "input"),
]


@pytest.mark.parametrize(
    ("make", "backward", "where"), CASES, ids=[f"{c[1].__name__}-{i}" for i, c in enumerate(CASES)]
)
@pytest.mark.parametrize("draws", [1, 3])
def test_wrong_gradients_are_caught(
    make: Callable[[], Layer],
    backward: Backward,
    where: str,
    draws: int,
    backend: Backend,
    rng: np.random.Generator,
) -> None:
    x = rng.standard_normal((5, 4))
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(AssertionError, match=rf"gradient of {where} along .*relative error"),
    ):
        check_gradients(
            Wrong(make().to(backend), backward), x, rng=rng, backend=backend, draws=draws
        )


@pytest.mark.parametrize("make", [ReLU, linear, Softmax, Tanh, lambda: Dropout(0.5)])
def test_right_gradients_pass(
    make: Callable[[], Layer], backend: Backend, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((5, 4))
    error = check_gradients(Wrong(make().to(backend), right), x, rng=rng, backend=backend)
    assert 0 < error < 1e-7


def test_a_gradient_that_overwrites_instead_of_adding_is_caught(rng: np.random.Generator) -> None:
    class Overwriting(Linear):
        def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
            self.weight.fresh = True
            return super().backward(dy, saved, need_dx=need_dx)

    layer = Overwriting(4, 4, rng=rng, dtype=np.float64)
    with pytest.raises(AssertionError, match="gradient of weight: a second backward pass doesn't"):
        check_gradients(layer, rng.standard_normal((5, 4)))
    with pytest.raises(AssertionError, match=r"gradient of 0\.weight"):
        check_gradients(Sequential(layer, layer), rng.standard_normal((5, 4)))


def test_a_layer_that_keeps_the_inputs_gradient_to_itself_is_named(
    rng: np.random.Generator,
) -> None:
    class Silent(Tanh):
        def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
            return None

    with pytest.raises(TypeError, match=r"Silent\(\): backward gives None"):
        check_gradients(Silent(), rng.standard_normal((5, 4)))


def test_biases_are_randomized(rng: np.random.Generator) -> None:
    # at a bias of 0 this wrong gradient would be right
    class Scaled(Linear):
        def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
            dx = super().backward(dy, saved, need_dx=need_dx)
            assert self.bias is not None
            self.bias.grad *= 1 + self.bias.value
            return dx

    with pytest.raises(AssertionError, match="gradient of bias"):
        check_gradients(Scaled(4, 4, rng=rng, dtype=np.float64), rng.standard_normal((5, 4)))


# ---- losses ----------------------------------------------------------------------------------


class WrongLoss(Loss):
    """The value of a loss, and a gradient that isn't its derivative."""

    def __init__(self, loss: Loss, change: Callable[[Any], Any]) -> None:
        super().__init__(loss.n_models)
        self.loss, self.change = loss, change

    def __call__(
        self, prediction: Any, target: Any, weight: Any = None, **arguments: Any
    ) -> tuple[Any, Any]:
        value, gradient = self.loss(prediction, target, weight, **arguments)
        return value, self.change(gradient)


def missing_mean(gradient: Any) -> Any:
    return gradient * gradient.shape[-2]


def half(gradient: Any) -> Any:
    return gradient / 2


def negative(gradient: Any) -> Any:
    return -gradient


def with_a_nan(gradient: Any) -> Any:
    gradient[..., 0] = np.nan
    return gradient


def first_row_lost(gradient: Any) -> Any:
    gradient[..., 0, :] = 0
    return gradient


@pytest.mark.parametrize("change", [missing_mean, half, negative, with_a_nan, first_row_lost])
@pytest.mark.parametrize("models", [None, 2])
@pytest.mark.parametrize("kind", [SoftmaxNLL, MeanSquaredError])
def test_wrong_gradients_of_losses_are_caught(
    kind: type[Loss],
    models: int | None,
    change: Callable[[Any], Any],
    backend: Backend,
    rng: np.random.Generator,
) -> None:
    shape = (7, 4) if models is None else (models, 7, 4)
    x, loss = rng.standard_normal(shape), kind(n_models=models)
    t = rng.integers(0, 4, shape[:-1]) if kind is SoftmaxNLL else rng.standard_normal(shape)
    for weight in (None, rng.uniform(0.5, 2, 7)):
        assert check_gradients(loss, x, t, weight, rng=rng, backend=backend) < 1e-7
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(AssertionError, match="gradient of prediction"),
        ):
            check_gradients(WrongLoss(loss, change), x, t, weight, rng=rng, backend=backend)


# ---- manners ---------------------------------------------------------------------------------


def test_parameters_come_back_as_they_were(backend: Backend, rng: np.random.Generator) -> None:
    model = mlp([4, 5, 3], dropout=0.5, dtype=np.float64).to(backend)
    before = {n: backend.to_numpy(a).copy() for n, a in model.state().items()}
    x = rng.standard_normal((5, 4))
    copy = x.copy()
    check_gradients(model, x)
    with pytest.raises(AssertionError):
        check_gradients(Wrong(model, wrong_sign), x)
    for name, array in model.state().items():
        assert backend_of(array) is backend
        assert_same_bits(backend.to_numpy(array), before[name])
    assert_same_bits(x, copy)


def test_the_check_repeats_itself(rng: np.random.Generator) -> None:
    model, x = mlp([4, 5, 3], dtype=np.float64), rng.standard_normal((5, 4))
    assert check_gradients(model, x) == check_gradients(model, x)


def test_float32_parameters_are_an_error_that_names_one() -> None:
    with pytest.raises(TypeError, match=r"got 0\.weight in float32; .*dtype='float64'"):
        check_gradients(mlp([2, 3, 1]), np.ones((4, 2)))


def test_float32_input_is_checked_in_float64() -> None:
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    assert check_gradients(mlp([2, 3, 1], dtype=np.float64), x) < 1e-7


def test_the_check_leaves_no_gradients_behind(backend: Backend, rng: np.random.Generator) -> None:
    layer, x = linear().to(backend), rng.standard_normal((5, 4))
    for wrong in (False, True):
        if wrong:
            with pytest.raises(AssertionError):
                check_gradients(Wrong(layer, wrong_sign), x)
        else:
            check_gradients(layer, x)
        for _, p in layer.parameters():
            assert p.fresh
            assert not backend.to_numpy(p.grad).any()


def test_training_goes_on_as_if_there_had_been_no_check(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, t = rng.standard_normal((20, 4)), rng.integers(0, 3, 20)
    losses, gradients = [], []
    for check in (False, True):
        model = mlp([4, 5, 3], dropout=0.5, dtype=np.float64).to(backend)
        trainer = Trainer(model, SoftmaxNLL(), SGD(0.1), backend=backend)
        if check:
            check_gradients(model, x)
        y, saved = model.forward(backend.asarray(x))  # by hand, before the first step
        model.backward(y, saved)
        gradients.append(backend.to_numpy(trainer.vector.grad).copy())
        losses.append(trainer.fit(x, t, epochs=3, batch_size=6)["loss"])
    assert_same_bits(*gradients)
    assert_same_bits(*map(np.array, losses))


def test_the_flag_has_no_say_in_where_a_check_runs(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNX_BACKEND", "nonsense")
    x = rng.standard_normal((5, 4))
    assert check_gradients(linear().to(backend), x) < 1e-7
    assert check_gradients(Tanh(), x) < 1e-7
    assert check_gradients(MeanSquaredError(), x, np.zeros((5, 4))) < 1e-7
