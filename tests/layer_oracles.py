"""What the activations and normalizations must return, in another style; a supplement to `oracles`.

Scalar functions of Python floats with derivatives in other forms than the library's, and
normalizations by explicit Jacobian matrices. Nothing is imported from nnx.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles

Scalar = Callable[[float], float]
NORMAL = statistics.NormalDist()


def logistic(a: float) -> float:
    """By the form that can't overflow."""
    if a < -700.0:
        return 0.0
    return 1.0 / (1.0 + math.exp(-a)) if a >= 0.0 else math.exp(a) / (1.0 + math.exp(a))


def identity() -> tuple[Scalar, Scalar]:
    return lambda a: a, lambda a: 1.0


def leaky_relu(slope: float = 0.01) -> tuple[Scalar, Scalar]:
    return lambda a: a * slope if a <= 0.0 else a, lambda a: slope if a <= 0.0 else 1.0


def elu(alpha: float = 1.0, scale: float = 1.0) -> tuple[Scalar, Scalar]:
    """At 0 the derivative is the one from the left."""

    def value(a: float) -> float:
        return scale * (a if a > 0.0 else alpha * math.expm1(a))

    return value, lambda a: scale * (1.0 if a > 0.0 else alpha * math.exp(a))


def selu() -> tuple[Scalar, Scalar]:
    """With the constants for which y of a standard normal x has mean 0 and variance 1.

    E[x+] = 1 / sqrt(2 pi), E[x+^2] = 1 / 2, and E[exp(k x); x < 0] = exp(k^2 / 2) Phi(-k).
    """
    once, twice = math.exp(0.5) * NORMAL.cdf(-1.0), math.exp(2.0) * NORMAL.cdf(-2.0)
    alpha = 1 / math.sqrt(2 * math.pi) / (0.5 - once)
    scale = 1 / math.sqrt(0.5 + alpha**2 * (twice - 2 * once + 0.5))
    return elu(alpha, scale)


def gelu() -> tuple[Scalar, Scalar]:
    """By the normal distribution."""
    return lambda a: a * NORMAL.cdf(a), lambda a: NORMAL.cdf(a) + a * NORMAL.pdf(a)


def gelu_tanh() -> tuple[Scalar, Scalar]:
    """`(1 + tanh(u)) / 2` is the logistic function of 2u."""

    def twice(a: float) -> float:
        return 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)

    def derivative(a: float) -> float:
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a**2)
        return logistic(twice(a)) + a * slope * logistic(twice(a)) * logistic(-twice(a))

    return lambda a: a * logistic(twice(a)), derivative


def silu() -> tuple[Scalar, Scalar]:
    return (
        lambda a: a * logistic(a),
        lambda a: logistic(a) + a * logistic(a) * logistic(-a),
    )


def softplus(beta: float = 1.0, threshold: float = 20.0) -> tuple[Scalar, Scalar]:
    def value(a: float) -> float:
        return a if a * beta > threshold else math.log1p(math.exp(a * beta)) / beta

    return value, lambda a: 1.0 if a * beta > threshold else logistic(a * beta)


def hard_sigmoid() -> tuple[Scalar, Scalar]:
    def value(a: float) -> float:
        return 0.0 if a <= -3.0 else 1.0 if a >= 3.0 else a / 6.0 + 0.5

    return value, lambda a: 1.0 / 6.0 if -3.0 < a < 3.0 else 0.0


def hard_tanh(low: float = -1.0, high: float = 1.0) -> tuple[Scalar, Scalar]:
    def value(a: float) -> float:
        return low if a < low else high if a > high else a

    return value, lambda a: 1.0 if low < a < high else 0.0


def hard_swish() -> tuple[Scalar, Scalar]:
    def value(a: float) -> float:
        return 0.0 if a <= -3.0 else a if a >= 3.0 else a * (a + 3.0) / 6.0

    return value, lambda a: 0.0 if a <= -3.0 else 1.0 if a >= 3.0 else (2.0 * a + 3.0) / 6.0


