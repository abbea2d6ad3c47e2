"""Normalization: inputs shifted and scaled to mean 0 and variance 1, over samples or features.

One pair of passes serves all three layers. With `xhat = (x - mean) * rstd`, `y = xhat * weight +
bias` and n values under each mean, the derivative of the statistics gives, with `g = dy * weight`,
`dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)`: a change of x that shifts or stretches
all n values alike doesn't change xhat, so the part of g along it is taken out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nnx._checks import check_input, check_range
from nnx.backends import Array, Backend, backend_of
from nnx.layers.base import Layer, Saved, Step
from nnx.parameter import Parameter


class _Normalization(Layer):
    """The passes; a subclass says which axis the statistics are taken over."""

    _axis = -1  # of the rows (..., N, C)
    _centered = True  # whether the mean is subtracted

    def __init__(
        self,
        n_features: int,
        eps: float | None,
        dtype: Any,
        n_models: int | None,
        *,
        weight: bool,
        bias: bool,
    ) -> None:
        who, self.dtype = type(self).__name__, np.dtype(dtype)
        if n_features < 1:
            raise ValueError(f"{who}: expected n_features of at least 1, got {n_features}")
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"{who}: expected dtype float32 or float64, got {self.dtype}")
        if eps is not None:
            check_range(who, "eps", eps, 0, np.inf, closed="[")
        self.n_features, self.eps, self.n_models = n_features, eps, n_models
        self.weight = Parameter(np.ones(self._shape, dtype)) if weight else None
        self.bias = Parameter(np.zeros(self._shape, dtype)) if bias else None

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of a weight or a statistic."""
        return (self.n_features,) if self.n_models is None else (self.n_models, self.n_features)

    def config(self) -> dict[str, Any]:
        return {
            "n_features": self.n_features,
            "eps": self.eps,
            "affine": self.weight is not None,
            "dtype": str(self.dtype),
            "n_models": self.n_models,
        }

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:
        rows = self._rows(x)
        backend = backend_of(rows)
        mean, rstd, measured = self._statistics(backend, rows, x, step)
        xhat = backend.empty(rows.shape, rows.dtype)
        wide = {"mean": _wide(mean, rows), "rstd": _wide(rstd, rows)}
        backend.elementwise("(x - mean) * rstd", xhat, x=rows, **wide)
        weight, bias = (1.0 if self.weight is None else _wide(self.weight.value, rows)), 0.0
        if self.bias is not None:
            bias = _wide(self.bias.value, rows)
        y = backend.empty(rows.shape, rows.dtype)
        backend.elementwise("xhat * weight + bias", y, xhat=xhat, weight=weight, bias=bias)
        y = y if self.n_models is not None or x.ndim == 2 else y.reshape(x.shape)
        return y, (xhat, rstd, measured, x.shape)

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:
        xhat, rstd, measured, shape = saved
        backend = backend_of(dy, xhat)
        xp, axis, wide = backend.xp, self._axis, _wide(rstd, xhat)
        dy = dy.reshape(xhat.shape)
        if self.bias is not None:
            backend.bias_grad(dy, self.bias.grad, accumulate=self.bias.accumulate())
        work = backend.empty(dy.shape, dy.dtype)
        weight = 1.0
        if self.weight is not None:
            backend.elementwise("dy * xhat", work, dy=dy, xhat=xhat)
            backend.bias_grad(work, self.weight.grad, accumulate=self.weight.accumulate())
            weight = _wide(self.weight.value, dy)
        if not need_dx:
            return None
        dx = backend.empty(dy.shape, dy.dtype)
        backend.elementwise("dy * weight", dx, dy=dy, weight=weight)
        if not measured:
            backend.elementwise("g * rstd", dx, g=dx, rstd=wide)
        else:
            stretch = backend.empty(rstd.shape, dy.dtype)
            backend.elementwise("g * xhat", work, g=dx, xhat=xhat)
            xp.mean(work, axis=axis, keepdims=True, out=stretch)
            shift: Array = 0.0
            if self._centered:
                shift = backend.empty(rstd.shape, dy.dtype)
                xp.mean(dx, axis=axis, keepdims=True, out=shift)
                shift = _wide(shift, dy)
            sums = {"shift": shift, "stretch": _wide(stretch, dy)}
            expression = "rstd * (g - shift - xhat * stretch)"
            backend.elementwise(expression, dx, g=dx, xhat=xhat, rstd=wide, **sums)
        if self.n_models is not None and len(shape) == 2:
            return dx.sum(axis=0)  # one input fed all models
        return dx.reshape(shape)

    def _rows(self, x: Array) -> Array:
        """The input as `(N, C)`, or `(K, N, C)` with K models."""
        check_input(type(self).__name__, x, self.n_features, self.dtype, self.n_models)
        xp = backend_of(x, x if self.weight is None else self.weight.value).xp
        if self.n_models is None:
            return x if x.ndim == 2 else x.reshape(-1, self.n_features)
        return x if x.ndim == 3 else xp.broadcast_to(x, (self.n_models, *x.shape))

    def _statistics(
        self, backend: Backend, rows: Array, x: Array, step: Step | None
    ) -> tuple[Array, Array, bool]:
        """`(mean, 1 / deviation, whether they were measured on these rows)`."""
        mean, variance = self._moments(backend, rows)
        return mean, self._reciprocal(backend, variance), True

    def _moments(self, backend: Backend, rows: Array) -> tuple[Array, Array]:
        """Mean and biased variance; 0 and the mean square if nothing is subtracted."""
        xp, axis, dtype = backend.xp, self._axis, rows.dtype
        shape = list(rows.shape)
        shape[axis] = 1
        mean: Array = 0.0
        if self._centered:
            mean = xp.mean(rows, axis=axis, keepdims=True, out=backend.empty(tuple(shape), dtype))
        square = backend.empty(rows.shape, dtype)  # of the difference: E[x^2] - E[x]^2 cancels
        expression = "(x - mean) * (x - mean)"
        backend.elementwise(expression, square, x=rows, mean=_wide(mean, rows))
        variance = backend.empty(tuple(shape), dtype)
        xp.mean(square, axis=axis, keepdims=True, out=variance)
        return mean, variance

    def _reciprocal(self, backend: Backend, variance: Array) -> Array:
        eps = float(np.finfo(self.dtype).eps) if self.eps is None else self.eps
        rstd = backend.empty(variance.shape, variance.dtype)
        return backend.elementwise("1 / sqrt(variance + eps)", rstd, variance=variance, eps=eps)


