"""Ready-made models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnx.backends.philox import INITIALIZE, check_seed, generator
from nnx.initializers import glorot_uniform, he_normal
from nnx.layers import Dropout, Layer, Linear, ReLU, Sequential, Sigmoid, Tanh

_ACTIVATIONS: dict[str, tuple[type[Layer], Any]] = {
    "relu": (ReLU, he_normal),
    "tanh": (Tanh, glorot_uniform),
    "sigmoid": (Sigmoid, glorot_uniform),
}


def mlp(
    sizes: Sequence[int],
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: Any = np.float32,
    n_models: int | None = None,
) -> Sequential:
    """A multi-layer perceptron: affine layers with an activation between them.

    Args:
        sizes: Widths of input, hidden layers and output: `[784, 128, 10]`. The output is linear.
        activation: `"relu"` (weights by He et al. 2015), `"tanh"` or `"sigmoid"` (by Glorot and
            Bengio 2010).
        dropout: Probability of dropping a hidden unit.
        seed: The initial weights follow from it, the same on every backend.
        dtype: float32 or float64.
        n_models: K for K models side by side, each with weights of its own.
    """
    if len(sizes) < 2:
        raise ValueError(
            f"mlp: expected the widths of input and output at least, got {list(sizes)}"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"mlp: expected activation in {sorted(_ACTIVATIONS)}, got {activation!r}")
    function, initializer = _ACTIVATIONS[activation]
    rng = generator(check_seed(seed), INITIALIZE)
    layers: list[Layer] = []
    last = len(sizes) - 2
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        scheme = initializer if i < last else glorot_uniform
        layers.append(
            Linear(n_in, n_out, initializer=scheme, rng=rng, dtype=dtype, n_models=n_models)
        )
        if i < last:
            layers += [function()] + ([Dropout(dropout)] if dropout else [])
    return Sequential(*layers)
