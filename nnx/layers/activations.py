"""Activations. All keep the shape and dtype of their input."""

from __future__ import annotations

import math

import numpy as np

from nnx._checks import check_floating
from nnx.backends import Array, backend_of
from nnx.layers.base import Layer, Saved, Step


class ReLU(Layer):
    """Rectifier: `y = max(x, 0)`.

    Shape: x of any shape -> y of the same. NaN stays NaN.

    Saved: a mask of where `x > 0`, opaque, one bit per element in the CUDA kernel.
    Gradient: `dx = dy` where `x > 0`, else 0, so the derivative at 0 is 0. It is a selection, not a
    product: NaN or inf in `dy` doesn't leak through an inactive unit.
    """

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("ReLU", x)
        return backend_of(x).relu(x)

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        return backend_of(dy).relu_backward(dy, saved) if need_dx else None


class Sigmoid(Layer):
    """Logistic function: `y = 1 / (1 + exp(-x))`.

    Shape: x of any shape -> y of the same. No overflow and no warning for any finite x.

    Saved: y. Gradient: `dx = dy * y * (1 - y)`.
    """

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("Sigmoid", x)
        backend = backend_of(x)
        xp = backend.xp
        # exp(-x) stays finite up to here; beyond it y is below the smallest normal number anyway
        largest = math.floor(math.log(np.finfo(str(x.dtype)).max))
        y = backend.empty(x.shape, x.dtype)
        xp.negative(x, out=y)
        xp.minimum(y, largest, out=y)
        xp.exp(y, out=y)
        xp.add(y, 1, out=y)
        xp.divide(1, y, out=y)
        return y, y

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        if not need_dx:
            return None
        backend = backend_of(dy, saved)
        xp = backend.xp
        dx = xp.subtract(1, saved, out=backend.empty(dy.shape, dy.dtype))
        xp.multiply(dx, saved, out=dx)
        return xp.multiply(dx, dy, out=dx)


class Tanh(Layer):
    """Hyperbolic tangent: `y = tanh(x)`.

    Shape: x of any shape -> y of the same.

    Saved: y. Gradient: `dx = dy * (1 - y^2)`.
    """

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("Tanh", x)
        backend = backend_of(x)
        y = backend.xp.tanh(x, out=backend.empty(x.shape, x.dtype))
        return y, y

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        if not need_dx:
            return None
        backend = backend_of(dy, saved)
        xp = backend.xp
        dx = xp.multiply(saved, saved, out=backend.empty(dy.shape, dy.dtype))
        xp.subtract(1, dx, out=dx)
        return xp.multiply(dx, dy, out=dx)


class Softmax(Layer):
    """Probabilities from scores, over the last axis: `y_i = exp(x_i) / sum_j exp(x_j)`.

    The row's maximum is subtracted first, which changes nothing but keeps exp finite. To train a
    classifier, end the model at the logits and use `SoftmaxNLL`, which holds this layer.

    Shape: x `(..., C)` -> y of the same.

    Saved: y. Gradient: with the Jacobian `dy_i/dx_j = y_i (1[i = j] - y_j)`,
    `dx = y * (dy - sum(dy * y))`, the sum over the last axis.
    """

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("Softmax", x)
        backend = backend_of(x)
        xp = backend.xp
        row = backend.empty((*x.shape[:-1], 1), x.dtype)
        y = backend.empty(x.shape, x.dtype)
        xp.max(x, axis=-1, keepdims=True, out=row)
        xp.subtract(x, row, out=y)
        xp.exp(y, out=y)
        xp.sum(y, axis=-1, keepdims=True, out=row)
        xp.divide(y, row, out=y)
        return y, y

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        if not need_dx:
            return None
        backend = backend_of(dy, saved)
        xp, y = backend.xp, saved
        row = backend.empty((*dy.shape[:-1], 1), dy.dtype)
        dx = backend.empty(dy.shape, dy.dtype)
        xp.multiply(dy, y, out=dx)
        xp.sum(dx, axis=-1, keepdims=True, out=row)
        xp.subtract(dy, row, out=dx)
        return xp.multiply(dx, y, out=dx)
