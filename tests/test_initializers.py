"""Initializers: the variance each promises, from the true fan-in; and weights stored as columns.

Statistics of n draws are compared within 4 standard deviations of the estimate: of a mean
`sigma / sqrt(n)`, of a variance `sigma^2 sqrt((kurtosis - 1) / n)`. The generator is seeded, so the
outcome is the same in every run.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from oracles import assert_same_bits

import nnx
from nnx import initializers
from nnx.backends import Backend
from nnx.initializers import Initializer

# (n_in, n_out) -> variance, and the kurtosis of the distribution
HE = lambda n_in, n_out: 2 / n_in  # noqa: E731
GLOROT = lambda n_in, n_out: 2 / (n_in + n_out)  # noqa: E731
LECUN = lambda n_in, n_out: 1 / n_in  # noqa: E731
NORMAL, UNIFORM, TRUNCATED = 3.0, 1.8, 2.3656  # the last of N(0, 1) within [-2, 2]

SCHEMES: dict[str, tuple[Initializer, Any, float]] = {
    "he_normal": (initializers.he_normal, HE, NORMAL),
    "he_uniform": (initializers.he_uniform, HE, UNIFORM),
    "he_truncated_normal": (initializers.he_truncated_normal, HE, TRUNCATED),
    "glorot_normal": (initializers.glorot_normal, GLOROT, NORMAL),
    "glorot_uniform": (initializers.glorot_uniform, GLOROT, UNIFORM),
    "glorot_truncated_normal": (initializers.glorot_truncated_normal, GLOROT, TRUNCATED),
    "lecun_normal": (initializers.lecun_normal, LECUN, NORMAL),
    "lecun_uniform": (initializers.lecun_uniform, LECUN, UNIFORM),
    "lecun_truncated_normal": (initializers.lecun_truncated_normal, LECUN, TRUNCATED),
}


@pytest.mark.parametrize("shape", [(784, 50), (50, 784), (512, 512)])
@pytest.mark.parametrize("name", SCHEMES)
def test_mean_variance_and_range(name: str, shape: tuple[int, int]) -> None:
    initializer, variance_of, kurtosis = SCHEMES[name]
    weight = initializer(shape, np.random.default_rng(1))
    assert weight.shape == shape
    assert weight.dtype == np.float64
    variance, n = variance_of(*shape), weight.size
    assert abs(float(weight.mean())) < 4 * math.sqrt(variance / n)
    error = abs(float((weight**2).mean()) / variance - 1)
    assert error < 4 * math.sqrt((kurtosis - 1) / n)
    largest = float(np.abs(weight).max()) / math.sqrt(variance)
    if kurtosis == UNIFORM:
        assert largest == pytest.approx(math.sqrt(3), rel=1e-3)
        assert largest <= math.sqrt(3)
    elif kurtosis == TRUNCATED:
        bound = 2 / 0.8796256610342398
        assert largest == pytest.approx(bound, rel=1e-3)
        assert largest <= bound * (1 + 1e-15)
    else:
        assert largest > 3.5


def test_the_fan_in_of_784_to_50_is_784() -> None:
    """The text this is from scaled every layer by 1 / 512, the width it had experimented with."""
    weight = initializers.he_normal((784, 50), np.random.default_rng(0))
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / 784), rel=4 / math.sqrt(2 * 39_200))
    layer = nnx.Linear(784, 50, rng=np.random.default_rng(0))
    assert_same_bits(layer.weight.value, weight.astype(np.float32))


def test_the_variance_of_the_truncated_normal_is_corrected() -> None:
    """Against the integral: 1 - 2 * 2 phi(2) / (2 Phi(2) - 1), phi and Phi of N(0, 1)."""
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    deviation = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    assert deviation == pytest.approx(initializers._TRUNCATED_DEVIATION, rel=1e-14)


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9), (1, 1), (1, 7), (100, 60)])
def test_orthogonal_is_orthogonal(shape: tuple[int, int], gain: float) -> None:
    weight = initializers.orthogonal(gain)(shape, np.random.default_rng(3))
    assert weight.shape == shape
    assert weight.dtype == np.float64
    assert weight.flags.c_contiguous
    n_in, n_out = shape
    product = weight @ weight.T if n_in < n_out else weight.T @ weight
    np.testing.assert_allclose(product, gain**2 * np.eye(min(shape)), atol=1e-12, rtol=0)


def test_orthogonal_has_no_preferred_sign() -> None:
    """LAPACK fixes the signs in its own way; uniform over rotations each element has mean 0."""
    rng = np.random.default_rng(0)
    draws = np.array([initializers.orthogonal()((3, 3), rng) for _ in range(2000)])
    # each element has variance 1/3
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=4 * math.sqrt(1 / 3 / 2000))
    determinants = np.linalg.det(draws)
    assert abs(float(determinants.mean())) < 4 / math.sqrt(2000)


def test_constants() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    for initializer, value in (
        (initializers.zeros, 0.0),
        (initializers.ones, 1.0),
        (initializers.constant(-0.3), -0.3),
    ):
        assert_same_bits(initializer((3, 2), rng), np.full((3, 2), value))
    assert rng.bit_generator.state == before
    assert nnx.Linear(2, 3, initializer=initializers.ones).weight.value.all()


@pytest.mark.parametrize("name", [*SCHEMES, "orthogonal"])
def test_one_seed_gives_the_same_weights_in_every_dtype_and_place(
    name: str, backend: Backend
) -> None:
    initializer = initializers.orthogonal() if name == "orthogonal" else SCHEMES[name][0]
    drawn = initializer((7, 5), np.random.default_rng(9))
    for dtype in (np.float32, np.float64):
        rng = np.random.default_rng(9)
        layer = nnx.Linear(7, 5, initializer=initializer, rng=rng, dtype=dtype).to(backend)
        assert_same_bits(backend.to_numpy(layer.weight.value), drawn.astype(dtype))


def test_k_models_get_weights_of_their_own() -> None:
    rng = np.random.default_rng(0)
    layer = nnx.Linear(6, 6, initializer=initializers.orthogonal(), rng=rng, n_models=3)
    for w in layer.weight.value.astype(np.float64):
        np.testing.assert_allclose(w @ w.T, np.eye(6), atol=1e-6)
    assert not np.array_equal(layer.weight.value[0], layer.weight.value[1])


# ---- columns -----------------------------------------------------------------------------------


def column_net(weights: Any, x: np.ndarray, t: np.ndarray) -> tuple[float, list[Any], np.ndarray]:
    """Loss, gradients and dx of a tanh net with samples as columns: Z = W X + b, mean squares."""
    a, outputs = x, [x]
    for i, (w, b) in enumerate(weights):
        z = w @ a + b[:, None]
        a = np.tanh(z) if i < len(weights) - 1 else z
        outputs.append(a)
    width, m = t.shape
    loss = float(((a - t) ** 2).sum()) / (width * m)
    delta, gradients = 2 * (a - t) / (width * m), list[Any]()
    for i in reversed(range(len(weights))):
        w, _ = weights[i]
        gradients.insert(0, (delta @ outputs[i].T, delta.sum(axis=1)))
        delta = w.T @ delta
        if i:
            delta = delta * (1 - outputs[i] ** 2)
    return loss, gradients, delta


def test_a_net_of_columns_is_the_net_of_rows(backend: Backend, rng: np.random.Generator) -> None:
    sizes = [4, 7, 5, 3]
    weights = [
        (rng.standard_normal((n, m)), rng.standard_normal(n)) for m, n in itertools.pairwise(sizes)
    ]
    x, t = rng.standard_normal((4, 11)), rng.standard_normal((3, 11))
    loss, gradients, dx = column_net(weights, x, t)
    linears = [nnx.Linear.from_columns(w, b).to(backend) for w, b in weights]
    model = nnx.Sequential(linears[0], nnx.Tanh(), linears[1], nnx.Tanh(), linears[2])
    y, saved = model.forward(backend.asarray(x.T))
    value, dy = nnx.MeanSquaredError()(y, backend.asarray(t.T))
    back = model.backward(dy, saved)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(float(backend.to_numpy(value)), loss, **close)
    np.testing.assert_allclose(backend.to_numpy(back), dx.T, **close)
    for layer, (dw, db) in zip(linears, gradients, strict=True):
        assert layer.bias is not None
        np.testing.assert_allclose(backend.to_numpy(layer.weight.grad), dw.T, **close)
        np.testing.assert_allclose(backend.to_numpy(layer.bias.grad), db, **close)


@pytest.mark.parametrize("models", [(), (3,)])
@pytest.mark.parametrize("column", [False, True])
def test_columns_go_there_and_back(
    models: tuple[int, ...], column: bool, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((*models, 3, 4)).astype(dtype)
    bias = rng.standard_normal((*models, 3)).astype(dtype)
    given = backend.asarray(bias[..., None] if column else bias)
    layer = nnx.Linear.from_columns(backend.asarray(weight), given)
    assert (layer.n_in, layer.n_out, layer.n_models) == (4, 3, *models, None)[:3]
    w, b = layer.to_columns()
    assert nnx.backend_of(w, b) is backend
    assert_same_bits(backend.to_numpy(w), weight)
    assert_same_bits(backend.to_numpy(b), bias)
    w += 1  # a copy
    assert_same_bits(backend.to_numpy(layer.to_columns()[0]), weight)
    bare = nnx.Linear.from_columns(backend.asarray(weight))
    assert bare.bias is None
    assert bare.to_columns()[1] is None


def test_columns_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected weight of shape \(n_out, n_in\).*got \(3,\)"):
        nnx.Linear.from_columns(np.ones(3))
    with pytest.raises(ValueError, match=r"expected bias of shape \(3,\) or \(3, 1\), got \(4,\)"):
        nnx.Linear.from_columns(np.ones((3, 4)), np.ones(4))
    with pytest.raises(TypeError, match="expected dtype float32 or float64, got int64"):
        nnx.Linear.from_columns(np.ones((3, 4), np.int64))
