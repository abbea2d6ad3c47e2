"""Matrix products by cuBLAS itself, on a handle of our own.

CuPy's products can't be captured into a CUDA graph, add to their output only by a second pass, and
copy operands of some strides first. So the library that CuPy has loaded is called directly,
`cublasGemmEx` and for several models `cublasGemmStridedBatchedEx`, on the current stream, with a
workspace of its own. cuBLAS repeats bit for bit on one device as long as nothing else uses the
handle's workspace (cuBLAS documentation, section 2.1.4), so every stream has a handle.

cuBLAS counts matrices column by column. A row-major matrix is its own transpose there, so
`out = a @ b` is asked for as `out^T = b^T a^T`: the operands swap places and nothing is copied.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, NamedTuple

import numpy as np

_ROWS, _COLUMNS = 0, 1  # CUBLAS_OP_N and CUBLAS_OP_T, of a row-major matrix and of one transposed
_DEFAULT_ALGORITHM = -1
_FLOAT, _DOUBLE = 0, 1  # CUDA_R_32F, CUDA_R_64F
_COMPUTE_FLOAT, _COMPUTE_DOUBLE, _COMPUTE_TF32 = 68, 70, 77

_NO_ROOM = (1, 3)  # what cublasCreate says then
_STATUS = {
    1: "not initialized",
    3: "allocation failed",
    7: "invalid value",
    8: "not supported on this device",
    11: "memory mapping failed",
    13: "execution failed",
    14: "internal error",
    15: "not supported",
}


class CublasError(RuntimeError):
    """cuBLAS refused a call; the message has its status."""


def tf32() -> bool:
    """Whether float32 products may round their factors to 10 bits: CuPy's `CUPY_TF32`."""
    asked = os.environ.get("CUPY_TF32", "").strip()
    return asked.isdecimal() and int(asked) > 0


class Plan(NamedTuple):
    """How cuBLAS is to be called for arrays of certain shapes and strides."""

    b_form: int
    a_form: int
    n: int
    m: int
    k: int
    b_step: int
    b_stride: int
    a_step: int
    a_stride: int
    out_step: int
    out_stride: int
    batch: int


def _form(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, int] | None:
    """`(form, elements from one row or column to the next)` of a matrix, or None if it has none.

    An axis of length 1 may have any stride.
    """
    rows, columns = shape[-2:]
    down, right = strides[-2:]
    if right == size or columns == 1:
        step = down if rows > 1 else size * columns
        if step % size == 0 and step >= size * columns:
            return _ROWS, step // size
    if down == size or rows == 1:
        step = right if columns > 1 else size * rows
        if step % size == 0 and step >= size * rows:
            return _COLUMNS, step // size
    return None


def _matrices(
    what: str, shape: tuple[int, ...], strides: tuple[int, ...], size: int, batch: int
) -> int | None:
    """Elements from one matrix of a batch to the next; 0 where all models share one."""
    if len(shape) == 2 or shape[0] == 1:
        return 0
    if shape[0] != batch:
        raise ValueError(f"gemm: expected {batch} matrices {what}, got shape {shape}")
    return strides[0] // size if strides[0] % size == 0 and strides[0] >= 0 else None


@functools.lru_cache(maxsize=4096)
def plan(
    a: tuple[int, ...],
    a_strides: tuple[int, ...],
    b: tuple[int, ...],
    b_strides: tuple[int, ...],
    out: tuple[int, ...],
    out_strides: tuple[int, ...],
    size: int,
) -> Plan | None:
    """The call for arrays of these shapes, strides in bytes, and size of an element.

    None where cuBLAS can't take them as they are: more than 3 axes, neither rows nor columns
    contiguous, a size beyond its 32-bit integers, or models that share one output.

    Raises:
        ValueError: The shapes don't belong to one product.
    """
    if not (len(out) in (2, 3) and len(a) in (2, 3) and len(b) in (2, 3)):
        return None
    m, n, k = a[-2], b[-1], a[-1]
    batch = max(a[0] if len(a) == 3 else 1, b[0] if len(b) == 3 else 1)
    if 0 in (*a[:-2], *b[:-2]):
        batch = 0
    if b[-2] != k or out[-2:] != (m, n) or (out[0] if len(out) == 3 else 1) != batch:
        raise ValueError(f"gemm: expected (M, K) @ (K, N) -> (M, N), got {a} @ {b} -> {out}")
    if max(m, n, k, batch) >= 2**31:
        return None
    a_form, b_form = _form(a, a_strides, size), _form(b, b_strides, size)
    out_form = _form(out, out_strides, size)
    a_next = _matrices("a", a, a_strides, size, batch)
    b_next = _matrices("b", b, b_strides, size, batch)
    out_next = _matrices("out", out, out_strides, size, batch)
    if a_form is None or b_form is None or out_form is None or out_form[0] != _ROWS:
        return None
    if a_next is None or b_next is None or out_next is None or (batch > 1 and out_next == 0):
        return None
    if max(a_form[1], b_form[1], out_form[1]) >= 2**31:
        return None
    return Plan(
        *(b_form[0], a_form[0], n, m, k),
        *(b_form[1], b_next, a_form[1], a_next, out_form[1], out_next, batch),
    )