class BatchNorm(_Normalization):
    """Batch normalization: every feature to mean 0 and variance 1 over the samples.

    `y = (x - mean) / sqrt(variance + eps) * weight + bias`. Ioffe and Szegedy 2015, "Batch
    normalization", algorithm 1. In training the statistics are those of the batch, the variance
    biased (divided by n), and the running ones follow them: `running = (1 - momentum) * running +
    momentum * new`, with the unbiased variance (divided by n - 1). In evaluation the running
    statistics are used. All of this is PyTorch's `BatchNorm1d`, with the features last.

    Args:
        n_features: Width of the last axis.
        eps: Added to the variance.
        momentum: Share of the new in the running statistics.
        affine: Whether there are weight (from 1) and bias (from 0).
        dtype: float32 or float64.
        n_models: K for K models side by side, each with statistics of its own.

    Shape: x `(..., n_features)` -> y of the same; all leading axes are samples. With K models x
        `(K, N, n_features)`, or `(N, n_features)` shared by all -> y `(K, N, n_features)`.

    Buffers: `running_mean`, from 0, and `running_var`, from 1. They are written only when a Step is
    given.

    Saved: xhat and 1 / deviation.
    Gradient: `dbias = sum(dy)`, `dweight = sum(dy * xhat)` over samples, and with `g = dy * weight`
    `dx = rstd * (g - mean(g) - xhat * mean(g * xhat))`, since the statistics depend on x too; in
    evaluation they don't, and `dx = g * rstd`.

    Raises:
        ValueError: A batch of one sample in training, whose variance says nothing; or a last axis
            that isn't `n_features`.
        TypeError: The dtype isn't the layer's.
    """

    buffer_names = ("running_mean", "running_var")
    _axis = -2

    def __init__(
        self,
        n_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        dtype: Any = np.float32,
        n_models: int | None = None,
    ) -> None:
        check_range("BatchNorm", "momentum", momentum, 0, 1, closed="[]")
        super().__init__(n_features, eps, dtype, n_models, weight=affine, bias=affine)
        self.momentum = momentum
        self.running_mean: Array = np.zeros(self._shape, dtype)
        self.running_var: Array = np.ones(self._shape, dtype)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return super().config() | {"momentum": self.momentum}

    def _statistics(
        self, backend: Backend, rows: Array, x: Array, step: Step | None
    ) -> tuple[Array, Array, bool]:
        n = rows.shape[-2]
        if step is None or n == 0:
            variance = self.running_var[..., None, :]
            return self.running_mean[..., None, :], self._reciprocal(backend, variance), False
        if n == 1:
            raise ValueError(
                f"BatchNorm: expected more than one sample in training, got input of shape "
                f"{x.shape}; choose a batch size that leaves no last batch of one, or use LayerNorm"
            )
        mean, variance = self._moments(backend, rows)
        for running, new, factor in (
            (self.running_mean, mean, self.momentum),
            (self.running_var, variance, self.momentum * n / (n - 1)),
        ):
            numbers = {"keep": 1 - self.momentum, "factor": factor}
            old = running[..., None, :]
            backend.elementwise("keep * old + factor * new_", old, old=old, new_=new, **numbers)
        return mean, self._reciprocal(backend, variance), True


