"""Dropout, with masks that are a function of (seed, layer, step) and nothing else."""

from __future__ import annotations

from typing import Any

from nnx._checks import check_floating, check_range
from nnx.backends import Array, backend_of
from nnx.layers.base import Layer, Saved, Step


class Dropout(Layer):
    """Inverted dropout: in training each unit is 0 with probability p, else `x / (1 - p)`.

    In evaluation `y = x` (the same array). The mask comes from the Philox stream of this layer and
    step: it is bit-identical on every backend, in every dtype, and when a run is repeated.
    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".

    Args:
        p: Probability of dropping a unit, in [0, 1]; 2^-24 is the resolution.

    Shape: x of any shape -> y of the same.

    Saved: the mask, opaque; None where nothing was dropped.
    Gradient: `dx = dy / (1 - p)` where the unit was kept, else 0.
    """

    def __init__(self, p: float = 0.5) -> None:
        check_range("Dropout", "p", p, 0, 1, closed="[]")
        self.p = float(p)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"p": self.p}

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("Dropout", x)
        if step is None or self.p == 0:
            return x, None
        stream, use = step.draw(self)
        return backend_of(x).dropout(
            x, self.p, seed=step.seed, stream=stream, use=use, state=step.state
        )

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        if not need_dx:
            return None
        if saved is None:
            return dy
        return backend_of(dy).dropout_backward(dy, saved, self.p)
