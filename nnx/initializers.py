"""Initial weights, drawn on the host in float64 by a NumPy `Generator` and then cast.

So one seed gives the same weights on every backend and, up to rounding, in every dtype.

An initializer is a function `(shape, rng) -> float64 array` with `shape = (n_in, n_out)`; the
fan-in is the first axis, the fan-out the last. `constant` and `orthogonal` make one. Which to take:
`he` before ReLU and its kin, `glorot` before tanh and at a linear output, `lecun` before SELU. The
variance is that of the scheme whether the distribution is normal, truncated or uniform.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Initializer: TypeAlias = Callable[[tuple[int, ...], np.random.Generator], np.ndarray]


def he_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """N(0, 2 / n_in), which keeps the second moment through ReLU layers.

    He et al. 2015, "Delving deep into rectifiers", eq. 10.
    """
    return rng.standard_normal(shape) * math.sqrt(2 / shape[0])


def he_uniform(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """U(-a, a) with `a = sqrt(6 / n_in)`: the variance of `he_normal`."""
    a = math.sqrt(6 / shape[0])
    return rng.uniform(-a, a, shape)


def glorot_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """N(0, 2 / (n_in + n_out)), for tanh and linear layers.

    Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural
    networks", eq. 12.
    """
    return rng.standard_normal(shape) * math.sqrt(2 / (shape[0] + shape[-1]))


def glorot_uniform(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """U(-a, a) with `a = sqrt(6 / (n_in + n_out))`; Glorot and Bengio 2010, eq. 16."""
    a = math.sqrt(6 / (shape[0] + shape[-1]))
    return rng.uniform(-a, a, shape)


def lecun_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """N(0, 1 / n_in), which keeps the variance through linear layers and SELU.

    LeCun et al. 1998, "Efficient backprop", eq. 16.
    """
    return rng.standard_normal(shape) * math.sqrt(1 / shape[0])


def lecun_uniform(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """U(-a, a) with `a = sqrt(3 / n_in)`: the variance of `lecun_normal`."""
    a = math.sqrt(3 / shape[0])
    return rng.uniform(-a, a, shape)


def he_truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """`he_normal` without tails: truncated at 2 sigma, and widened to variance `2 / n_in`."""
    return _truncated_normal(shape, rng) * math.sqrt(2 / shape[0])


def glorot_truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """`glorot_normal` without tails: truncated at 2 sigma, and widened to its variance."""
    return _truncated_normal(shape, rng) * math.sqrt(2 / (shape[0] + shape[-1]))


def lecun_truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """`lecun_normal` without tails: truncated at 2 sigma, and widened to variance `1 / n_in`."""
    return _truncated_normal(shape, rng) * math.sqrt(1 / shape[0])


_TRUNCATED_DEVIATION = 0.8796256610342398
"""Of N(0, 1) truncated at 2: `sqrt(1 - 4 phi(2) / (2 Phi(2) - 1))`, phi the density of N(0, 1)."""


def _truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Variance 1, nothing beyond `2 / _TRUNCATED_DEVIATION`; what falls outside is drawn again."""
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(np.count_nonzero(outside))
    return values / _TRUNCATED_DEVIATION


def orthogonal(gain: float = 1.0) -> Initializer:
    """An initializer: `gain` times a matrix with orthonormal columns, or rows if n_out > n_in.

    So a square layer keeps lengths, up to the gain. Saxe et al. 2014, "Exact solutions to the
    nonlinear dynamics of learning in deep linear neural networks"; uniform over all such matrices
    by fixing the signs of a QR decomposition (Mezzadri 2007, "How to generate random matrices from
    the classical compact groups", section 5). The decomposition is LAPACK's: another LAPACK may
    round the last bits differently.
    """

    def draw(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        n_in, n_out = shape[0], shape[-1]
        q, r = np.linalg.qr(rng.standard_normal((max(n_in, n_out), min(n_in, n_out))))
        q *= np.where(np.diagonal(r) < 0, -gain, gain)
        return np.ascontiguousarray(q if n_in >= n_out else q.T)

    return draw


def constant(value: float) -> Initializer:
    """An initializer: every element is `value`; draws nothing."""
    return lambda shape, rng: np.full(shape, value, np.float64)


def ones(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """All one; draws nothing."""
    return np.ones(shape)


def zeros(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """All zero; draws nothing. For biases, and for weights about to be loaded."""
    return np.zeros(shape)