@functools.cache
def _library() -> Any:
    """The libcublas that CuPy has loaded."""
    from cupy_backends.cuda.libs import cublas

    if os.name == "nt":
        major = cublas.getVersion(_cupy_handle()) // 10000
        library: Any = ctypes.WinDLL(f"cublas64_{major}.dll")  # type: ignore[attr-defined]
    else:
        library = ctypes.CDLL(cublas.__file__)  # symbols are looked up in what it is linked with
    integer, size, pointer = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
    library.cublasCreate_v2.argtypes = [ctypes.POINTER(pointer)]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    product = [pointer, integer, integer, integer, integer, integer, pointer]
    matrix, settings = [pointer, integer, integer], [integer, integer]
    library.cublasGemmEx.argtypes = [*product, *matrix, *matrix, pointer, *matrix, *settings]
    library.cublasGemmStridedBatchedEx.argtypes = [
        *(*product, *matrix, size, *matrix, size, pointer),
        *(*matrix, size, integer, *settings),
    ]
    return library


def _cupy_handle() -> int:
    from cupy.cuda import device

    handle: int = device.get_cublas_handle()
    return handle


class _Constants(NamedTuple):
    """What a product of one dtype needs besides its arrays: type codes, and 0 and 1 in memory."""

    data: int
    compute: int
    zero: Any
    one: Any


class Cublas:
    """A cuBLAS handle for one stream, with its own workspace. Made on the current device.

    Args:
        stream: Address of the stream.

    Raises:
        CublasError: cuBLAS refuses to make a handle.
        OSError, AttributeError, ImportError: libcublas isn't there, or lacks a function.
    """

    def __init__(self, stream: int) -> None:
        import cupy

        library = _library()
        handle = ctypes.c_void_p()
        status = library.cublasCreate_v2(ctypes.byref(handle))
        if status in _NO_ROOM:  # it doesn't ask CuPy's pool, which may keep all memory
            cupy.get_default_memory_pool().free_all_blocks()
            status = library.cublasCreate_v2(ctypes.byref(handle))
        self._check("cublasCreate", status)
        self.handle = handle
        self._check("cublasSetStream", library.cublasSetStream_v2(handle, stream))
        # after the stream, which takes the workspace away; sizes that NVIDIA recommends
        megabytes = 32 if int(cupy.cuda.Device().compute_capability) >= 90 else 4
        self.workspace = cupy.cuda.alloc(megabytes << 20)
        status = library.cublasSetWorkspace_v2(handle, self.workspace.ptr, megabytes << 20)
        self._check("cublasSetWorkspace", status)
        self._gemm, self._gemms = library.cublasGemmEx, library.cublasGemmStridedBatchedEx
        single = _COMPUTE_TF32 if tf32() else _COMPUTE_FLOAT
        float_, double = ctypes.c_float, ctypes.c_double
        self._constants = {
            np.dtype(np.float32): _Constants(_FLOAT, single, *map(_address, map(float_, (0, 1)))),
            np.dtype(np.float64): _Constants(
                _DOUBLE, _COMPUTE_DOUBLE, *map(_address, map(double, (0, 1)))
            ),
        }

    def gemm(self, p: Plan, a: int, b: int, out: int, dtype: Any, accumulate: bool) -> None:
        """`out = a @ b`, or `out += a @ b`; arrays by address."""
        c = self._constants[dtype]
        product = (self.handle, p.b_form, p.a_form, p.n, p.m, p.k, c.one)
        beta, settings = c.one if accumulate else c.zero, (c.compute, _DEFAULT_ALGORITHM)
        if p.batch == 1:  # it has the better choice of algorithms
            status = self._gemm(
                *(*product, b, c.data, p.b_step, a, c.data, p.a_step, beta),
                *(out, c.data, p.out_step, *settings),
            )
        else:
            status = self._gemms(
                *(*product, b, c.data, p.b_step, p.b_stride, a, c.data, p.a_step, p.a_stride),
                *(beta, out, c.data, p.out_step, p.out_stride, p.batch, *settings),
            )
        if status:
            self._check(f"product ({p.m}, {p.k}) @ ({p.k}, {p.n}) of {p.batch}", status)

    @staticmethod
    def _check(what: str, status: int) -> None:
        if status:
            reason = _STATUS.get(status, "unknown")
            raise CublasError(f"cuBLAS: {what} failed with status {status} ({reason})")


def _address(number: Any) -> Any:
    return ctypes.pointer(number)  # keeps the number alive
