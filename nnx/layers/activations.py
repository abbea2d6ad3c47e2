"""Activations. All keep the shape and dtype of their input.

Those that work element by element are rows of one table, `FORMULAS`: an expression for the value
and one for the gradient, each a single launch on CuPy. The classes below name the rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from nnx._checks import check_floating, check_range
from nnx.backends import Array, backend_of
from nnx.layers.base import Layer, Saved, Step


class Formula(NamedTuple):
    """An activation as two expressions for `Backend.elementwise`.

    Attributes:
        y: The value, of `x` and the layer's numbers.
        dx: The gradient, of `dy`, the layer's numbers and what `saves` names.
        saves: `"y"` where the derivative is a function of it, since the next layer keeps it anyway;
            else `"x"`. Sigmoid and tanh save y as PyTorch does, at a price: where y saturates,
            `1 - y` has few digits left. In float32 the derivative's relative error is about 1e-4
            at x = 7 for sigmoid and at |x| = 4 for tanh, and grows beyond, until no digit is right
            at x = 17 and |x| = 9.
    """

    y: str
    dx: str
    saves: str


# In all of them `big` is the largest integer whose exp is finite, so exp can't overflow: beyond it
# a logistic function is below the smallest normal number. Arguments are bounded before they enter
# a function, and not after, because `where` computes both of its sides. At a kink the derivative
# is PyTorch's.
_LOGISTIC = "1 / (1 + exp(minimum(-x, big)))"
_MISH = "tanh(maximum(x, 0) + log1p(exp(-abs(x))))"  # tanh(log(1 + exp(x)))
# (1 + tanh(u)) / 2 is the logistic function of 2u, which keeps its digits where u is far below 0.
# Beyond 20, where it is 0 or 1, x is held, and with it x^3.
_HELD = "maximum(minimum(x, 20), -20)"
_2U = f"1.5957691216057308 * {_HELD} * (1 + 0.044715 * {_HELD} * {_HELD})"
_2DU = f"1.5957691216057308 * (1 + 0.134145 * {_HELD} * {_HELD})"

FORMULAS = {
    "leaky_relu": Formula(
        "maximum(x, 0) + slope * minimum(x, 0)", "where(y > 0, dy, slope * dy)", "y"
    ),
    "elu": Formula(
        "scale * maximum(x, 0) + scale * alpha * expm1(minimum(x, 0))",
        "where(x > 0, scale * dy, scale * alpha * exp(minimum(x, 0)) * dy)",
        "x",  # y + alpha has no digits left where exp(x) is small
    ),
    "gelu": Formula(
        "0.5 * x * (1 + erf(0.70710678118654752 * x))",
        "dy * (0.5 * (1 + erf(0.70710678118654752 * x))"
        " + 0.39894228040143268 * x * exp(-0.5 * x * x))",
        "x",
    ),
    "gelu_tanh": Formula(
        f"maximum(x, -20) / (1 + exp(minimum(-{_2U}, big)))",
        f"dy / (1 + exp(minimum(-{_2U}, big)))"
        f" * (1 + {_HELD} * {_2DU} / (1 + exp(minimum({_2U}, big))))",
        "x",
    ),
    "silu": Formula(
        "maximum(x, -big) / (1 + exp(minimum(-x, big)))",
        f"dy * ({_LOGISTIC}) * (1 + maximum(x, -big) * (1 - {_LOGISTIC}))",
        "x",
    ),
    "softplus": Formula(
        "where(beta * x > threshold, x,"
        " (maximum(beta * x, 0) + log1p(exp(-abs(beta * x)))) / beta)",
        "where(beta * x > threshold, dy, dy / (1 + exp(minimum(-beta * x, big))))",
        "x",
    ),
    "hard_sigmoid": Formula(
        "minimum(maximum(x + 3, 0), 6) / 6", "where(abs(x) < 3, dy / 6, 0)", "x"
    ),
    "hard_tanh": Formula(
        "minimum(maximum(x, low), high)", "where(y > low, where(y < high, dy, 0), 0)", "y"
    ),
    "hard_swish": Formula(
        "x * (minimum(maximum(x + 3, 0), 6) / 6)",
        "where(x <= -3, 0, where(x < 3, dy * (x / 3 + 0.5), dy))",
        "x",
    ),
    "mish": Formula(
        f"maximum(x, -big) * {_MISH}",
        f"dy * ({_MISH} + maximum(x, -big) * (1 - {_MISH} * {_MISH}) * ({_LOGISTIC}))",
        "x",
    ),
    "sigmoid": Formula(_LOGISTIC, "(1 - y) * y * dy", "y"),
    "tanh": Formula("tanh(x)", "(1 - y * y) * dy", "y"),
}


class _Elementwise(Layer):
    """A row of `FORMULAS` as a layer: the one body of all of them."""

    _formula: Formula
    _numbers: dict[str, float] = {}  # noqa: RUF012 - never written

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:
        check_floating(type(self).__name__, x)
        backend, formula = backend_of(x), self._formula
        numbers = self._operands(formula.y, x.dtype)
        y = backend.elementwise(formula.y, backend.empty(x.shape, x.dtype), x=x, **numbers)
        return y, (y if formula.saves == "y" else x)

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:
        if not need_dx:
            return None
        backend, formula = backend_of(dy, saved), self._formula
        operands = {"dy": dy, formula.saves: saved} | self._operands(formula.dx, dy.dtype)
        return backend.elementwise(formula.dx, backend.empty(dy.shape, dy.dtype), **operands)

    def _operands(self, expression: str, dtype: Any) -> dict[str, float]:
        return self._numbers | {"big": _BIG[dtype]} if "big" in expression else self._numbers


_BIG = {np.dtype(t): float(math.floor(math.log(np.finfo(t).max))) for t in (np.float32, np.float64)}


class Identity(Layer):
    """`y = x`: the activation of a layer that has none.

    Shape: x of any shape -> y of the same; y is x itself.

    Saved: nothing. Gradient: `dx = dy`.
    """

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("Identity", x)
        return x, None

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        return dy if need_dx else None


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


class LeakyReLU(_Elementwise):
    """Rectifier with a slope on both sides: `y = x` where `x > 0`, else `negative_slope * x`.

    Maas et al. 2013, "Rectifier nonlinearities improve neural network acoustic models".

    Args:
        negative_slope: At least 0, so that the sign of y is that of x.

    Shape: x of any shape -> y of the same.

    Saved: y. Gradient: `dx = dy` where `y > 0`, else `negative_slope * dy`; at 0 it is the latter.

    Raises:
        ValueError: The slope is negative or not finite.
    """

    _formula = FORMULAS["leaky_relu"]

    def __init__(self, negative_slope: float = 0.01) -> None:
        check_range("LeakyReLU", "negative_slope", negative_slope, 0, math.inf, closed="[")
        self._numbers = {"slope": negative_slope}

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"negative_slope": self._numbers["slope"]}


class ELU(_Elementwise):
    """Exponential linear unit: `y = x` where `x > 0`, else `alpha * (exp(x) - 1)`.

    Clevert et al. 2016, "Fast and accurate deep network learning by exponential linear units",
    eq. 15. `expm1` keeps the digits near 0.

    Args:
        alpha: Where it saturates: y goes to `-alpha`.

    Shape: x of any shape -> y of the same.

    Saved: x; from y the derivative `y + alpha` would lose its digits where exp(x) is small.
    Gradient: `dx = dy` where `x > 0`, else `alpha * exp(x) * dy`; at 0 it is `alpha * dy`.

    Raises:
        ValueError: `alpha` isn't finite.
    """

    _formula = FORMULAS["elu"]

    def __init__(self, alpha: float = 1.0) -> None:
        check_range("ELU", "alpha", alpha, -math.inf, math.inf)
        self._numbers = {"alpha": alpha, "scale": 1.0}

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"alpha": self._numbers["alpha"]}


class SELU(_Elementwise):
    """Self-normalizing ELU: `y = scale * x` where `x > 0`, else `scale * alpha * (exp(x) - 1)`.

    Klambauer et al. 2017, "Self-normalizing neural networks", eq. 2, with the constants of eq. 14:
    weights of variance `1 / n_in` (`lecun_normal`) then keep mean 0 and variance 1.

    Shape: x of any shape -> y of the same.

    Saved: x. Gradient: `dx = scale * dy` where `x > 0`, else `scale * alpha * exp(x) * dy`.
    """

    _formula = FORMULAS["elu"]
    _numbers = {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}  # noqa: RUF012


class GELU(_Elementwise):
    """Gaussian error linear unit: `y = x * Phi(x)`, Phi the standard normal distribution.

    Hendrycks and Gimpel 2016, "Gaussian error linear units", section 2. `Phi(x) = (1 + erf(x /
    sqrt(2))) / 2`; with `approximate="tanh"` it is `(1 + tanh(u)) / 2` with
    `u = sqrt(2 / pi) * (x + 0.044715 x^3)`, off by at most 5e-4, and computed as
    `1 / (1 + exp(-2u))`, the same and without cancellation where u is far below 0.

    Args:
        approximate: `"none"` or `"tanh"`.

    Shape: x of any shape -> y of the same.

    Saved: x. Gradient: `dx = dy * (Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi))` by the product rule;
    the approximation's: `dy * (s + x * s * (1 - s) * 2u')` with `s = 1 / (1 + exp(-2u))`,
    `1 - s = 1 / (1 + exp(2u))` and `u' = sqrt(2 / pi) * (1 + 3 * 0.044715 x^2)`.

    Raises:
        ValueError: `approximate` is something else.
    """

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: expected approximate 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate
        self._formula = FORMULAS["gelu" if approximate == "none" else "gelu_tanh"]

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"approximate": self.approximate}


class SiLU(_Elementwise):
    """Sigmoid linear unit, also swish: `y = x * s(x)` with `s(x) = 1 / (1 + exp(-x))`.

    Hendrycks and Gimpel 2016, section 2; Ramachandran et al. 2017, "Searching for activation
    functions". No overflow and no warning for any finite x.

    Shape: x of any shape -> y of the same. At -inf y and the derivative are next to 0, their limit,
    where PyTorch has NaN.

    Saved: x. Gradient: `dx = dy * s(x) * (1 + x * (1 - s(x)))`, since `s' = s (1 - s)`.
    """

    _formula = FORMULAS["silu"]


class Softplus(_Elementwise):
    """Smooth rectifier: `y = log(1 + exp(beta * x)) / beta`.

    Computed as `(max(beta x, 0) + log1p(exp(-|beta x|))) / beta`, which can't overflow. Where
    `beta * x > threshold`, `y = x`, which is PyTorch's rule too.

    Args:
        beta: Sharpness; above 0.
        threshold: Where the function is taken to be linear.

    Shape: x of any shape -> y of the same.

    Saved: x. Gradient: `dx = dy / (1 + exp(-beta * x))`; `dy` beyond the threshold.

    Raises:
        ValueError: `beta` isn't a positive number, or `threshold` isn't a number.
    """

    _formula = FORMULAS["softplus"]

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        check_range("Softplus", "beta", beta, 0, math.inf)
        check_range("Softplus", "threshold", threshold, -math.inf, math.inf)
        self._numbers = {"beta": beta, "threshold": threshold}

    def config(self) -> dict[str, Any]:  # noqa: D102
        return dict(self._numbers)


class HardSigmoid(_Elementwise):
    """Sigmoid in three straight pieces: `y = min(max(x + 3, 0), 6) / 6`.

    Shape: x of any shape -> y of the same.

    Saved: x. Gradient: `dx = dy / 6` where `-3 < x < 3`, else 0.
    """

    _formula = FORMULAS["hard_sigmoid"]


class HardTanh(_Elementwise):
    """`x` held between two bounds: `y = min(max(x, min_val), max_val)`.

    Args:
        min_val: Lower bound.
        max_val: Upper bound, above the lower one.

    Shape: x of any shape -> y of the same.

    Saved: y. Gradient: `dx = dy` where `min_val < y < max_val`, else 0.

    Raises:
        ValueError: The bounds aren't finite or not in this order.
    """

    _formula = FORMULAS["hard_tanh"]

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0) -> None:
        check_range("HardTanh", "min_val", min_val, -math.inf, math.inf)
        check_range("HardTanh", "max_val", max_val, min_val, math.inf)
        self._numbers = {"low": min_val, "high": max_val}

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"min_val": self._numbers["low"], "max_val": self._numbers["high"]}


class HardSwish(_Elementwise):
    """SiLU with a `HardSigmoid` inside: `y = x * min(max(x + 3, 0), 6) / 6`.

    Howard et al. 2019, "Searching for MobileNetV3", section 5.2.

    Shape: x of any shape -> y of the same.

    Saved: x. Gradient: `dx = dy * (x / 3 + 1 / 2)` where `-3 < x < 3`; 0 up to -3; `dy` from 3 on.
    """

    _formula = FORMULAS["hard_swish"]


class Mish(_Elementwise):
    """`y = x * tanh(softplus(x))` with `softplus(x) = log(1 + exp(x))`.

    Misra 2020, "Mish: a self regularized non-monotonic activation function", eq. 1.

    Shape: x of any shape -> y of the same. No overflow and no warning for any finite x. At -inf y
    and the derivative are next to 0, their limit, where PyTorch has NaN.

    Saved: x. Gradient: with `t = tanh(softplus(x))` and `s = softplus'(x) = 1 / (1 + exp(-x))`,
    `dx = dy * (t + x * (1 - t^2) * s)`.
    """

    _formula = FORMULAS["mish"]


class Sigmoid(_Elementwise):
    """Logistic function: `y = 1 / (1 + exp(-x))`.

    Shape: x of any shape -> y of the same. No overflow and no warning for any finite x.

    Saved: y. Gradient: `dx = dy * y * (1 - y)`.
    """

    _formula = FORMULAS["sigmoid"]


class Tanh(_Elementwise):
    """Hyperbolic tangent: `y = tanh(x)`.

    Shape: x of any shape -> y of the same.

    Saved: y. Gradient: `dx = dy * (1 - y^2)`.
    """

    _formula = FORMULAS["tanh"]


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
        y = backend_of(x).softmax(x)
        return y, y

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        return backend_of(dy, saved).softmax_backward(dy, saved) if need_dx else None


class LogSoftmax(Layer):
    """Logarithms of probabilities, over the last axis: `y_i = x_i - log(sum_j exp(x_j))`.

    The row's maximum is subtracted first, then the logarithm of the sum: in this order a
    probability near 1 keeps its logarithm, however large the scores are.

    Shape: x `(..., C)` -> y of the same.

    Saved: y. Gradient: with the Jacobian `dy_i/dx_j = 1[i = j] - exp(y_j)`,
    `dx = dy - exp(y) * sum(dy)`, the sum over the last axis.
    """

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        check_floating("LogSoftmax", x)
        y = backend_of(x).softmax(x, log=True)
        return y, y

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        return backend_of(dy, saved).softmax_backward(dy, saved, log=True) if need_dx else None
