"""Optimizers: numbers worked by hand, the loops in `oracles`, and runs that go on as they were."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

from nnx import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    AMSGrad,
    Lion,
    MeanSquaredError,
    Optimizer,
    Parameter,
    ParameterVector,
    RMSProp,
    SoftmaxNLL,
    Trainer,
    mlp,
)
from nnx.backends import Backend

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda lr=0.1, **k: SGD(lr, **k),
    "momentum": lambda lr=0.1, **k: SGD(lr, momentum=0.9, **k),
    "nesterov": lambda lr=0.1, **k: SGD(lr, momentum=0.9, nesterov=True, **k),
    "adam": lambda lr=0.1, **k: Adam(lr, **k),
    "adamw": lambda lr=0.1, **k: AdamW(lr, **k),
    "amsgrad": lambda lr=0.1, **k: AMSGrad(lr, **k),
    "adagrad": lambda lr=0.5, **k: AdaGrad(lr, lr_decay=0.01, initial=0.1, **k),
    "rmsprop": lambda lr=0.1, **k: RMSProp(lr, **k),
    "centered": lambda lr=0.1, **k: RMSProp(lr, momentum=0.5, centered=True, **k),
    "lion": lambda lr=0.1, **k: Lion(lr, **k),
}
each = pytest.mark.parametrize("name", MAKERS)


class Problem:
    """Parameters under an optimizer, whose gradients are set by hand."""

    def __init__(
        self,
        optimizer: Optimizer,
        backend: Backend,
        *values: Any,
        dtype: Any = np.float64,
        **scales: Any,
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.parameters = [Parameter(backend.asarray(np.array(v, dtype)), **scales) for v in values]
        self.vector = ParameterVector(self.parameters)
        optimizer.bind(self.vector)

    def step(self, *gradients: Any) -> list[np.ndarray]:
        self.optimizer.begin_step()
        for p, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                p.accumulate()
                p.grad[...] = self.backend.asarray(np.asarray(gradient, p.value.dtype))
        self.optimizer.step()
        return self.values()

    def values(self) -> list[np.ndarray]:
        return [self.backend.to_numpy(p.value).copy() for p in self.parameters]


def run(problem: Problem, gradients: list[float]) -> list[float]:
    return [float(problem.step([g])[0][0]) for g in gradients]


# ---- by hand ---------------------------------------------------------------------------------


def test_sgd_by_hand(backend: Backend) -> None:
    # w -= 0.1 g:  1 - 0.1 * 2 = 0.8,  0.8 + 0.1 * 3 = 1.1,  1.1 - 0.1 * 0.5 = 1.05
    problem = Problem(SGD(0.1), backend, [1.0])
    assert run(problem, [2, -3, 0.5]) == pytest.approx([0.8, 1.1, 1.05], rel=1e-14)


def test_momentum_by_hand(backend: Backend) -> None:
    # u = 0.5 u + g:  2,  0.5 * 2 - 3 = -2,  0.5 * -2 + 0.5 = -0.5
    # w -= 0.1 u:     0.8,  1.0,  1.05
    problem = Problem(SGD(0.1, momentum=0.5), backend, [1.0])
    assert run(problem, [2, -3, 0.5]) == pytest.approx([0.8, 1.0, 1.05], rel=1e-14)


def test_nesterov_by_hand(backend: Backend) -> None:
    # u as above: 2, -2, -0.5;  g + 0.5 u:  2 + 1 = 3,  -3 - 1 = -4,  0.5 - 0.25 = 0.25
    # w -= 0.1 (g + 0.5 u):  0.7,  1.1,  1.075
    problem = Problem(SGD(0.1, momentum=0.5, nesterov=True), backend, [1.0])
    assert run(problem, [2, -3, 0.5]) == pytest.approx([0.7, 1.1, 1.075], rel=1e-14)


def test_weight_decay_by_hand(backend: Backend) -> None:
    # w -= 0.1 (g + 0.5 w):  1 - 0.1 * 2.5 = 0.75,  0.75 - 0.1 * (0.375 - 1) = 0.8125
    problem = Problem(SGD(0.1, weight_decay=0.5), backend, [1.0])
    assert run(problem, [2, -1]) == pytest.approx([0.75, 0.8125], rel=1e-14)


def test_adam_by_hand(backend: Backend) -> None:
    # beta1 = 0.9, beta2 = 0.999, g = 1, -1, 2, eps so small that it doesn't show
    # t=1: m = 0.1, v = 0.001; m / 0.1 = 1, v / 0.001 = 1:             w = 1 - 0.1 = 0.9
    # t=2: m = 0.09 - 0.1 = -0.01, v = 0.001 * (0.999 + 1) = 0.001999
    #      m / (1 - 0.81) = -1 / 19, v / (1 - 0.998001) = 1:           w = 0.9 + 0.1 / 19
    # t=3: m = -0.009 + 0.2 = 0.191, v = 0.001997001 + 0.004 = 0.005997001
    #      m / (1 - 0.729) = 191 / 271, v / (1 - 0.997002999) = 5997001 / 2997001
    problem = Problem(Adam(0.1, eps=1e-30), backend, [1.0])
    second = 0.9 + 0.1 / 19
    third = second - 0.1 * (191 / 271) / math.sqrt(5997001 / 2997001)
    assert run(problem, [1, -1, 2]) == pytest.approx([0.9, second, third], rel=1e-13)


@pytest.mark.parametrize("gradient", [1e-3, -7.0, 1e6])
def test_the_first_step_of_adam_is_the_learning_rate(backend: Backend, gradient: float) -> None:
    problem = Problem(Adam(0.25), backend, [1.0])
    expected = 1 - math.copysign(0.25, gradient)
    assert run(problem, [gradient]) == pytest.approx([expected], abs=1e-5)


def test_eps_of_adam_is_added_to_the_root(backend: Backend) -> None:
    # t=1: w -= lr * g / (|g| + eps) = 0.1 * 1 / (1 + 3)
    problem = Problem(Adam(0.1, eps=3), backend, [1.0])
    assert run(problem, [1]) == pytest.approx([0.975], rel=1e-14)


def test_adamw_by_hand(backend: Backend) -> None:
    # the steps of test_adam_by_hand, after the value shrank by 1 - 0.1 * 0.5 = 0.95
    # w = 0.95 - 0.1 = 0.85;  0.95 * 0.85 + 0.1 / 19;  0.95 * (that) - 0.1 (191/271) / sqrt(..)
    problem = Problem(AdamW(0.1, weight_decay=0.5, eps=1e-30), backend, [1.0])
    second = 0.8075 + 0.1 / 19
    third = 0.95 * second - 0.1 * (191 / 271) / math.sqrt(5997001 / 2997001)
    assert run(problem, [1, -1, 2]) == pytest.approx([0.85, second, third], rel=1e-13)


def test_amsgrad_by_hand(backend: Backend) -> None:
    # beta1 = 0, beta2 = 0.5, g = 4, 1, 3
    # v = 8, 4.5, 6.75; largest 8, 8, 8; 1 - beta2^t = 1/2, 3/4, 7/8
    # w -= 0.1 g / sqrt(8 / (1 - beta2^t)):  sqrt(16) = 4,  sqrt(32/3),  sqrt(64/7)
    problem = Problem(AMSGrad(0.1, beta1=0, beta2=0.5, eps=1e-30), backend, [1.0])
    second = 0.9 - 0.1 / math.sqrt(32 / 3)
    third = second - 0.3 / math.sqrt(64 / 7)
    assert run(problem, [4, 1, 3]) == pytest.approx([0.9, second, third], rel=1e-13)


def test_adagrad_by_hand(backend: Backend) -> None:
    # g = 3, -4, 12: sums 9, 25, 169, roots 3, 5, 13;  w -= 0.1 g / root
    problem = Problem(AdaGrad(0.1, eps=1e-30), backend, [1.0])
    expected = [0.9, 0.98, 0.98 - 1.2 / 13]
    assert run(problem, [3, -4, 12]) == pytest.approx(expected, rel=1e-13)
    # the rate falls as 1 / (1 + t), and 7 is there from the beginning: 9 + 7 = 16, root 4
    problem = Problem(AdaGrad(0.1, lr_decay=1, initial=7, eps=1e-30), backend, [1.0])
    assert run(problem, [3, 3]) == pytest.approx([0.925, 0.925 - 0.05 * 3 / 5], rel=1e-13)


def test_rmsprop_by_hand(backend: Backend) -> None:
    # alpha = 0.5, g = 2, 0, -4:  v = 2, 1, 8.5;  w -= 0.1 g / sqrt(v)
    problem = Problem(RMSProp(0.1, alpha=0.5, eps=1e-30), backend, [1.0])
    first = 1 - 0.2 / math.sqrt(2)
    expected = [first, first, first + 0.4 / math.sqrt(8.5)]
    assert run(problem, [2, 0, -4]) == pytest.approx(expected, rel=1e-13)
    # centered: m = 1, 0.5, -1.75;  v - m^2 = 1, 0.75, 5.4375;  d = 2, 0, -4 / sqrt(5.4375)
    # momentum 0.5: u = 2, 1, 0.5 + d;  w = 0.8, 0.7, 0.7 - 0.1 u
    optimizer = RMSProp(0.1, alpha=0.5, eps=1e-30, momentum=0.5, centered=True)
    third = 0.7 - 0.1 * (0.5 - 4 / math.sqrt(5.4375))
    found = run(Problem(optimizer, backend, [1.0]), [2, 0, -4])
    assert found == pytest.approx([0.8, 0.7, third], rel=1e-13)


def test_lion_by_hand(backend: Backend) -> None:
    # beta1 = 0.5, beta2 = 0.75, g = 4, -1, 0.2
    # m before: 0, 1, 0.5;  0.5 m + 0.5 g = 2, 0, 0.35;  signs 1, 0, 1
    problem = Problem(Lion(0.1, beta1=0.5, beta2=0.75), backend, [1.0])
    assert run(problem, [4, -1, 0.2]) == pytest.approx([0.9, 0.9, 0.8], rel=1e-14)
    # decay: w - 0.1 (1 + 0.5 w) = 1 - 0.15
    problem = Problem(Lion(0.1, weight_decay=0.5), backend, [1.0])
    assert run(problem, [4]) == pytest.approx([0.85], rel=1e-14)


def test_constant_gradients_do_not_make_centered_rmsprop_nan(
    backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    # v - m^2 goes to 0, and in some of so many by rounding below
    gradient = rng.standard_normal(500)
    optimizer = RMSProp(1e-9, alpha=0.5, centered=True)
    problem = Problem(optimizer, backend, np.ones(500), dtype=dtype)
    for _ in range(100):
        value = problem.step(gradient)[0]
    assert np.isfinite(value).all()
    v, m = (backend.to_numpy(optimizer.slot(name)) for name in ("v", "m"))
    assert (v - m * m < 0).any(), "the case itself is wrong"


# ---- against loops ---------------------------------------------------------------------------


def _adamw(
    w: float, g: float, t: int, lr: float, s: dict[str, float], k: dict[str, float]
) -> float:
    s["m"] = k["beta1"] * s.get("m", 0) + (1 - k["beta1"]) * g
    s["v"] = k["beta2"] * s.get("v", 0) + (1 - k["beta2"]) * g * g
    m, v = s["m"] / (1 - k["beta1"] ** t), s["v"] / (1 - k["beta2"] ** t)
    return w - lr * k["weight_decay"] * w - lr * m / (math.sqrt(v) + k["eps"])


def _amsgrad(
    w: float, g: float, t: int, lr: float, s: dict[str, float], k: dict[str, float]
) -> float:
    g += k["weight_decay"] * w
    s["m"] = k["beta1"] * s.get("m", 0) + (1 - k["beta1"]) * g
    s["v"] = k["beta2"] * s.get("v", 0) + (1 - k["beta2"]) * g * g
    s["max"] = max(s.get("max", 0), s["v"])
    m, v = s["m"] / (1 - k["beta1"] ** t), s["max"] / (1 - k["beta2"] ** t)
    return w - lr * m / (math.sqrt(v) + k["eps"])


def _adagrad(
    w: float, g: float, t: int, lr: float, s: dict[str, float], k: dict[str, float]
) -> float:
    g += k["weight_decay"] * w
    s["sum"] = s.get("sum", k["initial"]) + g**2
    return w - lr / (1 + (t - 1) * k["lr_decay"]) * g / (math.sqrt(s["sum"]) + k["eps"])


def _rmsprop(
    w: float, g: float, t: int, lr: float, s: dict[str, float], k: dict[str, float]
) -> float:
    g += k["weight_decay"] * w
    s["v"] = k["alpha"] * s.get("v", 0) + (1 - k["alpha"]) * g**2
    s["m"] = k["alpha"] * s.get("m", 0) + (1 - k["alpha"]) * g
    variance = s["v"] - s["m"] ** 2 if k["centered"] else s["v"]
    s["u"] = k["momentum"] * s.get("u", 0) + g / (math.sqrt(variance) + k["eps"])
    return w - lr * s["u"]


def _lion(w: float, g: float, t: int, lr: float, s: dict[str, float], k: dict[str, float]) -> float:
    m = s.get("m", 0)
    c = k["beta1"] * m + (1 - k["beta1"]) * g
    s["m"] = k["beta2"] * m + (1 - k["beta2"]) * g
    return w - lr * (math.copysign(1, c) + k["weight_decay"] * w)


def _loop_of_a_rule(rule: Any, value: Any, gradients: Any, lr: Any, **settings: Any) -> Any:
    """Apply a rule for one number to each element, step by step."""
    flat = np.asarray(value, np.float64).ravel().tolist()
    states: list[dict[str, float]] = [{} for _ in flat]
    for step, gradient in enumerate(gradients):
        for i, g in enumerate(np.asarray(gradient, np.float64).ravel().tolist()):
            flat[i] = rule(flat[i], g, step + 1, lr(step), states[i], settings)
    return np.array(flat).reshape(value.shape)


LOOPS: dict[type[Optimizer], Any] = {SGD: oracles.sgd, Adam: oracles.adam}
RULES: dict[type[Optimizer], Any] = {
    AdamW: _adamw,
    AMSGrad: _amsgrad,
    AdaGrad: _adagrad,
    RMSProp: _rmsprop,
    Lion: _lion,
}


@each
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_optimizers_agree_with_the_loops(
    name: str, backend: Backend, dtype: Any, rng: np.random.Generator, weight_decay: float
) -> None:
    shapes = [(3, 5), (5,), (64,), (65,), (1,)]
    values = [rng.standard_normal(s) for s in shapes]
    optimizer = MAKERS[name](lambda step: 0.1 / (1 + step), weight_decay=weight_decay)
    problem = Problem(optimizer, backend, *values, dtype=dtype)
    start = problem.values()
    gradients = [[rng.standard_normal(s).astype(dtype) for s in shapes] for _ in range(4)]
    for step in gradients:
        problem.step(*step)
    settings = {k: v for k, v in optimizer.config().items() if k != "lr"}
    oracle = LOOPS.get(type(optimizer), _loop_of_a_rule)
    for i, value in enumerate(problem.values()):
        expected = oracle(
            *(() if type(optimizer) in LOOPS else (RULES[type(optimizer)],)),
            start[i],
            [g[i] for g in gradients],
            lambda step: 0.1 / (1 + step),
            **settings,
        )
        assert_close(value, expected, depth=100, dtype=dtype)


@each
def test_gaps_between_parameters_stay_zero(name: str, backend: Backend, dtype: Any) -> None:
    problem = Problem(MAKERS[name](weight_decay=0.1), backend, np.ones(3), np.ones(65), dtype=dtype)
    for _ in range(3):
        problem.step(np.ones(3), np.ones(65))
    slots = [a for key, a in problem.optimizer.state().items() if key != "step"]
    for array in (problem.vector.value, problem.vector.grad, *slots):
        flat = backend.to_numpy(array)[0]
        assert not flat[3:64].any()
        assert not flat[64 + 65 :].any()


@each
def test_optimizers_find_the_bottom_of_a_bowl(name: str, backend: Backend) -> None:
    # f(w) = sum c_i (w_i - b_i)^2 / 2, curvatures from 0.5 to 5
    c, b = np.array([0.5, 1, 5]), np.array([3.0, -2, 0.5])
    # where a step doesn't shrink with the gradient, the rate must
    steady = name in ("rmsprop", "centered", "lion")
    lr = (lambda step: 0.1 * 0.99**step) if steady else 1.0 if name == "adagrad" else 0.05
    problem = Problem(MAKERS[name](lr, weight_decay=0), backend, np.zeros(3))
    w = np.zeros(3)
    for _ in range(800):
        w = problem.step(c * (w - b))[0]
    np.testing.assert_allclose(w, b, atol=1e-3)


# ---- learning rates --------------------------------------------------------------------------


def test_a_schedule_is_asked_for_every_step_in_order(backend: Backend) -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.5**step

    problem = Problem(SGD(schedule), backend, [0.0])
    problem.optimizer.PLAN = 2  # of an instance: plans end within the run
    # steps of 1, 1/2, 1/4, ... add up to 2 - 2^-4
    assert run(problem, [-1] * 5) == [1, 1.5, 1.75, 1.875, 1.9375]
    assert asked[:5] == [0, 1, 2, 3, 4]
    assert asked == sorted(set(asked))


def test_a_plan_that_ends_is_followed_by_the_next(backend: Backend) -> None:
    optimizer = SGD(lambda step: float(step))
    problem = Problem(optimizer, backend, [0.0])
    optimizer.plan(2)
    assert run(problem, [1] * 4) == [0, -1, -3, -6]
    assert optimizer.steps.number == 4


def test_rate_zero_changes_nothing(backend: Backend, dtype: Any) -> None:
    problem = Problem(SGD(0, momentum=0.9, weight_decay=0.1), backend, [1.5, -2], dtype=dtype)
    assert_same_bits(problem.step([3, 4])[0], np.array([1.5, -2], dtype))


@each
def test_scales_of_a_parameter(name: str, backend: Backend) -> None:
    def build(lr: float, decay: float, **scales: float) -> Problem:
        return Problem(MAKERS[name](lr, weight_decay=decay), backend, [1.0, 2.0], **scales)

    pairs = [
        (build(0.1, 0.2, lr_scale=0.5), build(0.05, 0.2)),
        (build(0.1, 0.2, decay_scale=0.5), build(0.1, 0.1)),
        (build(0.1, 0.2, decay_scale=0), build(0.1, 0)),
    ]
    for scaled, plain in pairs:
        for gradient in ([1, -2], [0.5, 3]):
            assert_close(scaled.step(gradient)[0], plain.step(gradient)[0])


@each
def test_a_frozen_parameter_keeps_its_bits(name: str, backend: Backend, dtype: Any) -> None:
    frozen = Parameter(backend.asarray(np.array([0.1, -0.3], dtype)), lr_scale=0)
    free = Parameter(backend.asarray(np.array([1.0], dtype)))
    optimizer = MAKERS[name](weight_decay=0.1)
    optimizer.bind(ParameterVector([frozen, free]))
    for _ in range(3):
        for p in (frozen, free):
            p.accumulate()
            p.grad.fill(2)
        optimizer.step()
    assert_same_bits(backend.to_numpy(frozen.value), np.array([0.1, -0.3], dtype))
    assert float(backend.to_numpy(free.value)[0]) < 0.9


@pytest.mark.parametrize("name", ["amsgrad", "adagrad", "rmsprop", "centered", "lion"])
def test_a_frozen_parameter_keeps_its_bits_whatever_its_gradient(
    name: str, backend: Backend
) -> None:
    frozen = Parameter(backend.asarray(np.array([0.1, -0.3, 0.5])), lr_scale=0)
    free = Parameter(backend.asarray(np.array([1.0])))
    optimizer = MAKERS[name](weight_decay=0.1, clip_norm=1)
    optimizer.bind(ParameterVector([frozen, free]))
    for limit in (1.0, None):
        optimizer.clip_norm = limit
        frozen.accumulate(), free.accumulate()
        frozen.grad[...] = backend.asarray(np.array([np.nan, np.inf, -np.inf]))
        free.grad.fill(2)
        optimizer.step()
    assert_same_bits(backend.to_numpy(frozen.value), np.array([0.1, -0.3, 0.5]))
    assert float(backend.to_numpy(free.value)[0]) < 0.95


# ---- gradients -------------------------------------------------------------------------------


@each
def test_a_gradient_nobody_wrote_counts_as_zero(name: str, backend: Backend) -> None:
    problem, other = (Problem(MAKERS[name](), backend, [1.0], [2.0]) for _ in range(2))
    problem.step([1], [5]), other.step([1], [5])
    problem.step([1], None)  # the gradient of 5 must not be used again
    other.step([1], [0])
    for one, two in zip(problem.values(), other.values(), strict=True):
        assert_same_bits(one, two)


@each
def test_two_micro_batches_make_the_step_of_the_batch(
    name: str, backend: Backend, rng: np.random.Generator
) -> None:
    x, t = (backend.asarray(rng.standard_normal((6, n))) for n in (3, 2))
    loss = MeanSquaredError()
    results = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        model = mlp([3, 4, 2], dtype=np.float64).to(backend)
        optimizer = MAKERS[name]()
        optimizer.bind(ParameterVector([p for _, p in model.parameters()]))
        for _ in range(3):
            for part in parts:
                y, saved = model.forward(x[part])
                _, dy = loss(y, t[part], normalizer=6.0)
                model.backward(dy, saved, need_dx=False)
            optimizer.step()
        results.append({n: backend.to_numpy(a) for n, a in model.state().items()})
    for key, array in results[0].items():
        assert_close(results[1][key], array, depth=100)


def test_settings_may_change_between_steps(backend: Backend) -> None:
    optimizer = SGD(0.1)
    problem = Problem(optimizer, backend, [1.0])
    found = run(problem, [2])  # 1 - 0.1 * 2 = 0.8
    optimizer.momentum = 0.5  # u = 2, then 0.5 * 2 - 4 = -3
    found += run(problem, [2, -4])  # 0.8 - 0.2 = 0.6, 0.6 + 0.3 = 0.9
    optimizer.nesterov = True  # u = 0.5 * -3 + 1 = -0.5; 0.9 - 0.1 * (1 + 0.5 * -0.5) = 0.825
    found += run(problem, [1])
    optimizer.momentum, optimizer.nesterov = 0.0, False
    found += run(problem, [1])  # 0.725
    optimizer.weight_decay = 2.0
    found += run(problem, [1])  # 0.725 - 0.1 * (1 + 2 * 0.725) = 0.48
    optimizer.weight_decay, optimizer.clip_value = 0.0, 0.5
    found += run(problem, [1])  # 0.48 - 0.1 * 0.5 = 0.43
    assert found == pytest.approx([0.8, 0.6, 0.9, 0.825, 0.725, 0.48, 0.43], rel=1e-14)


def test_a_slot_is_added_between_steps(backend: Backend) -> None:
    optimizer, plain = Adam(0.1), Adam(0.1, amsgrad=True)
    problems = [Problem(o, backend, [1.0, 2.0]) for o in (optimizer, plain)]
    optimizer.step()  # nothing: m and v stay 0
    plain.step()
    optimizer.amsgrad = True
    for gradient in ([3, -1], [0.1, 2]):
        found, expected = (problem.step(gradient) for problem in problems)
        assert_same_bits(found, expected)
    assert sorted(optimizer.state()) == ["m", "step", "v", "v_max"]


def test_step_begins_the_next_step(backend: Backend) -> None:
    problem = Problem(SGD(1.0), backend, [0.0])
    problem.step([1])
    assert problem.parameters[0].fresh
    assert run(problem, [1, 1]) == [-2, -3]


def test_step_logs_the_loss(backend: Backend) -> None:
    problem = Problem(SGD(1.0), backend, [0.0])
    problem.optimizer.plan(3)
    for loss in (7.0, None, 9.0):
        problem.optimizer.step(None if loss is None else backend.asarray(np.array(loss)))
    log = backend.to_numpy(problem.optimizer.steps.log)
    np.testing.assert_array_equal(log, [7, np.nan, 9])


# ---- penalties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.3), (0.2, 0.0), (0.2, 0.3)])
def test_a_penalty_adds_its_own_gradient_whatever_the_batch(
    backend: Backend, dtype: Any, rng: np.random.Generator, n: int, l1: float, l2: float
) -> None:
    x, t = rng.standard_normal((n, 3)), rng.integers(0, 2, n)
    results = []
    for on in (0, 1):
        model = mlp([3, 4, 2], dtype=dtype, seed=1)
        model.state()["0.weight"][0, 0] = 0  # sign(0) is 0
        trainer = Trainer(model, SoftmaxNLL(), SGD(0.1, l1=on * l1, l2=on * l2), backend=backend)
        values = {name: backend.to_numpy(p.value).copy() for name, p in model.parameters()}
        loss = trainer.train_step(backend.asarray(x, dtype), backend.asarray(t))
        gradients = {name: backend.to_numpy(p.grad).copy() for name, p in model.parameters()}
        results.append((float(loss), gradients))
    (loss, plain), (penalized_loss, penalized) = results
    assert penalized_loss == loss  # the loss that is reported is the loss
    for name, value in values.items():
        sign = oracles.elementwise(lambda w: (w > 0) - (w < 0), value)
        assert_close(penalized[name], plain[name] + l1 * sign + l2 * value, dtype=dtype)


def test_l2_is_weight_decay_where_nothing_is_clipped(backend: Backend) -> None:
    for name in ("sgd", "nesterov", "adam", "amsgrad", "adagrad", "rmsprop"):
        pair = [Problem(MAKERS[name](**k), backend, [1.0, -2]) for k in ({"l2": 0.3}, {})]
        pair[1].optimizer.weight_decay = 0.3
        for gradient in ([1, -2], [0.5, 3], [-2, 0]):
            assert_close(pair[0].step(gradient)[0], pair[1].step(gradient)[0])


@pytest.mark.parametrize("models", [None, 3])
def test_penalty_is_the_penalty_and_its_gradient_what_is_added(
    backend: Backend, rng: np.random.Generator, models: int | None
) -> None:
    lead = () if models is None else (models,)
    a, b, c = (rng.standard_normal((*lead, *shape)) for shape in ((2, 3), (70,), (2,)))
    parameters = [
        Parameter(backend.asarray(a)),
        Parameter(backend.asarray(b), decay_scale=0),
        Parameter(backend.asarray(c), decay_scale=0.5),
    ]
    optimizer = SGD(0.1, l1=0.2, l2=0.3)
    optimizer.bind(ParameterVector(parameters, models))
    expected = []
    for k in range(models or 1):
        rows = [(v if models is None else v[k]).ravel() for v in (a, c)]
        terms = [
            scale * (0.2 * abs(w) + 0.15 * w * w)
            for scale, row in zip((1, 0.5), rows, strict=True)
            for w in row.tolist()
        ]
        expected.append(math.fsum(terms))
    found = backend.to_numpy(optimizer.penalty())
    assert_close(found, np.array(expected[0] if models is None else expected))
    for p in parameters:
        p.accumulate()
        p.grad.fill(7)
    optimizer.step()
    for p, value, scale in zip(parameters, (a, b, c), (1, 0, 0.5), strict=True):
        gradient = 7 + scale * (0.2 * np.sign(value) + 0.3 * value)
        assert_close(backend.to_numpy(p.grad), gradient)


def test_a_penalty_of_0_lets_infinite_weights_be(backend: Backend) -> None:
    problem = Problem(SGD(0.0, l1=0.5), backend, [np.inf, 1.0])
    problem.step([1, 1])
    np.testing.assert_array_equal(backend.to_numpy(problem.parameters[0].grad), [1.5, 1.5])


# ---- clipping ----------------------------------------------------------------------------------


def test_clipping_by_value(backend: Backend, dtype: Any) -> None:
    problem = Problem(SGD(1.0, clip_value=0.5), backend, np.zeros(6), dtype=dtype)
    step = problem.step([0.25, 3, -0.5, -np.inf, np.nan, np.inf])[0]
    assert_close(step, np.array([-0.25, -0.5, 0.5, 0.5, np.nan, -0.5], dtype))


def test_clipping_by_norm(backend: Backend, dtype: Any) -> None:
    # |(3, 4, 12)| = 13, over two parameters; 6.5 halves it, 26 leaves it alone
    for limit in (6.5, 26.0, 13e-3, 13.0):
        factor = min(1, limit / 13.000001)
        optimizer = SGD(1.0, clip_norm=limit)
        problem = Problem(optimizer, backend, np.zeros(2), np.zeros(1), dtype=dtype)
        one, two = problem.step([3, -4], [12])
        assert_close(one, np.array([-3, 4]) * factor, dtype=dtype)
        assert_close(two, np.array([-12]) * factor, dtype=dtype)


def test_a_norm_that_is_nan_makes_every_gradient_nan(backend: Backend) -> None:
    problem = Problem(SGD(1.0, clip_norm=1), backend, np.zeros(2), np.zeros(1))
    assert all(np.isnan(v).all() for v in problem.step([1, np.nan], [3]))


def test_clipping_of_a_gradient_of_zero(backend: Backend) -> None:
    problem = Problem(SGD(1.0, clip_norm=1, clip_value=1), backend, np.ones(2))
    assert_close(problem.step([0, 0])[0], np.ones(2))


def test_each_model_has_a_norm_of_its_own(backend: Backend, rng: np.random.Generator) -> None:
    # more elements than the host takes at a time
    gradient = rng.standard_normal((3, 30_000)) * np.array([[1e-3], [1], [10]])
    p = Parameter(backend.asarray(np.zeros((3, 30_000))))
    optimizer = SGD(1.0, clip_norm=2)
    optimizer.bind(ParameterVector([p], 3))
    p.accumulate()
    p.grad[...] = backend.asarray(gradient)
    optimizer.step()
    for row, g in zip(backend.to_numpy(p.value), gradient, strict=True):
        norm = math.sqrt(math.fsum(x * x for x in g.tolist()))
        assert_close(row, -g * min(1, 2 / (norm + 1e-6)))


def test_frozen_parameters_do_not_count_in_the_norm(backend: Backend) -> None:
    frozen = Parameter(backend.asarray(np.ones(2)), lr_scale=0)
    free = Parameter(backend.asarray(np.zeros(2)))
    optimizer = SGD(1.0, clip_norm=5.0, l2=1.0)
    optimizer.bind(ParameterVector([frozen, free]))
    for p in (frozen, free):
        p.accumulate()
        p.grad[...] = backend.asarray([6.0, 8.0])
    optimizer.step()
    factor = 5 / (10 + 1e-6)
    assert_close(backend.to_numpy(free.value), -np.array([6, 8]) * factor)
    assert_same_bits(backend.to_numpy(frozen.value), np.ones(2))


def test_penalty_then_value_then_norm_then_decay(backend: Backend) -> None:
    # g = 1 + 0.5 * 4 = 3, by value 2; the other 0.1 + 0.5 * 0 = 0.1
    # norm of (2, 0.1); decay 0.25 * 4 = 1 comes after and isn't clipped
    optimizer = SGD(1.0, l2=0.5, clip_value=2, clip_norm=1, weight_decay=0.25)
    factor = 1 / (math.sqrt(4.01) + 1e-6)
    expected = np.array([4 - 2 * factor - 1, -0.1 * factor])
    assert_close(Problem(optimizer, backend, [4.0, 0.0]).step([1, 0.1])[0], expected)


# ---- on the device -----------------------------------------------------------------------------

SETTINGS: list[tuple[Callable[[], Optimizer], int]] = [
    (lambda: SGD(0.1), 1),
    (lambda: SGD(0.1, momentum=0.9, nesterov=True, clip_value=0.1), 2),
    (lambda: SGD(0.1, clip_norm=0.1), 2),
    (lambda: SGD(0.1, l1=0.1, l2=0.1), 2),
    (lambda: Adam(l2=0.1, clip_value=0.1, clip_norm=0.1), 2),
    (lambda: AdamW(), 1),
    (lambda: AMSGrad(weight_decay=0.1), 1),
    (lambda: AdaGrad(), 1),
    (lambda: RMSProp(centered=True, momentum=0.5), 1),
    (lambda: Lion(weight_decay=0.1), 1),
]


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(("make", "launches"), SETTINGS, ids=[repr(m()) for m, _ in SETTINGS])
@pytest.mark.parametrize("models", [None, 2])
def test_a_step_on_the_device_neither_waits_nor_allocates(
    make: Callable[[], Optimizer], launches: int, models: int | None, rng: np.random.Generator
) -> None:
    """`launches` of kernels and library calls make the update, counters and all groups included."""
    from test_gpu_step import _simulator, counted, quiet

    from nnx import get_backend
    from nnx.backends.arena import Arena

    backend, optimizer = get_backend("cupy"), make()
    shapes = [(5, 70), (70,)] if models is None else [(models, 5, 70), (models, 70)]
    parameters = [Parameter(backend.asarray(np.ones(s, np.float32))) for s in shapes]
    parameters[1].lr_scale, parameters[1].decay_scale = 0.5, 0.0
    vector = ParameterVector(parameters, models)
    optimizer.bind(vector)
    optimizer.begin_step()
    loss = backend.asarray(np.zeros(() if models is None else models, np.float32))
    arena = Arena(backend.xp)
    for i in range(4):
        vector.grad[...] = i + 1
        for p in parameters:
            p.fresh = False
        with arena.step("step"), counted() as counts:
            optimizer.step(loss)
        if i:
            quiet(counts)
            if _simulator() is not None:
                assert counts.total == launches, counts.launches


# ---- states ----------------------------------------------------------------------------------


@each
def test_state_goes_on_bit_for_bit(
    name: str, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    gradients = rng.standard_normal((6, 3, 5))
    schedule = [0.1, 0.2, 0.05, 0.3, 0.1, 0.2].__getitem__

    def build() -> Problem:
        return Problem(
            MAKERS[name](lambda i: schedule(i % 6)), backend, np.ones((3, 5)), dtype=dtype
        )

    straight, first, second = build(), build(), build()
    for gradient in gradients:
        expected = straight.step(gradient)[0]
    for gradient in gradients[:3]:
        first.step(gradient)
    state = {
        key: item if key == "step" else backend.to_numpy(item).copy()
        for key, item in first.optimizer.state().items()
    }
    assert state["step"] == 3
    second.parameters[0].value[...] = first.parameters[0].value
    second.optimizer.load_state(state)
    for gradient in gradients[3:]:
        found = second.step(gradient)[0]
    assert_same_bits(found, expected)
    assert second.optimizer.steps.number == 6


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("sgd", []),
        ("momentum", ["velocity"]),
        ("adam", ["m", "v"]),
        ("adamw", ["m", "v"]),
        ("amsgrad", ["m", "v", "v_max"]),
        ("adagrad", ["sum"]),
        ("rmsprop", ["v"]),
        ("centered", ["v", "m", "velocity"]),
        ("lion", ["m"]),
    ],
)
def test_state_holds_what_the_optimizer_keeps(name: str, slots: list[str]) -> None:
    problem = Problem(MAKERS[name](), _numpy(), np.ones(3))
    problem.step(np.ones(3))
    assert list(problem.optimizer.state()) == ["step", *slots]


def test_load_state_names_the_shapes_that_differ() -> None:
    problem = Problem(Adam(), _numpy(), np.ones(3))
    for wrong in (np.zeros((1, 128)), np.zeros((1, 64), np.float32)):
        state = {"step": 1, "m": wrong, "v": np.zeros((1, 64))}
        with pytest.raises(ValueError, match=r"m of shape \(1, 64\) and dtype float64, got"):
            problem.optimizer.load_state(state)


@pytest.mark.gpu
@each
def test_moving_the_model_takes_the_optimizer_along(name: str, rng: np.random.Generator) -> None:
    from nnx import get_backend

    x, t = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    results = []
    for places in (["numpy"] * 4, ["numpy", "cupy", "cupy", "numpy"]):
        model = mlp([3, 4, 2], dtype=np.float64)
        trainer = Trainer(model, MeanSquaredError(), MAKERS[name](lambda i: 0.1 / (i + 1)))
        for place in places:
            model.to(place)
            trainer.train_step(*(get_backend(place).asarray(a) for a in (x, t)))
        results.append(model.state())
        assert trainer.optimizer.steps.number == 4
    for key, array in results[0].items():
        assert_close(results[1][key], array, depth=100)


# ---- errors ----------------------------------------------------------------------------------


def _numpy() -> Backend:
    from nnx import get_backend

    return get_backend("numpy")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-0.1), r"SGD: expected lr in \[0, inf\), got -0.1"),
        (lambda: SGD(float("nan")), "lr in .* got nan"),
        (lambda: SGD(float("inf")), "lr in .* got inf"),
        (lambda: SGD(0.1, momentum=1.0), r"momentum in \[0, 1\), got 1.0"),
        (lambda: SGD(0.1, momentum=-0.5), "got -0.5"),
        (lambda: SGD(0.1, nesterov=True), "needs momentum above 0, got momentum=0"),
        (lambda: SGD(0.1, weight_decay=-1), "weight_decay in .* got -1"),
        (lambda: Adam(-1), "Adam: expected lr"),
        (lambda: Adam(0.1, beta1=1), "beta1 in .* got 1"),
        (lambda: Adam(0.1, beta2=-0.1), "beta2 in .* got -0.1"),
        (lambda: Adam(0.1, eps=-1e-8), "eps in .* got -1e-08"),
        (lambda: Adam(0.1, eps=0), r"Adam: expected eps in \(0, inf\), got 0"),
        (lambda: AdamW(weight_decay=-1), "AdamW: expected weight_decay in .* got -1"),
        (lambda: AMSGrad(beta1=1), "AMSGrad: expected beta1"),
        (lambda: AdaGrad(lr_decay=-1), "AdaGrad: expected lr_decay"),
        (lambda: AdaGrad(initial=-1), "AdaGrad: expected initial"),
        (lambda: AdaGrad(eps=0), "AdaGrad: expected eps"),
        (lambda: RMSProp(alpha=1), r"RMSProp: expected alpha in \[0, 1\), got 1"),
        (lambda: RMSProp(momentum=1), "RMSProp: expected momentum"),
        (lambda: RMSProp(eps=0), "RMSProp: expected eps"),
        (lambda: Lion(beta2=1.5), "Lion: expected beta2 .* got 1.5"),
        (lambda: SGD(l1=-1), "SGD: expected l1"),
        (lambda: SGD(l2=float("inf")), "SGD: expected l2 in .* got inf"),
        (lambda: SGD(clip_value=0), r"SGD: expected clip_value in \(0, inf\), got 0"),
        (lambda: SGD(clip_norm=-2), "SGD: expected clip_norm .* got -2"),
    ],
)
def test_hyper_parameters_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimizer_belongs_to_one_vector() -> None:
    problem = Problem(SGD(), _numpy(), np.ones(3))
    problem.optimizer.bind(problem.vector)
    with pytest.raises(ValueError, match="already bound"):
        problem.optimizer.bind(ParameterVector([Parameter(np.ones(3))]))


def test_an_optimizer_without_parameters_says_so() -> None:
    with pytest.raises(RuntimeError, match="not bound to parameters"):
        Adam().step()


def test_two_optimizers_of_one_vector_keep_states_of_their_own(backend: Backend) -> None:
    # as when a model trained once gets a second Trainer with a new Adam
    problem = Problem(Adam(0.1), backend, np.ones(3))
    first, second = problem.optimizer, Adam(0.1)
    second.bind(problem.vector)
    for _ in range(5):
        problem.step(np.array([1.0, -2, 3]))
    before = problem.values()[0]
    problem.optimizer = second  # its first step is the learning rate, whatever came before
    after = problem.step(np.array([-5.0, 5, 5]))[0]
    np.testing.assert_allclose(after - before, [0.1, -0.1, -0.1], rtol=1e-6)
    problem.optimizer = first  # and the other one goes on as if nothing had been between
    alone = Problem(Adam(0.1), backend, np.ones(3))
    steps = [alone.step(np.array([1.0, -2, 3]))[0] for _ in range(6)]
    moved = problem.step(np.array([1.0, -2, 3]))[0] - after
    np.testing.assert_allclose(moved, steps[5] - steps[4], rtol=1e-9)


def test_optimizers_describe_themselves() -> None:
    text = "SGD(lr=0.1, weight_decay=0.0, momentum=0.9, nesterov=True)"
    assert repr(MAKERS["nesterov"]()) == text
    for optimizer in (
        Adam(0.5, beta1=0.8),
        Adam(amsgrad=True, clip_norm=1),
        AdamW(l1=0.1),
        AMSGrad(l2=3),
        AdaGrad(lr_decay=0.1, initial=2, eps=1),
        RMSProp(alpha=0.3, momentum=0.5, centered=True, clip_value=2),
        Lion(beta2=0.5, weight_decay=0.1),
    ):
        again = type(optimizer)(**optimizer.config())
        assert repr(again) == repr(optimizer)
        assert vars(again) == vars(optimizer)