def mish() -> tuple[Scalar, Scalar]:
    """As quotients of powers of exp(a); the derivative is that of Misra 2020, section 3."""

    def value(a: float) -> float:
        if a > 100.0:
            return a
        e = math.exp(a)
        return a * (e * e + 2 * e) / (e * e + 2 * e + 2)

    def derivative(a: float) -> float:
        if a > 100.0:
            return 1.0
        e = math.exp(a)
        omega = 4 * (a + 1) + 4 * e**2 + e**3 + e * (4 * a + 6)
        return e * omega / (2 * e + e**2 + 2) ** 2

    return value, derivative


def sigmoid() -> tuple[Scalar, Scalar]:
    return logistic, lambda a: logistic(a) * logistic(-a)


def tanh() -> tuple[Scalar, Scalar]:
    return math.tanh, lambda a: 1 / math.cosh(a) ** 2 if abs(a) < 300.0 else 0.0


def activation(pair: tuple[Scalar, Scalar]) -> Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]:
    """`(y, dx)` of arrays from a value and a derivative."""
    value, derivative = pair

    def oracle(x: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
        return (
            oracles.elementwise(value, x),
            oracles.elementwise(lambda a, d: d * derivative(a), x, dy),
        )

    return oracle


def log_softmax(x: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis; the gradient by the full Jacobian, element by element."""
    x = np.asarray(x, np.float64)
    n = x.shape[-1]
    ys, dxs = [], []
    for row, d in zip(x.reshape(-1, n).tolist(), np.reshape(dy, (-1, n)).tolist(), strict=True):
        top = max(row)
        logarithm = math.log(math.fsum(math.exp(a - top) for a in row))
        y = [(a - top) - logarithm for a in row]
        ys.append(y)
        dxs.append(
            [
                math.fsum(d[i] * ((1.0 if i == j else 0.0) - math.exp(y[j])) for i in range(n))
                for j in range(n)
            ]
        )
    return np.array(ys).reshape(x.shape), np.array(dxs).reshape(x.shape)


def standardize(x: Any, dxhat: Any, eps: float, centered: bool = True) -> Any:
    """`(xhat, dx)` of one vector: `xhat = (x - mean) / sqrt(var + eps)`, dx by the Jacobian."""
    values = np.asarray(x, np.float64)
    n = len(values)
    if not n:
        return values, values
    mean = math.fsum(values) / n if centered else 0.0
    variance = math.fsum((a - mean) ** 2 for a in values.tolist()) / n
    scale = 1 / math.sqrt(variance + eps)
    xhat = (values - mean) * scale
    jacobian = scale * (np.eye(n) - np.outer(xhat, xhat) / n - (1 / n if centered else 0.0))
    return xhat, jacobian.T @ np.asarray(dxhat, np.float64)


def normalization(
    x: Any,
    dy: Any,
    weight: Any,
    bias: Any,
    eps: float,
    *,
    over_samples: bool = False,
    centered: bool = True,
    statistics: tuple[Any, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`(y, dx, dweight, dbias)`; `statistics` are mean and variance where they are given."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    width = x.shape[-1]
    w = np.ones(width) if weight is None else np.asarray(weight, np.float64)
    b = np.zeros(width) if bias is None else np.asarray(bias, np.float64)
    n = math.prod(x.shape[:-1])
    rows, dys = x.reshape(n, width), dy.reshape(n, width)
    xhat, dx = np.empty((n, width)), np.empty((n, width))
    g = dys * w
    if statistics is not None:
        mean, variance = (np.asarray(a, np.float64) for a in statistics)
        for j in range(width):
            scale = 1 / math.sqrt(variance[j] + eps)
            xhat[:, j], dx[:, j] = (rows[:, j] - mean[j]) * scale, g[:, j] * scale
    elif over_samples:
        for j in range(width):
            xhat[:, j], dx[:, j] = standardize(rows[:, j], g[:, j], eps)
    else:
        for i in range(n):
            xhat[i], dx[i] = standardize(rows[i], g[i], eps, centered)
    dweight = np.array([math.fsum(dys[:, j] * xhat[:, j]) for j in range(width)])
    dbias = np.array([math.fsum(dys[:, j]) for j in range(width)])
    return (xhat * w + b).reshape(x.shape), dx.reshape(x.shape), dweight, dbias
