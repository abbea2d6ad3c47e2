"""Activations where they are delicate: far out, at their kinks, at NaN; and `erf`, which one calls.

Values and gradients at ordinary inputs are the contract's business (`test_layers.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import layer_oracles
import numpy as np
import pytest
from oracles import assert_close, assert_same_bits
from test_gpu_step import _simulator, counted, quiet

import nnx
from nnx.backends import Backend, get_backend
from nnx.backends.arena import Arena
from nnx.layers import Layer
from nnx.layers.activations import FORMULAS

LAYERS: dict[str, tuple[Callable[[], Layer], tuple[Any, Any]]] = {
    "Identity": (nnx.Identity, layer_oracles.identity()),
    "LeakyReLU": (nnx.LeakyReLU, layer_oracles.leaky_relu()),
    "LeakyReLU(0)": (lambda: nnx.LeakyReLU(0.0), layer_oracles.leaky_relu(0.0)),
    "ELU": (nnx.ELU, layer_oracles.elu()),
    "ELU(-0.5)": (lambda: nnx.ELU(-0.5), layer_oracles.elu(-0.5)),
    "SELU": (nnx.SELU, layer_oracles.selu()),
    "GELU": (nnx.GELU, layer_oracles.gelu()),
    "GELU, tanh": (lambda: nnx.GELU("tanh"), layer_oracles.gelu_tanh()),
    "SiLU": (nnx.SiLU, layer_oracles.silu()),
    "Softplus": (nnx.Softplus, layer_oracles.softplus()),
    "Softplus(2, 3)": (lambda: nnx.Softplus(2, 3), layer_oracles.softplus(2, 3)),
    "HardSigmoid": (nnx.HardSigmoid, layer_oracles.hard_sigmoid()),
    "HardTanh": (nnx.HardTanh, layer_oracles.hard_tanh()),
    "HardSwish": (nnx.HardSwish, layer_oracles.hard_swish()),
    "Mish": (nnx.Mish, layer_oracles.mish()),
    "Sigmoid": (nnx.Sigmoid, layer_oracles.sigmoid()),
    "Tanh": (nnx.Tanh, layer_oracles.tanh()),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def both_ways(layer: Layer, backend: Backend, x: Any, dy: Any) -> tuple[Any, Any]:
    """`(y, dx)` on the host."""
    y, saved = layer.forward(backend.asarray(x))
    dx = layer.backward(backend.asarray(dy), saved)
    return backend.to_numpy(y), backend.to_numpy(dx)


@each_layer
def test_far_out_it_is_finite_and_right(name: str, backend: Backend, dtype: Any) -> None:
    # warnings are errors, so an overflow fails on NumPy
    far = [1e4, 5e3, 710.0, 104.0, 89.0, 88.5, 40.0, 21.0, 20.0, 17.0, 9.0, 5.0, 1e-3, 1e-30]
    x = np.array(far + [-a for a in far] + [0.0, -0.0], dtype)
    dy = np.linspace(-2, 3, len(x)).astype(dtype)
    make, pair = LAYERS[name]
    expected = layer_oracles.activation(pair)(x, dy)
    for actual, wanted in zip(both_ways(make(), backend, x, dy), expected, strict=True):
        # 1e4 + rounding: an error relative to the input is the best there is
        assert_close(actual, wanted, depth=2, dtype=dtype)


@pytest.mark.parametrize("name", ["GELU, tanh", "SiLU", "Mish"])
def test_at_the_ends_of_the_numbers(name: str, backend: Backend, dtype: Any) -> None:
    """Far below 0 there is nothing left, not even at -inf, where a product would give NaN."""
    largest = float(np.finfo(dtype).max)
    low, high = np.array([-1e20, -largest, -np.inf], dtype), np.array([1e20, largest], dtype)
    for array in both_ways(LAYERS[name][0](), backend, low, np.ones_like(low)):
        np.testing.assert_allclose(array, np.zeros(3), rtol=0, atol=1e-34)
    y, dx = both_ways(LAYERS[name][0](), backend, high, np.ones_like(high))
    assert_same_bits(y, high)
    assert_same_bits(dx, np.ones_like(high))


def test_gelu_by_tanh_keeps_its_digits_in_the_left_tail(backend: Backend, dtype: Any) -> None:
    value, derivative = layer_oracles.gelu_tanh()
    x = np.linspace(-9, 9, 4001).astype(dtype)
    y, dx = both_ways(nnx.GELU("tanh"), backend, x, np.ones_like(x))
    rtol = {"float32": 2e-5, "float64": 1e-13}[dtype.name]
    np.testing.assert_allclose(y, [value(a) for a in x.tolist()], rtol=rtol, atol=0)
    steep = abs(x + 0.7525) > 0.1  # the derivative is 0 at -0.7525
    expected = np.array([derivative(a) for a in x.tolist()])
    np.testing.assert_allclose(dx[steep], expected[steep], rtol=rtol, atol=0)
    assert_close(dx, expected, dtype=dtype)


def test_derivatives_from_y_lose_their_digits_where_y_saturates(backend: Backend) -> None:
    """What `Formula.saves` says of sigmoid and tanh, in float32."""
    for layer, derivative, good, gone in (
        (nnx.Sigmoid(), LAYERS["Sigmoid"][1][1], 7.0, 17.0),
        (nnx.Tanh(), LAYERS["Tanh"][1][1], 4.0, 9.0),
    ):
        x = np.linspace(0, gone, 4001).astype(np.float32)
        _, dx = both_ways(layer, backend, x, np.ones_like(x))
        error = abs(dx / np.array([derivative(a) for a in x.tolist()]) - 1)
        assert 2e-5 < error[x <= good].max() < 3e-4
        assert error[x > good].max() > 0.5


@pytest.mark.parametrize("name", ["ELU", "SELU", "SiLU", "Softplus", "Mish", "Sigmoid"])
def test_small_values_keep_their_digits(name: str, backend: Backend, dtype: Any) -> None:
    """Where y is the size of exp(x), its error is relative to that; so for the derivative."""
    x = np.array([-9.0, -17.0, -30.0, -60.0, -80.0], dtype)
    make, (value, derivative) = LAYERS[name]
    y, dx = both_ways(make(), backend, x, np.ones_like(x))
    rtol = {"float32": 2e-5, "float64": 1e-13}[dtype.name]
    np.testing.assert_allclose(y, [value(a) for a in x.tolist()], rtol=rtol)
    np.testing.assert_allclose(dx, [derivative(a) for a in x.tolist()], rtol=rtol)


@each_layer
def test_nan_stays_nan(name: str, backend: Backend, dtype: Any) -> None:
    x = np.array([np.nan, 1.0], dtype)
    y, _ = both_ways(LAYERS[name][0](), backend, x, np.ones_like(x))
    assert np.isnan(y[0])
    assert np.isfinite(y[1])


@pytest.mark.parametrize("name", ["LeakyReLU", "HardTanh", "HardSigmoid"])
def test_kinks_select(name: str, backend: Backend, dtype: Any) -> None:
    """An infinite gradient passes, and makes no NaN elsewhere."""
    x = np.array([-5.0, 0.5, 5.0], dtype)
    dy = np.array([1.0, np.inf, -1.0], dtype)
    _, dx = both_ways(LAYERS[name][0](), backend, x, dy)
    assert dx[1] == np.inf
    assert np.isfinite(dx[[0, 2]]).all()


@pytest.mark.parametrize(
    ("layer", "at", "derivative"),
    [
        (nnx.LeakyReLU(0.25), [0.0, -0.0], [0.25, 0.25]),
        (nnx.ELU(2.0), [0.0, -0.0], [2.0, 2.0]),
        (nnx.HardTanh(), [-1.0, 1.0], [0.0, 0.0]),
        (nnx.HardSigmoid(), [-3.0, 3.0], [0.0, 0.0]),
        (nnx.HardSwish(), [-3.0, 3.0], [0.0, 1.0]),
        (nnx.Softplus(1.0, 2.0), [2.0, 2.5], [1 / (1 + math.exp(-2)), 1.0]),
    ],
    ids=repr,
)
def test_derivatives_at_the_kinks(
    layer: Layer, at: list[float], derivative: list[float], backend: Backend, dtype: Any
) -> None:
    x = np.array(at, dtype)
    _, dx = both_ways(layer, backend, x, np.ones_like(x))
    assert_close(dx, np.array(derivative), dtype=dtype)


def test_values_worked_by_hand(backend: Backend) -> None:
    cases = [
        (nnx.GELU(), 1.0, 0.8413447460685429),  # Phi(1)
        (nnx.GELU("tanh"), 1.0, 0.8411919906082768),
        (nnx.SiLU(), 1.0, 0.7310585786300049),
        (nnx.Softplus(), 0.0, math.log(2)),
        (nnx.Mish(), 0.0, 0.0),
        (nnx.Mish(), 1.0, 0.8650983882673103),
        (nnx.SELU(), 1.0, 1.0507009873554805),
        (nnx.HardSwish(), 1.0, 2 / 3),
        (nnx.HardSigmoid(), 1.0, 2 / 3),
        (nnx.ELU(), -1.0, 1 / math.e - 1),
    ]
    for layer, x, y in cases:
        np.testing.assert_allclose(backend.to_numpy(layer(backend.asarray([x]))), [y], rtol=1e-14)


def test_identity_gives_back_what_it_got() -> None:
    x = np.ones((2, 3), np.float32)
    assert nnx.Identity()(x) is x
    assert nnx.Identity().backward(x, None) is x
    assert nnx.Identity().backward(x, None, need_dx=False) is None


@each_layer
def test_what_backward_keeps(name: str) -> None:
    """The output where it will do, else the input; never a third array."""
    x = np.linspace(-1, 1, 5)
    layer = LAYERS[name][0]()
    y, saved = layer.forward(x)
    by_output = isinstance(layer, (nnx.LeakyReLU, nnx.HardTanh, nnx.Sigmoid, nnx.Tanh))
    assert saved is (None if name == "Identity" else y if by_output else x)


@pytest.mark.parametrize("kind", ["int64", "float16", "bool"])
@each_layer
def test_other_dtypes_are_refused(name: str, kind: str) -> None:
    with pytest.raises(TypeError, match=f"expected float32 or float64, got {kind}"):
        LAYERS[name][0]()(np.ones((2, 3), kind))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nnx.LeakyReLU(-0.1), r"LeakyReLU: expected negative_slope in \[0, inf\), got -0"),
        (lambda: nnx.LeakyReLU(math.nan), "got nan"),
        (lambda: nnx.ELU(math.inf), "ELU: expected alpha"),
        (lambda: nnx.GELU("erf"), "GELU: expected approximate 'none' or 'tanh', got 'erf'"),
        (lambda: nnx.Softplus(0.0), "Softplus: expected beta"),
        (lambda: nnx.Softplus(1.0, math.nan), "Softplus: expected threshold"),
        (lambda: nnx.HardTanh(1.0, 1.0), r"HardTanh: expected max_val in \(1, inf\), got 1"),
        (lambda: nnx.HardTanh(-math.inf), "HardTanh: expected min_val"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Layer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_formula_has_a_layer() -> None:
    made: list[Any] = [make() for make, _ in LAYERS.values()]
    used = {layer._formula for layer in made if hasattr(layer, "_formula")}
    assert used == set(FORMULAS.values())


@pytest.mark.parametrize("activation", ["gelu", "silu", "selu", "leaky_relu", "hard_swish", "mish"])
def test_models_are_built_by_the_name_of_an_activation(activation: str) -> None:
    model = nnx.mlp([3, 8, 2], activation=activation, dtype=np.float64)
    assert type(model[1]).__name__.lower() == activation.replace("_", "")
    nnx.check_gradients(model, np.random.default_rng(0).standard_normal((5, 3)))


# ---- LogSoftmax ------------------------------------------------------------------------------


def test_log_softmax_far_out(backend: Backend, dtype: Any) -> None:
    x = np.array(
        [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4 - 1], [0.0, -9.0, 9.0]], dtype
    )
    dy = np.array([[1.0, -2.0, 0.5]] * 4, dtype)
    y, dx = both_ways(nnx.LogSoftmax(), backend, x, dy)
    expected = layer_oracles.log_softmax(x, dy)
    assert_close(y, expected[0], dtype=dtype)
    assert_close(dx, expected[1], dtype=dtype)
    np.testing.assert_array_equal(y[0], np.array([0, -2e4, -1e4], dtype))


def test_log_softmax_keeps_small_losses(backend: Backend, dtype: Any) -> None:
    """-log(1 - p) of p = exp(-12), which log(softmax(x)) in float32 gives to 1 % at best."""
    x = np.array([[0.0, -12.0]], dtype)
    y = backend.to_numpy(nnx.LogSoftmax()(backend.asarray(x)))
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y[0, 0], -math.log1p(math.exp(-12)), atol=eps, rtol=0)
    assert y[0, 1] == dtype.type(-12 - math.log1p(math.exp(-12)))


def test_log_softmax_is_the_logarithm_of_softmax(backend: Backend, rng: Any) -> None:
    x = backend.asarray(3 * rng.standard_normal((7, 5)))
    logarithms = backend.to_numpy(nnx.LogSoftmax()(x))
    np.testing.assert_allclose(np.exp(logarithms), backend.to_numpy(nnx.Softmax()(x)), rtol=1e-13)
    shifted = backend.to_numpy(nnx.LogSoftmax()(x + 1000))
    np.testing.assert_allclose(shifted, logarithms, rtol=1e-11)


def test_log_softmax_of_infinitely_low_scores(backend: Backend, dtype: Any) -> None:
    x = np.array([[0.0, -np.inf]], dtype)
    y, dx = both_ways(nnx.LogSoftmax(), backend, x, np.array([[2.0, 0.0]], dtype))
    assert_same_bits(y, x)
    assert_same_bits(dx, np.zeros_like(x))


# ---- erf -------------------------------------------------------------------------------------


def erf_errors(backend: Backend, x: np.ndarray) -> np.ndarray:
    """Errors of `backend.erf` in units of the last place."""
    y = backend.to_numpy(backend.erf(backend.asarray(x)))
    assert y.dtype == x.dtype
    exact = np.array([math.erf(a) for a in x.tolist()])
    units: np.ndarray = np.spacing(np.abs(exact).astype(x.dtype))
    return np.asarray(np.abs(y.astype(np.float64) - exact) / units)


def test_erf_is_exact_to_a_few_units_of_the_last_place(backend: Backend, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    smallest = -290 if dtype == np.float64 else -36
    grids = [
        np.linspace(-7, 7, 20_001),
        np.linspace(0.46, 0.48, 2_001),  # from one approximation to the other
        np.linspace(3.9, 6.1, 2_001),
        10.0 ** rng.uniform(smallest, 0, 2_000),
    ]
    x = np.concatenate([*grids, -grids[-1]]).astype(dtype)
    assert erf_errors(backend, x).max() <= 5


def test_erf_at_the_ends(backend: Backend, dtype: Any) -> None:
    limits = np.finfo(dtype)
    largest = float(limits.max)
    x = np.array([0.0, -0.0, largest, -largest, np.inf, -np.inf, 1e4, -1e4, np.nan], dtype)
    y = backend.to_numpy(backend.erf(backend.asarray(x)))
    assert_same_bits(y[:-1], np.array([0.0, -0.0, 1, -1, 1, -1, 1, -1], dtype))
    assert np.isnan(y[-1])  # of any bits
    tiny = np.array([limits.tiny, -limits.tiny], dtype)
    y = backend.to_numpy(backend.erf(backend.asarray(tiny)))
    np.testing.assert_allclose(y, 2 / math.sqrt(math.pi) * tiny, rtol=4 * float(limits.eps))


def test_erf_takes_any_shape(backend: Backend, dtype: Any) -> None:
    x = backend.asarray(np.linspace(-3, 3, 24).reshape(4, 6), dtype)
    for view in (x, x.T, x[:, ::2], x[:0], x[0, 0]):
        y = backend.erf(view)
        assert y.shape == view.shape
        expected = [math.erf(a) for a in backend.to_numpy(view).ravel().tolist()]
        assert_close(backend.to_numpy(y).ravel(), np.array(expected), dtype=dtype)


def test_erf_in_an_expression(backend: Backend, dtype: Any) -> None:
    x = backend.asarray(np.linspace(-3, 3, 25), dtype)
    out = backend.elementwise("1 + erf(x / 2)", backend.empty(x.shape, dtype), x=x)
    expected = [1 + math.erf(a / 2) for a in np.linspace(-3, 3, 25).astype(dtype).tolist()]
    assert_close(backend.to_numpy(out), np.array(expected), dtype=dtype)


# ---- what it asks of the device --------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Identity"])
def test_an_activation_is_one_launch_each_way(name: str, dtype: Any) -> None:
    cuda = get_backend("cupy")
    x = cuda.asarray(np.linspace(-5, 5, 33 * 7).reshape(33, 7), dtype)
    dy = x + 1
    layer, arena = LAYERS[name][0](), Arena(cuda.xp)

    def step() -> None:
        with arena.step(x.shape):
            with counted() as forward:
                _, saved = layer.forward(x)
            with counted() as backward:
                layer.backward(dy, saved)
            counts[:] = [forward, backward]

    counts: list[Any] = []
    for _ in range(2):
        step()
    for count in counts:
        quiet(count)
        if _simulator() is not None:
            assert list(count.launches.values()) == [1], count.launches
            assert count.calls == 0


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_log_softmax_is_quiet_too() -> None:
    cuda = get_backend("cupy")
    x = cuda.asarray(np.linspace(-5, 5, 33 * 7).reshape(33, 7), np.float32)
    layer, arena = nnx.LogSoftmax(), Arena(cuda.xp)
    for i in range(2):
        with arena.step(x.shape), counted() as counts:
            _, saved = layer.forward(x)
            layer.backward(x, saved)
        if i:
            quiet(counts)
