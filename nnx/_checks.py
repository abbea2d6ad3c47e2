"""The one place that words errors about shapes and dtypes; all cheap enough for every call."""

from __future__ import annotations

from typing import Any

from nnx.backends import Array


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


def check_floating(who: str, x: Array) -> None:
    """Check that `x` is float32 or float64."""
    if x.dtype not in ("float32", "float64"):
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
