"""The one place that words errors about shapes and dtypes; all cheap enough for every call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nnx.backends import Array

_FLOATING = (np.dtype(np.float32), np.dtype(np.float64))


def check_input(who: str, x: Array, n_in: int, dtype: Any, n_models: int | None = None) -> None:
    """Check the last axis, the model axis and the dtype of a layer's input."""
    shape = x.shape
    if not shape or shape[-1] != n_in:
        hint = "; flatten the images first" if len(shape) > 2 else ""
        raise ValueError(f"{who}: expected last axis {n_in}, got input of shape {shape}{hint}")
    if n_models is not None and len(shape) != 2 and (len(shape) != 3 or shape[0] != n_models):
        raise ValueError(
            f"{who}: expected shape ({n_models}, N, {n_in}), one batch for each of {n_models} "
            f"models, or (N, {n_in}) for all of them, got {shape}"
        )
    if x.dtype != dtype:
        raise TypeError(
            f"{who}: expected {dtype} input, got {x.dtype}; convert it: x.astype({str(dtype)!r})"
        )


def check_gradient(who: str, dy: Array, shape: tuple[int, ...], dtype: Any) -> None:
    """Check the gradient of a layer's output against that `shape` and dtype.

    An output `(N, n_out)` may have come with N split into any number of axes, or none.
    """
    got = dy.shape
    if got == shape and dy.dtype == dtype:
        return
    joined = len(shape) == 2 and got[-1:] == shape[1:] and math.prod(got[:-1]) == shape[0]
    error: type[Exception] = ValueError
    if got == shape or joined:
        if dy.dtype == dtype:
            return
        error = TypeError
    hint = " in all" if len(shape) == 2 and len(got) != 2 else ""
    raise error(f"{who}: expected a {dtype} gradient of shape {shape}{hint}, got {dy.dtype} {got}")


def check_floating(who: str, x: Array) -> None:
    """Check that `x` is float32 or float64."""
    if x.dtype not in _FLOATING:  # tens of nanoseconds; with their names it is half a microsecond
        raise TypeError(f"{who}: expected float32 or float64, got {x.dtype}")


def check_same_shape(who: str, what: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check that an array that belongs to another has its shape."""
    if got != expected:
        raise ValueError(f"{who}: expected {what} of shape {expected}, got {got}")


def check_range(
    who: str, name: str, value: float, low: float, high: float, *, closed: str = ""
) -> None:
    """Check a hyper-parameter; `closed` names the ends that belong to the range, as in "[]"."""
    above = value >= low if "[" in closed else value > low
    below = value <= high if "]" in closed else value < high
    if not (above and below):
        left, right = "[" if "[" in closed else "(", "]" if "]" in closed else ")"
        raise ValueError(f"{who}: expected {name} in {left}{low:g}, {high:g}{right}, got {value!r}")
