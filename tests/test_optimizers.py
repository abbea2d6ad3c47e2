"""Optimizers: numbers worked by hand, the loops in `oracles`, and runs that go on as they were."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

from nnx import SGD, Adam, MeanSquaredError, Optimizer, Parameter, ParameterVector, Trainer, mlp
from nnx.backends import Backend

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda lr=0.1, **k: SGD(lr, **k),
    "momentum": lambda lr=0.1, **k: SGD(lr, momentum=0.9, **k),
    "nesterov": lambda lr=0.1, **k: SGD(lr, momentum=0.9, nesterov=True, **k),
    "adam": lambda lr=0.1, **k: Adam(lr, **k),
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


# ---- against loops ---------------------------------------------------------------------------


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
    oracle: Any = oracles.adam if name == "adam" else oracles.sgd
    for i, value in enumerate(problem.values()):
        expected = oracle(
            start[i], [g[i] for g in gradients], lambda step: 0.1 / (1 + step), **settings
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
    problem = Problem(MAKERS[name](0.05), backend, np.zeros(3))
    w = np.zeros(3)
    for _ in range(600):
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
    ("name", "slots"), [("sgd", []), ("momentum", ["velocity"]), ("adam", ["m", "v"])]
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
    optimizer = Adam(0.5, beta1=0.8)
    assert repr(Adam(**optimizer.config())) == repr(optimizer)
