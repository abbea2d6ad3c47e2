"""Initial weights, drawn on the host in float64 by a NumPy `Generator` and then cast.

So one seed gives the same weights on every backend and, up to rounding, in every dtype.

An initializer is a function `(shape, rng) -> float64 array` with `shape = (n_in, n_out)`; the
fan-in is the first axis, the fan-out the last.
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


def zeros(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """All zero; draws nothing. For biases, and for weights about to be loaded."""
    return np.zeros(shape)
