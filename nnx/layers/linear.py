"""The affine layer, alone and joined with a ReLU."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from nnx._checks import check_gradient, check_input
from nnx.backends import Array, backend_of
from nnx.initializers import Initializer, he_normal, ones, zeros
from nnx.layers.activations import ReLU
from nnx.layers.base import Layer, Saved, Step
from nnx.parameter import Parameter


class Linear(Layer):
    """Affine map of the last axis: `y = x @ weight + bias`.

    Args:
        n_in: Width of the input's last axis; at least 1.
        n_out: Width of the output's last axis; at least 1.
        bias: Whether there is a bias. It starts at zero.
        initializer: Draws the weights; by default N(0, 2 / n_in) (He et al. 2015, eq. 10).
        rng: The generator to draw from; needed unless `initializer` is `zeros` or `ones`.
        dtype: float32 or float64.
        n_models: K for K models side by side, each with weights of its own.

    Shape:
        x: `(..., n_in)` -> y: `(..., n_out)`. Leading axes are flattened into one product.
        With K models, x: `(K, N, n_in)`, or `(N, n_in)` shared by all -> y: `(K, N, n_out)`.
        weight: `(n_in, n_out)`, transposed against PyTorch's; with K models `(K, n_in, n_out)`.
        `from_columns` and `to_columns` translate.

    Saved: x flattened (a view when contiguous).
    Gradient: `dx = dy @ weight.T`, `dweight = x.T @ dy`, `dbias = sum of dy over samples`.

    Raises:
        ValueError: The last axis isn't `n_in`, or dy hasn't the output's number of rows.
        TypeError: The dtype of x or dy isn't the weights', or one is on another backend.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool = True,
        initializer: Initializer = he_normal,
        rng: np.random.Generator | None = None,
        dtype: Any = np.float32,
        n_models: int | None = None,
    ) -> None:
        if n_in < 1 or n_out < 1:
            raise ValueError(
                f"Linear: expected n_in and n_out of at least 1, got {n_in} and {n_out}"
            )
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"Linear: expected dtype float32 or float64, got {np.dtype(dtype)}")
        if rng is None:
            if initializer not in (zeros, ones):
                raise ValueError(
                    "Linear: needs a generator to draw its weights from; "
                    "pass rng=numpy.random.default_rng(seed)"
                )
            rng = np.random.default_rng(0)
        n_in, n_out = operator.index(n_in), operator.index(n_out)  # of NumPy's integers, plain ones
        n_models = None if n_models is None else operator.index(n_models)
        self.n_in, self.n_out, self.n_models = n_in, n_out, n_models
        shape = (n_in, n_out)
        if n_models is None:
            weight = initializer(shape, rng)
        else:
            weight = np.stack([initializer(shape, rng) for _ in range(n_models)])
        self.weight = Parameter(weight.astype(dtype))
        self.bias = Parameter(np.zeros((*weight.shape[:-2], n_out), dtype)) if bias else None

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {
            "n_in": self.n_in,
            "n_out": self.n_out,
            "bias": self.bias is not None,
            "dtype": str(self.weight.value.dtype),
            "n_models": self.n_models,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], children: dict[str, Layer]) -> Self:  # noqa: D102
        return cls(**config, initializer=zeros)

    @classmethod
    def from_columns(cls, weight: Any, bias: Any = None) -> Self:
        """The layer of a net whose samples are columns, `y = weight @ x + bias`.

        That is how many texts write it, and how PyTorch stores it. With `X` the transpose of the
        columns, `(W x + b)^T = X W^T + b^T`: the weight is transposed, the bias stays.

        Args:
            weight: `(n_out, n_in)`, or `(K, n_out, n_in)` for K models; float32 or float64.
            bias: `(n_out,)` or a column `(n_out, 1)`, with K models behind an axis of K; or None.

        Raises:
            ValueError: The shapes don't fit.
            TypeError: The dtype is neither float32 nor float64.
        """
        home = backend_of(weight) if hasattr(weight, "dtype") else backend_of(np.empty(0))
        weight = home.asarray(weight)
        if weight.ndim not in (2, 3):
            raise ValueError(
                "Linear.from_columns: expected weight of shape (n_out, n_in) or (K, n_out, n_in), "
                f"got {weight.shape}"
            )
        *models, n_out, n_in = weight.shape
        layer = cls(
            n_in,
            n_out,
            bias=bias is not None,
            initializer=zeros,
            dtype=weight.dtype,
            n_models=models[0] if models else None,
        ).to(home)
        layer.weight.value[...] = weight.swapaxes(-1, -2)
        if layer.bias is not None:
            shape, bias = layer.bias.value.shape, home.asarray(bias, weight.dtype)
            if bias.shape not in (shape, (*shape, 1)):
                raise ValueError(
                    f"Linear.from_columns: expected bias of shape {shape} or {(*shape, 1)}, "
                    f"got {bias.shape}"
                )
            layer.bias.value[...] = bias.reshape(shape)
        return layer

    def to_columns(self) -> tuple[Array, Array | None]:
        """Copies of weight `(n_out, n_in)` and bias `(n_out,)` as `from_columns` takes them."""
        weight = backend_of(self.weight.value).xp.ascontiguousarray(
            self.weight.value.swapaxes(-1, -2)
        )
        return weight.copy(), None if self.bias is None else self.bias.value.copy()

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        y, flat, _ = self._affine(x)
        return self._unflatten(y, x), flat

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        dz = self._rows(dy, saved)
        if self.bias is not None:
            backend = backend_of(dz, saved)
            backend.bias_grad(dz, self.bias.grad, accumulate=self.bias.accumulate())
        return self._product_backward(dz, saved, dy.shape, need_dx)

    def _affine(self, x: Array, *, relu: bool = False) -> tuple[Array, Array, Array | None]:
        """The output, 2-D (3-D with K models), x in that form, and the mask of a ReLU behind."""
        weight = self.weight.value
        backend = backend_of(x, weight)
        check_input("Linear", x, self.n_in, weight.dtype, self.n_models)
        if self.n_models is None and x.ndim != 2:
            x = x.reshape(-1, self.n_in)
        y = backend.empty((*weight.shape[:-2], x.shape[-2], self.n_out), weight.dtype)
        if self.bias is None:
            return backend.gemm(x, weight, y), x, None
        return y, x, backend.affine(x, weight, self.bias.value, y, relu=relu)

    def _unflatten(self, y: Array, x: Array) -> Array:
        """The output in the form that belongs to the input `x`."""
        if self.n_models is not None or x.ndim == 2:
            return y
        return y.reshape(*x.shape[:-1], self.n_out)

    def _rows(self, dy: Array, x: Array) -> Array:
        """The output's gradient, checked, in the form that `_affine` gave the output."""
        weight = self.weight.value
        shape = (*weight.shape[:-2], x.shape[-2], self.n_out)
        check_gradient("Linear", dy, shape, weight.dtype)
        return dy if dy.ndim == len(shape) else dy.reshape(shape)

    def _product_backward(
        self, dz: Array, x: Array, shape: tuple[int, ...], need_dx: bool
    ) -> Array | None:
        """Gradients of the product; `shape` is that of the unflattened output."""
        backend, weight = backend_of(dz, x), self.weight
        backend.gemm(x.swapaxes(-1, -2), dz, weight.grad, accumulate=weight.accumulate())
        if not need_dx:
            return None
        dx = backend.empty((*dz.shape[:-1], self.n_in), dz.dtype)
        backend.gemm(dz, weight.value.swapaxes(-1, -2), dx)
        if self.n_models is not None:
            if x.ndim == 3:
                return dx
            shared = backend.empty(dx.shape[1:], dx.dtype)
            return backend.xp.sum(dx, axis=0, out=shared)  # one input fed all models
        return dx.reshape(*shape[:-1], self.n_in)


class LinearReLU:
    """What `Sequential` runs for a `Linear` with bias followed by a `ReLU`: one pass for both.

    Not a layer of its own: parameters, names and results are those of the pair, bit for bit.
    """

    def __init__(self, linear: Linear, relu: ReLU) -> None:
        assert linear.bias is not None
        self.linear, self.relu, self.bias = linear, relu, linear.bias

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The pair's parameters."""
        return self.linear.parameters()

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:
        """`relu(x @ weight + bias)`."""
        linear = self.linear
        y, flat, mask = linear._affine(x, relu=True)
        return linear._unflatten(y, x), (flat, mask)

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:
        """The pair's backward passes, the bias gradient summed on the way."""
        linear, bias, (x, mask) = self.linear, self.bias, saved
        rows = linear._rows(dy, x)
        backend = backend_of(rows, x)
        dz = backend.bias_relu_backward(rows, mask, bias.grad, accumulate=bias.accumulate())
        return linear._product_backward(dz, x, dy.shape, need_dx)