class LayerNorm(_Normalization):
    """Layer normalization: every sample to mean 0 and variance 1 over its features.

    `y = (x - mean) / sqrt(variance + eps) * weight + bias`, mean and biased variance over the last
    axis. Ba, Kiros and Hinton 2016, "Layer normalization", eq. 3 and 4; PyTorch's `LayerNorm`.
    Training and evaluation don't differ.

    Args:
        n_features: Width of the last axis.
        eps: Added to the variance.
        affine: Whether there are weight (from 1) and bias (from 0).
        dtype: float32 or float64.
        n_models: K for K models side by side.

    Shape: x `(..., n_features)` -> y of the same. With K models x `(K, N, n_features)`, or
        `(N, n_features)` shared by all -> y `(K, N, n_features)`.

    Saved: xhat and 1 / deviation.
    Gradient: `dbias = sum(dy)`, `dweight = sum(dy * xhat)` over samples, and with `g = dy * weight`
    `dx = rstd * (g - mean(g) - xhat * mean(g * xhat))`, the means over features.

    Raises:
        ValueError: The last axis isn't `n_features`.
        TypeError: The dtype isn't the layer's.
    """

    def __init__(
        self,
        n_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: Any = np.float32,
        n_models: int | None = None,
    ) -> None:
        super().__init__(n_features, eps, dtype, n_models, weight=affine, bias=affine)


class RMSNorm(_Normalization):
    """Root-mean-square normalization: every sample divided by the size of its features.

    `y = x / sqrt(mean(x^2) + eps) * weight`, the mean over the last axis. Zhang and Sennrich 2019,
    "Root mean square layer normalization", eq. 4; PyTorch's `RMSNorm`.

    Args:
        n_features: Width of the last axis.
        eps: Added to the mean square; None for the dtype's machine epsilon.
        affine: Whether there is a weight (from 1).
        dtype: float32 or float64.
        n_models: K for K models side by side.

    Shape: x `(..., n_features)` -> y of the same. With K models x `(K, N, n_features)`, or
        `(N, n_features)` shared by all -> y `(K, N, n_features)`.

    Saved: `xhat = x * rrms` and `rrms`, 1 / root mean square.
    Gradient: `dweight = sum(dy * xhat)` over samples, and with `g = dy * weight`
    `dx = rrms * (g - xhat * mean(g * xhat))`, the mean over features.

    Raises:
        ValueError: The last axis isn't `n_features`.
        TypeError: The dtype isn't the layer's.
    """

    _centered = False

    def __init__(
        self,
        n_features: int,
        *,
        eps: float | None = None,
        affine: bool = True,
        dtype: Any = np.float32,
        n_models: int | None = None,
    ) -> None:
        super().__init__(n_features, eps, dtype, n_models, weight=affine, bias=False)


def _wide(a: Array, rows: Array) -> Array:
    """A view of `a` in the shape of `rows`: `(C,)` or `(K, C)`, or one with an axis of 1 kept."""
    if isinstance(a, float):
        return a
    if a.ndim < rows.ndim:
        a = a[..., None, :]
    return backend_of(a).xp.broadcast_to(a, rows.shape)
