"""Normalization: inputs shifted and scaled to mean 0 and variance 1, over samples or features.

One pair of passes serves all three layers. With `xhat = (x - mean) * rstd`, `y = xhat * weight +
bias` and n values under each mean, the derivative of the statistics gives, with `g = dy * weight`,
`dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)`: a change of x that shifts or stretches
all n values alike doesn't change xhat, so the part of g along it is taken out.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from nnx._checks import check_gradient, check_input, check_range
from nnx.backends import Array, Backend, backend_of
from nnx.layers.base import Layer, Saved, Step
from nnx.parameter import Parameter


class _Normalization(Layer):
    """The passes; by default with statistics over the features."""

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
        n_features = operator.index(n_features)  # of NumPy's integers, plain ones
        n_models = None if n_models is None else operator.index(n_models)
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

    @property
    def _eps(self) -> float:
        return float(np.finfo(self.dtype).eps) if self.eps is None else self.eps

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
        y, *statistics = self._normalize(backend_of(rows), rows, x, step)
        y = y if self.n_models is not None or x.ndim == 2 else y.reshape(x.shape)
        return y, (rows, *statistics, x.shape)

    def _normalize(
        self, backend: Backend, rows: Array, x: Array, step: Step | None
    ) -> tuple[Array, Array | None, Array, bool | None]:
        """`(y, mean, 1 / deviation, None)`; BatchNorm has its mode in the place of None."""
        weight, bias = (None if p is None else p.value for p in (self.weight, self.bias))
        result = backend.layer_norm(rows, weight, bias, eps=self._eps, centered=self._centered)
        return *result, None

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:
        rows, mean, rstd, training, shape = saved
        check_gradient(type(self).__name__, dy, rows.shape, rows.dtype)
        backend, weight, bias = backend_of(dy, rows), self.weight, self.bias
        operation: Any = backend.layer_norm_backward
        if training is not None:
            operation = functools.partial(backend.batch_norm_backward, training=training)
        dx: Array | None = operation(
            dy.reshape(rows.shape),
            rows,
            mean,
            rstd,
            None if weight is None else weight.value,
            None if weight is None else weight.grad,
            None if bias is None else bias.grad,
            accumulate=tuple([p is not None and p.accumulate() for p in (weight, bias)]),
            need_dx=need_dx,
        )
        if dx is None or dx.shape == shape:
            return dx
        if self.n_models is not None:  # one input fed all models
            return backend.xp.sum(dx, axis=0, out=backend.empty(shape, dx.dtype))
        return dx.reshape(shape)

    def _rows(self, x: Array) -> Array:
        """The input as `(N, C)`, or `(K, N, C)` with K models."""
        check_input(type(self).__name__, x, self.n_features, self.dtype, self.n_models)
        backend = backend_of(x, x if self.weight is None else self.weight.value)
        if self.n_models is None:
            return x if x.ndim == 2 else x.reshape(-1, self.n_features)
        return x if x.ndim == 3 else backend.xp.broadcast_to(x, (self.n_models, *x.shape))


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

    Saved: x (a view when contiguous), mean and 1 / deviation.
    Gradient: `dbias = sum(dy)`, `dweight = sum(dy * xhat)` over samples, and with `g = dy * weight`
    `dx = rstd * (g - mean(g) - xhat * mean(g * xhat))`, since the statistics depend on x too; in
    evaluation they don't, and `dx = g * rstd`.

    Raises:
        ValueError: A batch of one sample in training, whose variance says nothing; or a last axis
            that isn't `n_features`.
        TypeError: The dtype isn't the layer's.
    """

    buffer_names = ("running_mean", "running_var")

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

    def _normalize(
        self, backend: Backend, rows: Array, x: Array, step: Step | None
    ) -> tuple[Array, Array | None, Array, bool | None]:
        n = rows.shape[-2]
        training = step is not None and n > 0
        if training and n == 1:
            raise ValueError(
                f"BatchNorm: expected more than one sample in training, got input of shape "
                f"{x.shape}; choose a batch size that leaves no last batch of one, or use LayerNorm"
            )
        y, mean, rstd = backend.batch_norm(
            rows,
            None if self.weight is None else self.weight.value,
            None if self.bias is None else self.bias.value,
            self.running_mean,
            self.running_var,
            eps=self._eps,
            momentum=self.momentum,
            training=training,
        )
        return y, mean, rstd, training


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

    Saved: x (a view when contiguous), mean and 1 / deviation.
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

    Saved: x (a view when contiguous) and `rrms`, 1 / root mean square.
    Gradient: with `xhat = x * rrms` and `g = dy * weight`, `dweight = sum(dy * xhat)` over samples
    and `dx = rrms * (g - xhat * mean(g * xhat))`, the mean over features.

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
