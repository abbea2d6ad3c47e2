"""Array backends: which library holds the numbers, and where.

The arrays decide: `backend_of` finds the backend of the arrays it is given, and everything below
`Trainer`, the estimators and the command line works that way. The flag (`resolve`) is read at
those three places and ends there. This package imports NumPy; CuPy only when it is asked for.
"""

from __future__ import annotations

if (
    __name__ != "nnx.backends"
):  # from the repository root, `import backends` would make a second copy
    raise ImportError("import this package as `nnx.backends`, not `backends`")

import os
import sys
import warnings

import numpy as np

from nnx.backends.base import (
    Array,
    Backend,
    BackendUnavailable,
    OutOfMemory,
    StepState,
    XpBackend,
)
from nnx.backends.numpy_backend import NUMPY as _HOST
from nnx.backends.numpy_backend import NumpyBackend

__all__ = [
    "Array",
    "Backend",
    "BackendUnavailable",
    "NumpyBackend",
    "OutOfMemory",
    "StepState",
    "XpBackend",
    "available",
    "backend_of",
    "get_backend",
    "resolve",
]

_NUMPY: NumpyBackend = _HOST
_CUPY: dict[int, Backend] = {}  # by device, those that arrays were found on


def get_backend(name: str) -> Backend:
    """The backend called `name`: `"numpy"`, `"cupy"`, `"cupy:1"` or `"auto"`.

    `"cupy"` is CuPy's current device. `"auto"` is CuPy if a one-element kernel runs, else NumPy
    with a warning that says why.

    Raises:
        BackendUnavailable: CuPy is asked for and can't be used; the message says why.
        ValueError: No backend has this name.
    """
    if name == "numpy":
        return _NUMPY
    if name == "auto":
        try:
            return _cupy_backend(None)
        except BackendUnavailable as error:
            warnings.warn(f"backend 'auto': running on NumPy; {error}", stacklevel=2)
            return _NUMPY
    library, colon, device = name.partition(":")
    if library == "cupy" and (device.isdecimal() or not colon):
        return _cupy_backend(int(device) if colon else None)
    raise ValueError(
        f"unknown backend {name!r}: expected 'numpy', 'cupy', 'cupy:N' (N is the device) or 'auto'"
    )


def available() -> tuple[str, ...]:
    """Names of the backends that work here: `"numpy"`, and `"cupy:N"` for each usable device."""
    try:
        from nnx.backends.cupy_backend import device_count, probe

        devices = [f"cupy:{i}" for i in range(device_count()) if probe(i) is None]
    except BackendUnavailable:
        devices = []
    return ("numpy", *devices)


def backend_of(*arrays: Array) -> Backend:
    """The backend that all `arrays` live on.

    Raises:
        TypeError: An argument is no array of a known library, or they are on different backends.
    """
    for array in arrays:
        if type(array) is not np.ndarray:
            break
    else:  # the common case, at a third of the price
        return _NUMPY
    found = _backend_of_one(arrays[0])
    for array in arrays[1:]:
        other = _backend_of_one(array)
        if other is not found:
            raise TypeError(
                f"backend_of: expected arrays of one backend, got {found.name} and {other.name}; "
                f"move one with get_backend({found.name!r}).asarray(...)"
            )
    return found


def resolve(flag: str | Backend | None = None, *, default: Backend | None = None) -> Backend:
    """The backend to run on: `flag`, else the variable `NNX_BACKEND`, else `default`, else NumPy.

    For the three places that read the flag: `Trainer`, the estimators and the command line. Others
    pass a backend or its name, or ask `backend_of`.

    Args:
        flag: The argument `backend=` or the option `--backend`; `None` where it wasn't given.
        default: Where the parameters are.
    """
    if flag is None:
        flag = os.environ.get("NNX_BACKEND") or None
    if flag is None:
        return default or _NUMPY
    return get_backend(flag) if isinstance(flag, str) else flag


def _backend_of_one(array: Array) -> Backend:
    if isinstance(array, (np.ndarray, np.generic)):
        return _NUMPY
    cupy = sys.modules.get("cupy")  # an array of CuPy can only exist once CuPy was imported
    if cupy is not None and isinstance(array, cupy.ndarray):
        device = array.data.device_id
        if device not in _CUPY:
            _CUPY[device] = _cupy_backend(device)
        return _CUPY[device]
    kind = type(array)
    raise TypeError(
        f"backend_of: expected a NumPy or CuPy array, got {kind.__module__}.{kind.__qualname__}; "
        "convert it with get_backend('numpy').asarray(...)"
    )


def _cupy_backend(device: int | None) -> Backend:
    from nnx.backends.cupy_backend import get_cupy_backend

    return get_cupy_backend(device)
