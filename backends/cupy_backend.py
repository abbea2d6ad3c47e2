"""The CUDA backend: `XpBackend` on CuPy, with raw kernels where a pass over memory is saved.

The only module that computes with CuPy. Kernels live in `cuda/*.cu`, are compiled when first used,
and are launched by `CupyBackend._launch` alone. Nothing here waits for the device but `to_numpy`,
`synchronize` and the upload of pageable memory by `asarray`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np

from nnx.backends.base import (
    Array,
    BackendUnavailable,
    CaptureError,
    Feeder,
    Graph,
    Groups,
    StepState,
    Update,
    XpBackend,
    check_operands,
    readable,
)
from nnx.backends.cublas import Cublas, CublasError, plan
from nnx.backends.cupy_step import CupyFeeder, CupyGraph, CupyStepState
from nnx.backends.philox import drop_threshold

Operation = TypeVar("Operation", bound=Callable[..., Any])
Sized: TypeAlias = tuple[Array, int]

_NO_MEMORY = 2  # cudaErrorMemoryAllocation
THREADS = 256  # of a block, in every kernel
WARPS = THREADS // 32

_SHARED = 47 * 1024  # bytes of shared memory that a kernel may ask for at launch
_PARTS = 4096  # numbers that the last block of softmax_nll adds up for each model, at most

# What a block takes at once. In registers, as normalization.cu has it: bytes of a row, bytes of a
# tile of a batch, and the tile's columns. Elements of the flat vector, TILE of optimizers.cu. Bytes
# of the columns that bias_backward sums. Partial sums that are added up in normalization.cu: FAN.
_ROW = 64 * THREADS
_TILE = 128 * THREADS
_TILE_WIDTH = 8
_UPDATE_TILE = 2048
_SUMMED = 512
_FAN = 32

_SOFTMAX_NLL = "=T =T? =T =u32 T i64? T? T? T? T? T? float float float " + " ".join(["int"] * 11)

# what all optimizers begin with
_UPDATE = "=T =T =i64 =u32 T T? T? f64 u8 f64 float float int int"

# Parameters of each kernel, in order. Arrays: "T" (of the kernel's dtype), "u32", "u8", "i64",
# "f64" and "any", "=" before one it writes, "?" behind one that may be None, "*" behind `(n,)` or
# `(K, n)` of which the rows alone need be contiguous: the next parameter is their distance, 0 for
# `(n,)`. Scalars: "int", "uint", "float".
_KERNELS = {
    "relu": ("relu.cu", "=T =u32 T int"),
    "relu_backward": ("relu.cu", "=T T u32 int"),
    "bias_relu": ("relu.cu", "=T =u32 T* int int int"),
    "bias_backward": ("relu.cu", "=T* =T? =T? =u32 T u32? int int int int int int int"),
    "softmax_nll": ("softmax_nll.cu", _SOFTMAX_NLL),
    "softmax_nll_wide": ("softmax_nll.cu", _SOFTMAX_NLL),
    "softmax_nll_long": ("softmax_nll.cu", _SOFTMAX_NLL),
    "softmax_nll_weight": (
        "softmax_nll.cu",
        "=T =T =u32 i64? T? T? T? " + " ".join(["int"] * 9),
    ),
    "dropout": ("dropout.cu", "=T =u8 T i64 uint uint uint uint float int"),
    "dropout_backward": ("dropout.cu", "=T T u8 float int"),
    "layer_norm": (
        "normalization.cu",
        "=T =T? =T T T? T? float int int int int int int",
    ),
    "layer_norm_backward": (
        "normalization.cu",
        "=T? =T? =T? =T? =u32 T T T? T T? " + " ".join(["int"] * 10),
    ),
    "batch_norm": (
        "normalization.cu",
        "=T =T =T =T =T =T? =u32 T T? T? float float int int int int int",
    ),
    "batch_norm_apply": (
        "normalization.cu",
        "=T =T? =T? T T T T? T? float int int int int int int",
    ),
    "batch_norm_backward": (
        "normalization.cu",
        "=T? =T? =T? =T? =T? =u32 T T T? T T? " + " ".join(["int"] * 9),
    ),
    "batch_norm_backward_apply": (
        "normalization.cu",
        "=T T T T T T? T int int int int int",
    ),
    "condition": ("optimizers.cu", "=T =T? =f64? =u32 T u8 f64 float float float float int int"),
    "sgd": ("optimizers.cu", f"{_UPDATE} =T? float int"),
    "adam": ("optimizers.cu", f"{_UPDATE} =T =T =T? float float float"),
    "adagrad": ("optimizers.cu", f"{_UPDATE} =T float float float"),
    "rmsprop": ("optimizers.cu", f"{_UPDATE} =T =T? =T? float float float"),
    "lion": ("optimizers.cu", f"{_UPDATE} =T float float"),
    "gather_rows": ("batch.cu", "=any? =any? =any? any? any? any? i64 i64 int int int int int"),
    "count_correct": ("metrics.cu", "=i64 T i64 int int int int int int int int"),
    "confusion": ("metrics.cu", "=i64 T? i64? i64 float int int int int int int int"),
    "add_sums": ("metrics.cu", "=f64 =f64 =u32 T int int int int"),
}
_DTYPES = {
    "u32": np.dtype(np.uint32),
    "u8": np.dtype(np.uint8),
    "i64": np.dtype(np.int64),
    "f64": np.dtype(np.float64),
}
# CuPy passes an int as long long and a float as double, but a bool as bool
_SCALARS: dict[str, Callable[[Any], Any]] = {"int": int, "uint": np.uint64, "float": float}
_SUFFIX = {np.dtype(np.float32): "_f32", np.dtype(np.float64): "_f64"}


class _Parameter(NamedTuple):
    """A parameter of a kernel, as `_KERNELS` spells it."""

    scalar: Callable[[Any], Any] | None  # what makes a number of it; None for an array
    dtype: Any  # None for any
    written: bool
    optional: bool
    rows: bool


def _parameter(kind: str, dtype: Any) -> _Parameter:
    plain = kind.strip("=?*")
    return _Parameter(
        _SCALARS.get(plain),
        dtype if plain == "T" else _DTYPES.get(plain),
        kind.startswith("="),
        kind.endswith("?"),
        kind.endswith("*"),
    )


def source(name: str) -> str:
    """The text of a `.cu` file as it is compiled; messages name its own lines."""
    folder = files("nnx.backends").joinpath("cuda")
    return "".join(
        f'#line 1 "{part}"\n{folder.joinpath(part).read_text()}' for part in ("common.cuh", name)
    )


def _by_kernel(file: str) -> Callable[[Operation], Operation]:
    """Marks an operation as the second body of one in `XpBackend`, made of the kernels of `file`.

    Where the file doesn't compile, the first body runs, after one warning that says so. With
    `NNX_STRICT=1` in the environment that is an error.
    """

    def mark(operation: Operation) -> Operation:
        definition = getattr(XpBackend, operation.__name__)

        @functools.wraps(operation)
        def run(self: CupyBackend, *args: Any, **options: Any) -> Any:
            body = operation if _compiles(self.device, file) else definition
            return body(self, *args, **options)

        return cast(Operation, run)

    return mark


class CupyBackend(XpBackend):
    """CuPy on one CUDA device."""

    graphs = True
    piece = 2**62  # a piece is a launch: as few as there are runs of equal settings

    def __init__(self, device: int) -> None:
        import cupy

        super().__init__(cupy, "cupy" if device == 0 else f"cupy:{device}")
        self.device = device
        self._tickets: dict[Any, list[Array]] = {}
        self._handles: dict[Any, Cublas | None] = {}
        self._kernels: dict[tuple[str, Any], tuple[Any, tuple[_Parameter, ...]]] = {}
        self._plain: set[str] = set()  # expressions that don't compile
        self._staged: deque[tuple[Any, Any]] = deque()
        self._holding = threading.Lock()
        self._capture_streams: dict[Any, Any] = {}
        self._capturing = threading.RLock()

    # ---- arrays --------------------------------------------------------------------------------

    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """`a` on this device, C-contiguous; another device's array is copied."""
        with self.activate():
            return self.xp.asarray(a, dtype=dtype, order="C")

    def to_numpy(self, a: Array) -> np.ndarray:
        """`a` on the host. Waits for the device."""
        return np.asarray(self.xp.asnumpy(a))

    def fetch(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        """Several arrays on the host, by way of pinned memory; waits for the device once."""
        import cupyx

        staged = []
        for a in arrays:
            host = cupyx.empty_pinned(a.shape, a.dtype)
            a.get(out=host, blocking=False)
            staged.append(host)
        self.synchronize()
        return [host.copy() for host in staged]

    def upload(self, host: np.ndarray, out: Array) -> None:
        """Copy to the device by way of pinned memory, on the current stream, without waiting."""
        import cupyx

        staged = cupyx.empty_pinned(host.shape, host.dtype)
        staged[...] = host
        with self.activate():
            copied = self.xp.cuda.Event(disable_timing=True)
            out.set(staged)
            copied.record()
        self.hold(copied, staged)

    def hold(self, copied: Any, memory: Any) -> None:
        """Keep pinned memory until an event: the copy may come after whoever asked is gone."""
        with self._holding:
            self._staged.append((copied, memory))
            while self._staged and self._staged[0][0].done:
                self._staged.popleft()

    def synchronize(self) -> None:
        """Wait until everything on the current stream is done."""
        with self.activate():
            self.xp.cuda.get_current_stream().synchronize()

    def activate(self, work: int | None = None) -> contextlib.AbstractContextManager[Any]:
        """A context in which this device is the current one."""
        if self.xp.cuda.runtime.getDevice() == self.device:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.xp.cuda.Device(self.device)
        return context

    def fits(self, nbytes: int) -> bool:
        """Whether the data take at most 60 % of the memory that is free, CuPy's pool included."""
        return nbytes <= 0.6 * self._room()[0]

    @contextlib.contextmanager
    def watch_memory(self) -> Iterator[Callable[[], tuple[int, int]]]:
        """As in `XpBackend`, of the device's memory; it comes from a pool of its own."""
        cuda, peak = self.xp.cuda, 0
        pool = cuda.MemoryPool()

        def allocate(size: int) -> Any:
            nonlocal peak
            memory = pool.malloc(size)
            peak = max(peak, pool.used_bytes())
            return memory

        def read() -> tuple[int, int]:
            nonlocal peak
            now = pool.used_bytes()
            found, peak = (now, max(peak, now)), now
            return found

        with self.activate(), cuda.using_allocator(allocate):
            yield read

    def _room(self) -> tuple[int, int]:
        """Bytes of memory that are free, in CuPy's pool too, and that there are."""
        with self.activate():
            free, total = self.xp.cuda.runtime.memGetInfo()
            return free + self.xp.get_default_memory_pool().free_bytes(), total

    def step_state(self) -> StepState:
        """A fresh `CupyStepState`."""
        with self.activate():
            return CupyStepState(self)

    def feeder(self, sources: Sequence[np.ndarray], batch_size: int) -> Feeder:
        """As in `XpBackend`, by way of pinned memory and a stream of its own."""
        return CupyFeeder(self, sources, batch_size)

    def capture(
        self, work: Callable[[], Any], state: StepState, parts: Iterable[object] = ()
    ) -> Graph:
        """As in `XpBackend`. What `work` allocates comes from a pool that belongs to the graph."""
        cuda = self.xp.cuda
        number, now = state.number, cuda.get_current_stream()
        pool, graph = cuda.MemoryPool(), None
        with self._capturing, self._capture_stream() as stream:
            if self.stream() not in self._handles:  # handles aren't made, nor used first, in one
                one = self.xp.ones((1, 1), np.float32)
                self.gemm(one, one, self.xp.empty_like(one))
            self._ticket(max((t[-1].size for t in list(self._tickets.values()) if t), default=1))
            stream.wait_event(now.record())
            try:
                stream.begin_capture()
                state.capturing = True
                with cuda.using_allocator(pool.malloc):
                    work()
                graph = stream.end_capture()
            except CaptureError:
                raise
            except Exception as error:  # of CuPy, CUDA, or whatever the step is made of
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            finally:
                state.capturing = False
                if graph is None:
                    with contextlib.suppress(Exception):
                        stream.end_capture()
                    state.count(number - state.number)
            now.wait_event(stream.record())
        return CupyGraph(graph, pool)

    def places(self, arrays: Iterable[Array | None]) -> Hashable:
        """As in `XpBackend`: addresses, for CuPy makes an array anew for each view."""
        return tuple(
            None if a is None else (int(a.data.ptr), a.shape, a.dtype.char) for a in arrays
        )

    def _capture_stream(self) -> Any:
        """Where steps of the current stream are captured.

        A graph holds the cuBLAS workspace and the tickets of the stream that it was captured on. So
        graphs that may run at the same time, on different streams, must come from different ones.
        """
        stream = self.stream()
        if stream not in self._capture_streams:
            self._capture_streams[stream] = self.xp.cuda.Stream(non_blocking=True)
        return self._capture_streams[stream]

    def out_of_memory(self, error: BaseException) -> str | None:
        """As in `XpBackend`."""
        cuda = self.xp.cuda
        refused = isinstance(error, cuda.runtime.CUDARuntimeError) and error.status == _NO_MEMORY
        if not (refused or isinstance(error, cuda.memory.OutOfMemoryError)):
            return None  # CuPy's own error, or without its pool CUDA's
        free, total = self._room()
        needed = getattr(error, "_size", None)
        asked = str(error) if needed is None else f"{readable(needed)} more were needed"
        return f"{asked}, {readable(free)} of {readable(total)} are free on {self.name}"

    # ---- launching -----------------------------------------------------------------------------

    def _launch(
        self, name: str, dtype: Any, items: int, *arguments: Any, lanes: int = 1, shared: int = 0
    ) -> None:
        """Launch a kernel: the one place that does.

        Args:
            name: A key of `_KERNELS`, without the dtype.
            dtype: What "T" stands for; None for a kernel of no dtype.
            items: How many pieces of work there are; the grid strides over them.
            arguments: In the kernel's order. An array comes as `(array, size)` with the number of
                elements it must have, or None; an input is made contiguous if it isn't.
            lanes: Threads that share a piece of work.
            shared: Bytes of shared memory of a block, at most `_SHARED`.

        Raises:
            TypeError: An array's dtype isn't the kernel's.
            ValueError: An array has another size, is on another device, or is an output that
                isn't contiguous.
        """
        prepared = self._kernels.get((name, dtype))
        if prepared is None:
            prepared = self._kernels[name, dtype] = self._prepare(name, dtype)
        kernel, parameters = prepared
        call: list[Any] = []
        for parameter, argument in zip(parameters, arguments, strict=True):
            if parameter.scalar is not None:
                call.append(parameter.scalar(argument))
            elif argument is None and parameter.optional:
                call.append(0)
            else:
                array, size = argument
                if not (
                    array.dtype == (parameter.dtype or array.dtype)
                    and array.size == size
                    and array.data.device_id == self.device
                    and array.flags.c_contiguous
                ):
                    array = self._fitted(name, parameter, array, size)
                call.append(array)
                if parameter.rows:
                    call.append(array.strides[0] // array.itemsize if array.ndim > 1 else 0)
        grid = min(-(-items * lanes // THREADS), 32 * self._multiprocessors)
        kernel((grid,), (THREADS,), tuple(call), shared_mem=shared)

    def _prepare(self, name: str, dtype: Any) -> tuple[Any, tuple[_Parameter, ...]]:
        """The kernel of an operation for a dtype, and its parameters."""
        file, signature = _KERNELS[name]
        suffix = "" if dtype is None else _SUFFIX[dtype]
        kernel = _load(self.device, file).get_function(name + suffix)
        return kernel, tuple(_parameter(kind, dtype) for kind in signature.split())

    def _fitted(self, name: str, parameter: _Parameter, array: Array, size: int) -> Array:
        """An array that the kernel can read, of one that isn't as it should be; or an error."""
        expected = parameter.dtype or array.dtype
        if array.dtype != expected:
            raise TypeError(f"{name}: expected an array of {expected}, got {array.dtype}")
        if array.size != size:
            raise ValueError(f"{name}: expected an array of {size} elements, got {array.shape}")
        if array.device.id != self.device:
            raise ValueError(
                f"{name}: expected an array on device {self.device}, got one on {array.device.id}"
            )
        if parameter.rows and array.ndim == 2 and array.strides[1] == array.itemsize:
            return array
        if parameter.written:
            raise ValueError(f"{name}: expected a contiguous output, got strides {array.strides}")
        return self.xp.ascontiguousarray(array)

    @functools.cached_property
    def _multiprocessors(self) -> int:
        return int(self.xp.cuda.Device(self.device).attributes["MultiProcessorCount"])

    def _ticket(self, n: int = 1) -> Array:
        """`n` words by which blocks of a kernel find out who is last: 0 before and after a launch.

        Each stream has its own, since its kernels run one after the other. Shorter ones are kept
        when longer ones are made: a captured graph may hold their address.
        """
        tickets = self._tickets.setdefault(self.stream(), [])
        if not tickets or tickets[-1].size < n:
            tickets.append(self.xp.zeros(max(n, 1024), np.uint32))
        return tickets[-1][:n]

    def _partial(self, size: int, dtype: Any, tickets: int = 1) -> tuple[Sized | None, Sized]:
        """Arguments of a kernel whose blocks leave sums for the last of them: space, tickets."""
        space = self.empty((size,), dtype) if size else None
        return _sized(space), (self._ticket(tickets), tickets)

    def stream(self) -> Hashable:
        """As in `XpBackend`."""
        stream = self.xp.cuda.get_current_stream().ptr
        return (stream, threading.get_ident()) if stream == 2 else stream  # 2: each thread's own

    # ---- linear algebra -------------------------------------------------------------------------

    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array:
        """As in `XpBackend`, in one call of cuBLAS; see `nnx.backends.cublas`.

        Raises:
            ValueError: The shapes don't belong to one product.
            TypeError: The dtypes differ.
        """
        dtype = out.dtype
        if a.dtype != dtype or b.dtype != dtype:
            raise TypeError(f"gemm: expected arrays of {dtype}, got {a.dtype} and {b.dtype}")
        cublas = self._cublas() if dtype in _SUFFIX else None
        if cublas is None:
            return super().gemm(a, b, out, accumulate=accumulate)
        sizes = dtype.itemsize
        p = plan(a.shape, a.strides, b.shape, b.strides, out.shape, out.strides, sizes)
        if p is None:  # neither rows nor columns are contiguous
            a, b = self._packed(a), self._packed(b)
            p = plan(a.shape, a.strides, b.shape, b.strides, out.shape, out.strides, sizes)
            if p is None:
                return super().gemm(a, b, out, accumulate=accumulate)
        if out.size and p.k:
            cublas.gemm(p, a.data.ptr, b.data.ptr, out.data.ptr, dtype, accumulate)
        elif not accumulate:
            out.fill(0)
        return out

    def _packed(self, a: Array) -> Array:
        """A copy of `a` that is contiguous."""
        copy = self.empty(a.shape, a.dtype)
        self.xp.copyto(copy, a)
        return copy

    def _cublas(self) -> Cublas | None:
        """The current stream's cuBLAS handle; None where none can be had."""
        stream = self.stream()
        if stream not in self._handles:
            try:
                with self.activate():
                    self._handles[stream] = Cublas(self.xp.cuda.get_current_stream().ptr)
            except (CublasError, OSError, AttributeError, ImportError) as error:
                _give_way(f"cuBLAS can't be called directly ({error}); products run by CuPy", error)
                self._handles[stream] = None
        return self._handles[stream]

    # ---- element by element ---------------------------------------------------------------------

    def elementwise(self, expression: str, out: Array, **operands: Array | float) -> Array:
        """As in `XpBackend`, in one launch; strides are CuPy's business."""
        if expression in self._plain:
            return super().elementwise(expression, out, **operands)
        check_operands(expression, out, operands)
        numbers = tuple(name for name, a in operands.items() if isinstance(a, (int, float)))
        kernel = _elementwise(expression, tuple(operands), numbers)
        kind = out.dtype.type
        arguments = [kind(a) if name in numbers else a for name, a in operands.items()]
        try:
            return kernel(*arguments, out)
        except self.xp.cuda.compiler.CompileException as error:
            self._plain.add(expression)
            _give_way(
                f"the expression {expression!r} doesn't compile ({_first_line(error)}); "
                "it runs as plain CuPy, with more launches",
                error,
            )
        return super().elementwise(expression, out, **operands)

    # ---- ReLU ----------------------------------------------------------------------------------

    @_by_kernel("relu.cu")
    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array:
        """As in `XpBackend`, in one launch."""
        if dy.ndim not in (2, 3) or dy.dtype not in _SUFFIX:
            return super().bias_grad(dy, out, accumulate=accumulate)
        self._bias_backward(dy, None, out, accumulate)
        return out

    @_by_kernel("relu.cu")
    def relu(self, x: Array) -> tuple[Array, Array]:
        """As in `XpBackend`; the mask has one bit per element."""
        n = x.size
        y = self.empty(x.shape, x.dtype)
        mask = self.empty((_words(n),), np.dtype(np.uint32))
        if n:
            self._launch("relu", x.dtype, _packs(x), (y, n), (mask, _words(n)), (x, n), n)
        return y, mask

    @_by_kernel("relu.cu")
    def relu_backward(self, dy: Array, mask: Array) -> Array:
        """As in `XpBackend`."""
        if mask.dtype == bool:
            return super().relu_backward(dy, mask)
        n = dy.size
        dx = self.empty(dy.shape, dy.dtype)
        if n:
            words = (mask, _words(n))
            self._launch("relu_backward", dy.dtype, _packs(dy), (dx, n), (dy, n), words, n)
        return dx

    @_by_kernel("relu.cu")
    def bias_relu(self, z: Array, bias: Array) -> tuple[Array, Array]:
        """As in `XpBackend`, in one launch."""
        if z.ndim not in (2, 3) or bias.ndim != z.ndim - 1:
            return super().bias_relu(z, bias)
        n, (rows, columns) = z.size, z.shape[-2:]
        mask = self.empty((_words(n),), np.dtype(np.uint32))
        if n:
            self._launch(
                "bias_relu",
                z.dtype,
                _packs(z),
                (z, n),
                (mask, _words(n)),
                (bias, n // rows),
                rows,
                columns,
                n,
            )
        return z, mask

    @_by_kernel("relu.cu")
    def bias_relu_backward(
        self, dy: Array, mask: Array, dbias: Array, *, accumulate: bool = False
    ) -> Array:
        """As in `XpBackend`, in one launch."""
        if mask.dtype == bool:
            return super().bias_relu_backward(dy, mask, dbias, accumulate=accumulate)
        return self._bias_backward(dy, mask, dbias, accumulate)

    def _bias_backward(
        self, dy: Array, mask: Array | None, dbias: Array, accumulate: bool
    ) -> Array | None:
        dtype, n, (rows, columns) = dy.dtype, dy.size, dy.shape[-2:]
        n_models = dbias.size // columns if columns else 0
        dz = None if mask is None else self.empty(dy.shape, dtype)
        if not n_models:
            return dz
        width, parts, chunks, chunk_rows = _chunks(n_models, rows, columns, dtype.itemsize)
        several = chunks > 1
        size = parts * chunks * _SUMMED // dtype.itemsize if several else 0
        self._launch(
            "bias_backward",
            dtype,
            parts * chunks,
            (dbias, n_models * columns),
            _sized(dz),
            *self._partial(size, dtype, parts if several else 1),
            (dy, n),
            _sized(mask, _words(n)),
            n_models,
            rows * columns,
            columns,
            width,
            chunks,
            chunk_rows,
            accumulate,
            lanes=THREADS,
        )
        return dz

    # ---- losses and metrics --------------------------------------------------------------------

    @_by_kernel("softmax_nll.cu")
    def softmax_nll(
        self,
        logits: Array,
        target: Array,
        weight: Array | None = None,
        *,
        class_weight: Array | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        """As in `XpBackend`, in one launch; in two where the denominator isn't known before."""
        dtype, (n, n_classes) = logits.dtype, logits.shape[-2:]
        models = logits.shape[:-2]
        n_models = models[0] if models else 1
        loss = self.empty(models, dtype)
        gradient = self.empty(logits.shape, dtype) if need_gradient else None
        if not n:
            loss.fill(0)
            return loss, gradient
        soft = target.dtype.kind == "f"
        target = self.cast(target, dtype if soft else np.int64)
        weight = None if weight is None else self.cast(weight, dtype)
        n_targets = target.size // n_classes if soft else target.size
        n_weights = 0 if weight is None else weight.size
        ignored = (0, 0) if ignore_index is None else (ignore_index, 1)
        targets = (
            None if soft else _sized(target),
            _sized(target) if soft else None,
            _sized(class_weight, n_classes),
            _sized(weight),
        )
        sizes = (n, n_classes, n_targets, n_weights, *ignored)
        name, lanes, shared = _softmax_kernel(n_classes, dtype.itemsize, soft)
        part, parts = _parts(n, THREADS // lanes)
        count, denominator = self._number(normalizer, n, dtype)
        scale, factor = self._number(grad_scale, 1, dtype)
        given = (weight, class_weight, ignore_index)
        if normalizer is None and any(a is not None for a in given):
            alike = max(n_targets, n_weights) == n  # in all models
            denominator = self.empty((1 if alike else n_models,), dtype)
            readers = min(lanes, 32) if soft else 1
            rows, blocks = _parts(n, THREADS // readers)
            blocks *= denominator.size
            self._launch(
                "softmax_nll_weight",
                dtype,
                blocks,
                _sized(denominator),
                *self._partial(blocks, dtype),
                *targets,
                readers,
                rows,
                denominator.size,
                *sizes,
                lanes=THREADS,
            )
        parts *= n_models
        self._launch(
            name,
            dtype,
            parts,
            (loss, n_models),
            _sized(gradient),
            *self._partial(parts, dtype),
            (logits, n_models * n * n_classes),
            *targets,
            _sized(denominator),
            _sized(factor),
            count,
            scale,
            label_smoothing,
            lanes,
            part,
            n_models,
            *sizes,
            0 if denominator is None else denominator.size,
            0 if factor is None else factor.size,
            lanes=THREADS,
            shared=shared,
        )
        return loss, gradient

    def _number(self, a: float | Array | None, default: float, dtype: Any) -> Any:
        """A number known here, and an array of it where the device alone knows it."""
        if a is None or isinstance(a, (int, float)):
            return default if a is None else a, None
        return default, self.cast(a, dtype)

    @_by_kernel("metrics.cu")
    def count_correct(
        self,
        scores: Array,
        labels: Array,
        total: Array,
        *,
        k: int = 1,
        ignore_index: int | None = None,
    ) -> None:
        """As in `XpBackend`, in one launch."""
        n, n_classes = scores.shape[-2:]
        n_models = scores.shape[0] if scores.ndim == 3 else 1
        labels = self.cast(labels, np.int64)
        lanes, shared = _staging(n_classes, scores.dtype.itemsize)
        if n:
            self._launch(
                "count_correct",
                scores.dtype,
                -(-n // (THREADS // lanes)) * n_models,
                (total, n_models if ignore_index is None else 2 * n_models),
                _sized(scores),
                _sized(labels),
                lanes,
                n_models,
                n,
                n_classes,
                labels.size,
                k,
                ignore_index or 0,
                ignore_index is not None,
                lanes=THREADS,
                shared=shared,
            )

    @_by_kernel("metrics.cu")
    def confusion(
        self, scores: Array, labels: Array, total: Array, *, threshold: float | None = None
    ) -> None:
        """As in `XpBackend`, in one launch."""
        n_classes = total.shape[-1]
        n_models = total.shape[0] if total.ndim == 3 else 1
        floating, labels = scores.dtype.kind == "f", self.cast(labels, np.int64)
        width = 0 if not floating else 1 if threshold is not None else n_classes
        dtype = scores.dtype if floating else np.dtype(np.float32)
        n = scores.size // (n_models * max(width, 1))
        predicted = None if floating else self.cast(scores, np.int64)
        lanes, shared = _staging(width, dtype.itemsize)
        if n:
            self._launch(
                "confusion",
                dtype,
                -(-n // (THREADS // lanes)) * n_models,
                (total, n_models * n_classes**2),
                _sized(scores, n_models * n * width) if floating else None,
                _sized(predicted, n_models * n),
                _sized(labels),
                threshold or 0.0,
                lanes,
                n_models,
                n,
                width,
                n_classes,
                labels.size,
                threshold is not None,
                lanes=THREADS,
                shared=shared,
            )

    @_by_kernel("metrics.cu")
    def add_sums(self, terms: Array, total: Array) -> None:
        """As in `XpBackend`, in one launch."""
        n, columns = terms.shape[-2:]
        n_models = total.size // max(columns, 1)
        if not terms.size:
            return
        part = max(-(-n // 64), -(-4096 // columns))  # at most 64, of some work each
        parts = n_models * -(-n // part)
        self._launch(
            "add_sums",
            terms.dtype,
            parts,
            (total, n_models * columns),
            *self._partial(parts * columns, _DTYPES["f64"]),
            _sized(terms),
            n_models,
            n,
            columns,
            part,
            lanes=THREADS,
        )

    # ---- dropout -------------------------------------------------------------------------------

    @_by_kernel("dropout.cu")
    def dropout(
        self, x: Array, p: float, *, seed: int, stream: int, use: int, state: StepState
    ) -> tuple[Array, Array]:
        """As in `XpBackend`, word for word; the mask has one bit per element."""
        assert isinstance(state, CupyStepState)
        n = x.size
        y = self.empty(x.shape, x.dtype)
        mask = self.empty(((n + 7) // 8,), np.dtype(np.uint8))
        if n:
            self._launch(
                "dropout",
                x.dtype,
                mask.size,
                (y, n),
                _sized(mask),
                (x, n),
                (state.counters, 2),
                seed,
                stream,
                use,
                drop_threshold(p),
                1 / (1 - p) if p < 1 else 1.0,
                n,
            )
        return y, mask

    @_by_kernel("dropout.cu")
    def dropout_backward(self, dy: Array, mask: Array, p: float) -> Array:
        """As in `XpBackend`."""
        n = dy.size
        dx = self.empty(dy.shape, dy.dtype)
        if n:
            scale = 1 / (1 - p) if p < 1 else 1.0
            kept = (mask, (n + 7) // 8)
            self._launch("dropout_backward", dy.dtype, _packs(dy), (dx, n), (dy, n), kept, scale, n)
        return dx

    # ---- normalization -------------------------------------------------------------------------

    @_by_kernel("normalization.cu")
    def layer_norm(
        self, x: Array, weight: Array | None, bias: Array | None, *, eps: float, centered: bool
    ) -> tuple[Array, Array | None, Array]:
        """As in `XpBackend`, in one launch."""
        batch, vectors, sizes = self._batches(x, weight, bias)
        y, rstd = self.empty(x.shape, x.dtype), self.empty(x.shape[:-1], x.dtype)
        mean = self.empty(rstd.shape, x.dtype) if centered else None
        lanes = _row_lanes(x)
        arguments = (_sized(y), _sized(mean), _sized(rstd), batch, *vectors, eps, *sizes, lanes)
        self._launch("layer_norm", x.dtype, max(rstd.size, 1), *arguments, lanes=lanes)
        return y, mean, rstd

    @_by_kernel("normalization.cu")
    def layer_norm_backward(
        self,
        dy: Array,
        x: Array,
        mean: Array | None,
        rstd: Array,
        weight: Array | None,
        dweight: Array | None,
        dbias: Array | None,
        *,
        accumulate: tuple[bool, bool] = (False, False),
        need_dx: bool = True,
    ) -> Array | None:
        """As in `XpBackend`, in one launch; two for rows that don't fit in registers."""
        batch, (w, *gradients), sizes = self._batches(x, weight, dweight, dbias)
        inputs = ((dy, x.size), batch, _sized(mean), _sized(rstd), w)
        dx = self.empty(dy.shape, dy.dtype) if need_dx else None
        _, n_models, n, _, n_columns = sizes
        fits = n_columns * dy.itemsize <= _ROW
        sums = gradients if fits else [None, None]
        if need_dx or any(sums):
            # rows that a block sums up first: 24, whose bytes are many against those of the sums.
            # Of FAN * FAN such sums those of FAN blocks are added up, and then these
            group = 24 * max(-(-n // (24 * _FAN * _FAN)), 1)
            n_groups = max(-(-n // group), 1)
            size = n_models * n_groups * n_columns * sum(a is not None for a in sums)
            partial = self._partial(size, dy.dtype, n_models * (-(-n_groups // _FAN) + 1))
            numbers = (*sizes, _row_lanes(x), group, n_groups, *accumulate)
            arguments = (_sized(dx), *sums, *partial, *inputs, *numbers)
            name = "layer_norm_backward"
            self._launch(name, dy.dtype, n_models * n_groups, *arguments, lanes=THREADS)
        if not fits and any(gradients):
            outputs = (None, *gradients, None)
            self._column_sums(dy, outputs, inputs, False, True, *sizes, *accumulate)
        return dx

    @_by_kernel("normalization.cu")
    def batch_norm(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        running_mean: Array,
        running_var: Array,
        *,
        eps: float,
        momentum: float,
        training: bool,
    ) -> tuple[Array, Array, Array]:
        """As in `XpBackend`, in one launch; two in training on a batch higher than a block."""
        batch, vectors, sizes = self._batches(x, weight, bias)
        y = self.empty(x.shape, x.dtype)
        mean, rstd = (self.empty(running_mean.shape, x.dtype) for _ in range(2))
        n = sizes[1] * sizes[4]
        measured, running = ((mean, n), (rstd, n)), ((running_mean, n), (running_var, n))
        tiles, tall = _batch_tiles(x)
        if training:
            partial = self._partial(2 * _TILE_WIDTH * tiles if tall else 0, x.dtype, tiles)
            options = (eps, momentum, *sizes)
            arguments = (_sized(y), *measured, *running, *partial, batch, *vectors, *options)
            self._launch("batch_norm", x.dtype, tiles, *arguments, lanes=THREADS)
        if tall or not training:
            results = (None, None) if training else measured
            given = measured if training else running
            options = (eps, not training, *sizes)
            arguments = (_sized(y), *results, batch, *given, *vectors, *options)
            self._launch("batch_norm_apply", x.dtype, tiles, *arguments, lanes=THREADS)
        return y, mean, rstd

    @_by_kernel("normalization.cu")
    def batch_norm_backward(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        weight: Array | None,
        dweight: Array | None,
        dbias: Array | None,
        *,
        training: bool,
        accumulate: tuple[bool, bool] = (False, False),
        need_dx: bool = True,
    ) -> Array | None:
        """As in `XpBackend`, in one launch; two in training on a batch higher than a block."""
        batch, (w, *gradients), sizes = self._batches(x, weight, dweight, dbias)
        inputs = ((dy, x.size), batch, _sized(mean), _sized(rstd), w)
        dx = self.empty(dy.shape, dy.dtype) if need_dx else None
        tiles, tall = _batch_tiles(dy)
        twice = need_dx and training and tall
        sums = _sized(self.empty((2 * mean.size,), dy.dtype) if twice else None)
        if need_dx or any(gradients):
            outputs = (_sized(dx), *gradients, sums)
            self._column_sums(dy, outputs, inputs, training, False, *sizes, *accumulate)
        if twice:
            arguments = (_sized(dx), *inputs, sums, *sizes)
            self._launch("batch_norm_backward_apply", dy.dtype, tiles, *arguments, lanes=THREADS)
        return dx

    def _column_sums(
        self,
        dy: Array,
        outputs: Sequence[Sized | None],
        inputs: Sequence[Sized | None],
        *numbers: int,
    ) -> None:
        """Launch the kernel `batch_norm_backward`."""
        tiles, tall = _batch_tiles(dy)
        partial = self._partial(2 * _TILE_WIDTH * tiles if tall else 0, dy.dtype, tiles)
        arguments = (*outputs, *partial, *inputs, *numbers)
        self._launch("batch_norm_backward", dy.dtype, tiles, *arguments, lanes=THREADS)

    def _batches(
        self, x: Array, *vectors: Array | None
    ) -> tuple[Sized, list[Sized | None], tuple[int, int, int, int, int]]:
        """Arguments of a kernel: x, once if it is the same for all models, vectors, and sizes.

        The vectors are `(C,)` or `(K, C)`. Rows of the flat vector have gaps between them; then
        the argument is all from the first row to the last. The sizes are the distance of the rows,
        K, N, the number of rows of x, and C.
        """
        *models, n, n_columns = x.shape
        shape, distance = (*models, n_columns), n_columns
        arguments: list[Sized | None] = []
        rows = [a for a in vectors if a is not None]
        if any(a.shape != shape for a in rows):
            got = [a.shape for a in rows]
            raise ValueError(f"normalization: expected vectors of shape {shape}, got {got}")
        if models and models[0] > 1 and rows:
            distance = rows[0].strides[0] // rows[0].itemsize
        for a in vectors:
            if a is not None and distance != n_columns:
                if a.strides != (distance * a.itemsize, a.itemsize):
                    raise ValueError(
                        f"normalization: expected rows {distance} elements apart, got {a.strides}"
                    )
                a = self.xp.ndarray(((len(a) - 1) * distance + n_columns,), a.dtype, a.data)
            arguments.append(_sized(a))
        if models and models[0] > 1 and x.strides[0] == 0:
            x = x[0]
        n_models = models[0] if models else 1
        return (x, x.size), arguments, (distance, n_models, n, x.size // n_columns, n_columns)

    # ---- optimizers ----------------------------------------------------------------------------

    @_by_kernel("optimizers.cu")
    def condition(
        self,
        update: Update,
        *,
        l1: float,
        l2: float,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> Update:
        """As in `XpBackend`, in one launch."""
        value, groups, tiles = update.value, update.groups, _update_tiles(update.value)
        n_models, size = value.shape
        scale = None if clip_norm is None else self.empty((n_models,), value.dtype)
        squares = 0 if clip_norm is None else tiles
        self._launch(
            "condition",
            value.dtype,
            tiles,
            (update.grad, value.size),
            _sized(scale),
            *self._partial(squares, _DTYPES["f64"], n_models),
            _sized(value),
            (groups.ids, size // Groups.BLOCK),
            _sized(groups.table),
            l1,
            l2,
            clip_value or 0.0,
            clip_norm or 0.0,
            n_models,
            size,
            lanes=THREADS,
        )
        return update._replace(scale=scale)

    @_by_kernel("optimizers.cu")
    def sgd(self, update: Update, *, momentum: float, nesterov: bool) -> None:
        """As in `XpBackend`, in one launch."""
        self._update("sgd", update, momentum, nesterov)

    @_by_kernel("optimizers.cu")
    def adam(self, update: Update, *, beta1: float, beta2: float, eps: float) -> None:
        """As in `XpBackend`, in one launch."""
        self._update("adam", update, beta1, beta2, eps)

    @_by_kernel("optimizers.cu")
    def adagrad(self, update: Update, *, lr_decay: float, initial: float, eps: float) -> None:
        """As in `XpBackend`, in one launch."""
        self._update("adagrad", update, lr_decay, initial, eps)

    @_by_kernel("optimizers.cu")
    def rmsprop(self, update: Update, *, alpha: float, eps: float, momentum: float) -> None:
        """As in `XpBackend`, in one launch."""
        self._update("rmsprop", update, alpha, eps, momentum)

    @_by_kernel("optimizers.cu")
    def lion(self, update: Update, *, beta1: float, beta2: float) -> None:
        """As in `XpBackend`, in one launch."""
        self._update("lion", update, beta1, beta2)

    def _update(self, name: str, update: Update, *hyper_parameters: float) -> None:
        """Launch an optimizer: all begin with the same arguments."""
        value, state, groups = update.value, update.state, update.groups
        assert isinstance(state, CupyStepState)
        n, (n_models, size) = value.size, value.shape
        self._launch(
            name,
            value.dtype,
            _update_tiles(value),
            (value, n),
            _sized(state.log),
            (state.counters, 2),
            (self._ticket(), 1),
            (update.grad, n),
            _sized(update.scale, n_models),
            _sized(update.loss, n_models),
            (state.device_rates, len(state.rates)),
            (groups.ids, size // Groups.BLOCK),
            _sized(groups.table),
            update.decay,
            update.shrink,
            n_models,
            size,
            *(_sized(slot, n) for slot in update.slots),
            *hyper_parameters,
            lanes=THREADS,
        )
        state.count()

    # ---- data ----------------------------------------------------------------------------------

    @_by_kernel("batch.cu")
    def gather_rows(
        self, sources: Sequence[Array], state: StepState, batch_size: int, n: int
    ) -> list[Array]:
        """As in `XpBackend`, all sources in one launch."""
        assert isinstance(state, CupyStepState)
        if len(sources) > 3:
            return super().gather_rows(sources, state, batch_size, n)
        batch = [self.empty((n, *a.shape[1:]), a.dtype) for a in sources]
        unused = [None] * (3 - len(sources))
        widths = [a.nbytes // max(len(a), 1) for a in sources]
        words = n * sum(-(-width // 16) for width in widths)
        if words:
            self._launch(
                "gather_rows",
                None,
                words,
                *map(_sized, batch),
                *unused,
                *map(_sized, sources),
                *unused,
                _sized(state.order),
                (state.counters, 2),
                *widths,
                *(0 for _ in unused),
                batch_size,
                n,
            )
        return batch


@functools.cache
def _elementwise(expression: str, operands: tuple[str, ...], numbers: tuple[str, ...]) -> Any:
    """The `ElementwiseKernel` of an expression, its number literals cast to the arrays' dtype."""
    import cupy

    literal = r"(?<![\w.])(\d+\.?\d*(?:e[+-]?\d+)?)"
    body = re.sub(literal, r"T(\1)", expression)
    name = "nnx_" + re.sub(r"\W+", "_", expression)[:80]
    return cupy.ElementwiseKernel(
        ", ".join(f"T {operand}" for operand in operands),
        "T out_",
        f"out_ = {body}",
        name,
        preamble=_ELEMENTWISE_PREAMBLE,
    )


# What the functions of an expression are in CUDA C++; NaN goes through, as in NumPy.
_ELEMENTWISE_PREAMBLE = """
template <typename T> __device__ T where(bool c, T a, T b) { return c ? a : b; }
template <typename T> __device__ T maximum(T a, T b) { return a > b || a != a ? a : b; }
template <typename T> __device__ T minimum(T a, T b) { return a < b || a != a ? a : b; }
template <typename T> __device__ T sign(T a) { return a != a ? a : T((a > T(0)) - (a < T(0))); }
"""


def _sized(a: Array | None, size: int | None = None) -> Any:
    """An argument of `_launch`: an array that has so many elements, or as many as it should."""
    return None if a is None else (a, a.size if size is None else size)


def _words(n: int) -> int:
    """32-bit words of a mask of n bits."""
    return (n + 31) // 32


def _packs(a: Array) -> int:
    """16-byte packs of an array."""
    return -(-int(a.nbytes) // 16)


@functools.cache
def _chunks(n_models: int, rows: int, columns: int, itemsize: int) -> tuple[int, int, int, int]:
    """How `bias_backward` divides its sums among blocks: by the shape alone, so that they repeat.

    Returns:
        Elements that count as one row: several rows where they are narrow, so that a warp has
        enough to load, and a whole number of 32-byte sectors if possible. Parts that don't meet:
        models times groups of columns. Chunks of rows in each part, of at least 32 rows; about
        256 blocks are enough for any GPU. Rows of a chunk.
    """
    of_block, sector = _SUMMED // itemsize, 32 // itemsize
    together, unit = max(of_block // columns, 1), sector // math.gcd(sector, columns)
    width = columns * (together - together % unit or together)
    rows = -(-rows * columns // width)
    parts = n_models * -(-width // of_block)
    chunks = max(min(rows // 32, 256 // parts), 1)
    chunk_rows = -(-rows // (chunks * WARPS)) * WARPS
    return width, parts, max(-(-rows // chunk_rows), 1) if rows else 1, chunk_rows


@functools.cache
def _staging(width: int, itemsize: int) -> tuple[int, int]:
    """Threads for each row of this width, and bytes of shared memory for a block's rows.

    Up to 1,024 elements a row has lanes of a warp, as many as keep each busy; beyond, or where the
    memory isn't enough, it has a block.
    """
    lanes = min(1 << max(width, 1).bit_length() - 1, 32)
    shared = THREADS // lanes * width * itemsize + 16  # 16: alignment
    return (lanes, shared) if width <= 1024 and shared <= _SHARED else (THREADS, 0)


@functools.cache
def _softmax_kernel(n_classes: int, itemsize: int, soft: bool) -> tuple[str, int, int]:
    """The kernel of `softmax_nll` for rows of this width, threads for each row, shared memory."""
    arrays = 1 + soft  # that are staged
    lanes, shared = _staging(n_classes, arrays * itemsize)
    if shared:
        return "softmax_nll", lanes, shared + 16 * arrays
    shared = arrays * (n_classes * itemsize + 32)
    if shared <= _SHARED:
        return "softmax_nll_wide", THREADS, shared
    return "softmax_nll_long", THREADS, 0


def _parts(n: int, tile: int) -> tuple[int, int]:
    """Rows that a block takes of n, a multiple of its tile; and how many blocks it takes."""
    rows = tile * -(-n // (tile * _PARTS))
    return rows, -(-n // rows)


def _row_lanes(x: Array) -> int:
    """Threads for a row of `layer_norm`: a warp, or a block if a warp's registers don't hold it."""
    return 32 if x.shape[-1] * x.itemsize <= _ROW // WARPS else THREADS


def _batch_tiles(x: Array) -> tuple[int, bool]:
    """In how many tiles `batch_norm` cuts the batches; whether they are higher than one."""
    *models, n, n_columns = x.shape
    down = max(-(-n // (_TILE // (_TILE_WIDTH * x.itemsize))), 1)
    return math.prod(models) * -(-n_columns // _TILE_WIDTH) * down, down > 1


def _update_tiles(value: Array) -> int:
    """Tiles of the flat vector `(K, P)`, the last of each row a rest.

    At least one: a step is to be counted even if there is nothing to update.
    """
    n_models, size = value.shape
    return int(max(n_models * -(-size // _UPDATE_TILE), 1))


@functools.cache
def _load(device: int, file: str) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(file), options=("-std=c++17",))
        module.compile()
        return module


@functools.cache
def _compiles(device: int, file: str) -> bool:
    """Whether the kernels of a file can be used; compiles them when first asked."""
    try:
        _load(device, file)
    except Exception as error:  # of NVRTC, the driver or CuPy
        if _is_of_the_device(error):
            raise
        _give_way(
            f"the kernels of {file} don't compile for device {device} ({_first_line(error)}); "
            "their operations run as plain CuPy, slower and with more launches",
            error,
        )
        return False
    return True


def _is_of_the_device(error: Exception) -> bool:
    """Whether it says nothing about the source: no memory, a fault before, a capture under way."""
    from cupy.cuda import driver, runtime

    return isinstance(error, (driver.CUDADriverError, runtime.CUDARuntimeError)) and (
        error.status == 2 or error.status >= 700
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _give_way(message: str, error: Exception) -> None:
    """Warn that a faster body can't be used, or with `NNX_STRICT=1` raise that."""
    message += ". Please report it, with the output of `nnx info`"
    if os.environ.get("NNX_STRICT") == "1":
        raise BackendUnavailable(f"backend 'cupy': {message}") from error
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _import_cupy() -> Any:
    try:
        import cupy
    except Exception as error:  # an ImportError, or whatever two CuPys in one folder end in
        raise _unavailable(error) from error
    return cupy


def _unavailable(error: object, device: int = 0) -> BackendUnavailable:
    from nnx.backends.cuda_versions import cuda_versions, explain

    return BackendUnavailable(f"backend 'cupy': {explain(error, cuda_versions(device))}")


def device_count() -> int:
    """Number of CUDA devices; 0 where the driver finds none.

    Raises:
        BackendUnavailable: CuPy isn't installed, or there is no driver.
    """
    cupy = _import_cupy()
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy raises various types where driver or toolkit are missing
        raise _unavailable(error) from error


@functools.cache
def probe(device: int) -> str | None:
    """Why a one-element kernel doesn't run on this device; None if it does."""
    cupy = _import_cupy()
    try:
        with cupy.cuda.Device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = cupy.ones(1, np.float32)
            return None if float((one + one)[0]) == 2 else "1 + 1 isn't 2 there"
    except Exception as error:  # whatever it is, the device can't be used
        return f"{type(error).__name__}: {error}"


def get_cupy_backend(device: int | None = None) -> CupyBackend:
    """The backend of a device, by default CuPy's current one.

    Raises:
        BackendUnavailable: CuPy isn't installed, there is no such device, or no kernel runs on it.
    """
    if device is None or device not in _backends:
        count = device_count()
        if device is None:
            device = _import_cupy().cuda.Device().id if count else 0
        if device >= count:
            raise BackendUnavailable(
                f"backend 'cupy:{device}': expected a device below {count}, the number of devices; "
                "use 'cupy', or 'auto' to take what there is"
            )
        if device not in _backends:
            reason = probe(device)
            if reason is not None:
                raise _unavailable(f"device {device} runs no one-element kernel: {reason}", device)
            _backends[device] = CupyBackend(device)
    return _backends[device]


_backends: dict[int, CupyBackend] = {}
