"""Ready-made models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnx.backends.philox import INITIALIZE, check_seed, generator
from nnx.initializers import glorot_uniform, he_normal, lecun_normal
from nnx.layers import (
    ELU,
    GELU,
    SELU,
    Dropout,
    HardSigmoid,
    HardSwish,
    HardTanh,
    Identity,
    Layer,
    LeakyReLU,
    Linear,
    Mish,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)

ACTIVATIONS: dict[str, tuple[type[Layer], Any]] = {
    "elu": (ELU, he_normal),
    "gelu": (GELU, he_normal),
    "hard_sigmoid": (HardSigmoid, glorot_uniform),
    "hard_swish": (HardSwish, he_normal),
    "hard_tanh": (HardTanh, glorot_uniform),
    "identity": (Identity, glorot_uniform),
    "leaky_relu": (LeakyReLU, he_normal),
    "mish": (Mish, he_normal),
    "relu": (ReLU, he_normal),
    "selu": (SELU, lecun_normal),
    "sigmoid": (Sigmoid, glorot_uniform),
    "silu": (SiLU, he_normal),
    "softplus": (Softplus, he_normal),
    "tanh": (Tanh, glorot_uniform),
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
        activation: A layer's name: `"relu"`, `"leaky_relu"`, `"elu"`, `"gelu"`, `"silu"`,
            `"softplus"`, `"hard_swish"` or `"mish"` (weights by He et al. 2015), `"selu"` (by LeCun
            et al. 1998), `"tanh"`, `"sigmoid"`, `"hard_tanh"`, `"hard_sigmoid"` or `"identity"` (by
            Glorot and Bengio 2010).
        dropout: Probability of dropping a hidden unit.
        seed: The initial weights follow from it, the same on every backend.
        dtype: float32 or float64.
        n_models: K for K models side by side, each with weights of its own.
    """
    if len(sizes) < 2:
        raise ValueError(
            f"mlp: expected the widths of input and output at least, got {list(sizes)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: expected activation in {sorted(ACTIVATIONS)}, got {activation!r}")
    function, initializer = ACTIVATIONS[activation]
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
