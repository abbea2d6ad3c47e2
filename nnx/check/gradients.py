"""Proof that a backward pass is the derivative of its forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnx.backends import Array, Backend, StepState, backend_of, resolve
from nnx.layers import Layer, Step
from nnx.losses import Loss


class WrongGradient(AssertionError):
    """A gradient isn't the derivative.

    Attributes:
        error: The relative error.
    """

    def __init__(self, message: str, error: float) -> None:
        super().__init__(message)
        self.error = error


def check_gradients(
    function: Layer | Loss,
    x: Any,
    target: Any = None,
    weight: Any = None,
    *,
    rng: np.random.Generator | None = None,
    backend: str | Backend | None = None,
    draws: int = 3,
    eps: float = 1e-6,
    rtol: float = 1e-7,
    randomize: bool = True,
) -> float:
    """Compare hand-written gradients with central differences in float64.

    For a layer with parameters p, each draw takes a random `dy` and a random direction `v` for the
    input and every parameter in turn, and compares `<dp, v>` with
    `<dy, f(p + eps v) - f(p - eps v)> / (2 eps)`: two forward passes for an array of any size.
    Parameters are randomized, biases too, since at zero they sit on the kinks. Dropout repeats its
    mask. A second backward pass has to add the same to the gradients. For a loss the returned
    gradient is compared with differences of the returned value.
    Parameters and buffers come back as they were, gradients as zeros that no step has written.

    Args:
        function: A layer with float64 parameters, or none; or a loss.
        x: Input of the layer or prediction; converted to float64. Not on a kink.
        target: Target of the loss.
        weight: Sample weights of the loss.
        rng: Draws directions and parameters; by default seeded with 0.
        backend: Where to compute for a loss or a layer without parameters; by default NumPy,
            whatever `NNX_BACKEND` says. Parameters are used where they are.
        draws: Number of random directions per array.
        eps: Step of the difference; its error is about eps^2.
        rtol: Tolerated error, relative to the scale of the compared sums.
        randomize: Whether to draw parameters; if False, the layer is checked at those it has.

    Returns:
        The largest relative error found.

    Raises:
        WrongGradient: A gradient is wrong; an `AssertionError` that names the array and both
            numbers.
        TypeError: A parameter isn't float64, or `backward` returns no gradient of the input.
    """
    rng = rng or np.random.default_rng(0)
    home = resolve("numpy" if backend is None else backend)
    if isinstance(function, Loss):
        x, target = home.asarray(x, np.float64), home.asarray(target)
        weight = None if weight is None else home.asarray(weight, np.float64)
        _, dx = function(x, target, weight)
        worst = 0.0
        for _ in range(draws):
            v = home.asarray(rng.standard_normal(x.shape))
            ahead, behind = (function(x + h * v, target, weight)[0] for h in (eps, -eps))
            numeric = home.to_numpy(ahead - behind) / (2 * eps)
            products = (dx * v).reshape(*numeric.shape, -1)
            worst = max(worst, _compare(function, "prediction", home, numeric, products, rtol))
        return worst

    parameters = dict(function.parameters())
    for name, p in parameters.items():
        if p.value.dtype != np.float64:
            raise TypeError(
                f"check_gradients: expected float64 parameters, got {name} in {p.value.dtype}; "
                "build the layer with dtype='float64'"
            )
    if parameters:
        home = backend_of(*(p.value for p in parameters.values()))
    x = home.asarray(x, np.float64)
    before = {name: p.value.copy() for name, p in parameters.items()}
    buffers = [(a, a.copy()) for _, a in function.buffers()]
    step = Step(0, home.step_state(), list(function.layers()))
    _plan_one(step.state)
    worst = 0.0
    try:
        for p in parameters.values() if randomize else ():
            p.value[...] = home.asarray(rng.standard_normal(p.value.shape))
        for _ in range(draws):
            y, saved = function.forward(x, step=step.begin())
            dy = home.asarray(rng.standard_normal(y.shape))
            # the difference's own rounding: all there is where a gradient is 0, as that of a bias
            # before BatchNorm
            noise = 4 * np.finfo(np.float64).eps / eps * float(home.to_numpy(abs(dy * y).sum()))
            for p in parameters.values():
                p.fresh = True
            dx = function.backward(dy, saved)
            if dx is None:
                raise TypeError(
                    f"check_gradients: {function!r}: backward gives None, expected the gradient of "
                    "the input"
                )
            gradients = {"input": (x, dx)} | {n: (p.value, p.grad) for n, p in parameters.items()}
            for name, (value, gradient) in gradients.items():
                v = home.asarray(rng.standard_normal(value.shape))
                sums = []
                kept = value.copy()
                for h in (eps, -eps):
                    moved = kept + h * v
                    if name != "input":
                        value[...] = moved
                    out, _ = function.forward(moved if name == "input" else x, step=step.begin())
                    sums.append(out.copy())
                if name != "input":
                    value[...] = kept
                numeric = home.to_numpy((dy * (sums[0] - sums[1])).sum()) / (2 * eps)
                products = gradient * v
                worst = max(worst, _compare(function, name, home, numeric, products, rtol, noise))
        once = {name: home.to_numpy(p.grad.copy()) for name, p in parameters.items()}
        if once:
            function.backward(dy, function.forward(x, step=step.begin())[1])
        for name, first in once.items():
            _compare_sum(function, name, first, home.to_numpy(parameters[name].grad), rtol)
    finally:
        for name, p in parameters.items():
            p.value[...] = before[name]
            p.grad.fill(0)
            p.fresh = True
        for buffer, kept in buffers:
            buffer[...] = kept
    return worst


def _plan_one(state: StepState) -> None:
    state.plan(np.zeros(1), dtype=np.float64)


def _compare_sum(
    function: Layer, name: str, once: np.ndarray, twice: np.ndarray, rtol: float
) -> None:
    """Raise if the same contribution a second time doesn't make twice the gradient."""
    scale = float(np.max(np.abs(once), initial=0.0)) + 1e-300
    error = float(np.max(np.abs(twice - 2 * once), initial=0.0)) / scale
    if not error <= rtol:
        raise WrongGradient(
            f"check_gradients: {function!r}: gradient of {name}: a second backward pass doesn't "
            f"add to the first (relative error {error:.2e}); see Parameter.accumulate",
            error,
        )


def _compare(
    function: Layer | Loss,
    name: str,
    backend: Backend,
    numeric: np.ndarray,
    products: Array,
    rtol: float,
    noise: float = 0.0,
) -> float:
    """Relative error of `sum(products)` against `numeric`; raises if it is too large or NaN.

    A difference of `noise` is always tolerated.
    """
    products = backend.to_numpy(products)
    axes = tuple(range(numeric.ndim, products.ndim))
    analytic = products.sum(axis=axes)
    scale = np.sqrt((products**2).sum(axis=axes)) + np.abs(numeric) + noise / rtol + 1e-300
    error = float(np.max(np.abs(analytic - numeric) / scale, initial=0.0))
    if not error <= rtol:  # NaN fails
        raise WrongGradient(
            f"check_gradients: {function!r}: gradient of {name} along a random direction: "
            f"backward gives {analytic}, central differences {numeric} (relative error "
            f"{error:.2e}, expected at most {rtol:g})",
            error,
        )
    return error
