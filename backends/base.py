"""The `Backend` protocol, and `XpBackend`: every operation in plain xp.

The bodies here are the definition of each operation: NumPy runs them, CuPy falls back on them, and
every raw kernel is compared with them. An operation is in the protocol only if xp can't express
its fast path, or NumPy and CuPy differ on it, and it shows in the time of a training step;
everything else is xp code in the layers.
"""

from __future__ import annotations

import contextlib
import functools
import tracemalloc
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias

import numpy as np

from nnx.backends.arena import running
from nnx.backends.philox import drop_threshold, words

Array: TypeAlias = Any
"""An array of the backend at hand: `numpy.ndarray` or `cupy.ndarray`."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for that can't be used here; the message says why and what to do."""


class CaptureError(RuntimeError):
    """A step can't be captured into a graph; the message says what in it stands in the way.

    Attributes:
        done: Whether the step was done all the same; else everything is as if it hadn't been tried.
    """

    def __init__(self, message: str, *, done: bool = False) -> None:
        super().__init__(message)
        self.done = done


def methods(part: object) -> list[Any]:
    """The functions of a layer, loss, metric or optimizer that a step calls, whoever wrote them."""
    names = ("forward", "backward", "__call__", "update", "step")
    found = (getattr(part, name, None) for name in names)
    return [getattr(f, "__func__", f) for f in found if f is not None]


class OutOfMemory(MemoryError):
    """The device has too little memory; the message says for what, and what to change."""


def readable(nbytes: int) -> str:
    """A number of bytes as people read it."""
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


class Graph(Protocol):
    """The device's work of a training step, recorded."""

    def launch(self) -> None:
        """Do what was captured, if the capture hasn't, on the current stream, without waiting."""

    def replay(self, state: StepState) -> None:
        """Do it again, and count it."""


class Feeder(Protocol):
    """Sends rows of host arrays to the device, batch by batch."""

    def send(self, index: np.ndarray) -> list[Array]:
        """These rows of each array, on the device until the next but one call."""


class StepState:
    """What a training step reads besides data: its number, its learning rate, its place in the log.

    The host always knows these numbers. A device backend keeps a copy in device memory, where the
    kernels read them and the optimizer's kernel counts up, so that no step uploads anything.

    Attributes:
        rates: Learning rates of the planned steps, float64.
        log: Losses of the planned steps, `(n,)` or `(n, K)`; NaN until they are known.
        order: Order of the samples in this epoch, int64, or None.
        host_order: The same on the host.
        capturing: Whether a step is being captured. What reads a number on the host then would
            freeze it in the graph, so that is an error.
    """

    def __init__(self, backend: XpBackend) -> None:
        self.backend = backend
        self._number = 0
        self._position = 0
        self.rates = np.empty(0)
        self.log: Array = None
        self.order: Array = None
        self.host_order: np.ndarray | None = None
        self.capturing = False

    @property
    def number(self) -> int:
        """Updates done since the beginning; the step of every random stream."""
        if self.capturing:
            self._refuse("number")
        return self._number

    @number.setter
    def number(self, number: int) -> None:
        self._number = number
        self._send_counters()

    @property
    def position(self) -> int:
        """Updates done since `plan`; index into `rates` and `log`, and of the batch."""
        if self.capturing:
            self._refuse("position")
        return self._position

    @property
    def uploaded(self) -> tuple[Array | None, ...]:
        """The device's copies of all this; on the host graphs ask for it by name."""
        return ()

    @property
    def exhausted(self) -> bool:
        """Whether all planned steps are done."""
        return self._position >= len(self.rates)

    @property
    def rate(self) -> float:
        """The running step's learning rate."""
        return float(self.rates[self.position])

    def _refuse(self, what: str) -> NoReturn:
        raise CaptureError(
            f"something in the step reads its {what} on the host, which a graph would freeze"
        )

    def plan(
        self,
        rates: np.ndarray,
        *,
        dtype: Any,
        n_models: int | None = None,
        order: np.ndarray | None = None,
        fresh_log: bool = True,
    ) -> None:
        """Lay out the next `len(rates)` steps and go to the first.

        Args:
            rates: Their learning rates.
            dtype: That of the losses.
            n_models: K if each step has K losses.
            order: Order of the samples.
            fresh_log: Whether the log is a new array, so that views of the last one keep their
                losses; else it is written over if it has the right size.
        """
        self.rewind()  # until all that takes memory is there
        shape = (len(rates),) if n_models is None else (len(rates), n_models)
        if fresh_log or self.log is None or self.log.shape != shape or self.log.dtype != dtype:
            self.log = self.backend.xp.empty(shape, dtype)
        self.log.fill(np.nan)
        self.order = None if order is None else self.backend.asarray(order)
        self.host_order = order
        self.rates = rates

    def _send_counters(self) -> None:
        """Make the device's copy of number and position that of the host."""

    def rewind(self) -> None:
        """Forget the plan: the next step needs another one."""
        self._position, self.rates = 0, np.empty(0)

    def set_rates(self, rates: np.ndarray) -> None:
        """Change the learning rates of the planned steps."""
        self.rates = rates

    def advance(self, loss: Array | None) -> None:
        """End a step: enter its loss in the log and count. Part of every optimizer's operation."""
        if loss is not None:
            self.log[self.position, ...] = loss
        self.count()

    def count(self, steps: int = 1) -> None:
        """Count a finished step on the host."""
        self._number += steps
        self._position += steps


class Backend(Protocol):
    """What layers, losses and optimizers ask of an array library; see `XpBackend` for each body."""

    name: str
    xp: ModuleType
    graphs: bool
    graphs_unasked: bool
    device: int | None

    def asarray(self, a: Any, dtype: Any = None) -> Array: ...
    def to_numpy(self, a: Array) -> np.ndarray: ...
    def fetch(self, arrays: Sequence[Array]) -> list[np.ndarray]: ...
    def upload(self, host: np.ndarray, out: Array) -> None: ...
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def cast(self, a: Array, dtype: Any) -> Array: ...
    def synchronize(self) -> None: ...
    def activate(self, work: int | None = None) -> contextlib.AbstractContextManager[Any]: ...
    def stream(self) -> Hashable: ...
    def fits(self, nbytes: int) -> bool: ...
    @contextlib.contextmanager
    def watch_memory(self) -> Iterator[Callable[[], tuple[int, int]]]: ...
    def step_state(self) -> StepState: ...
    def feeder(self, sources: Sequence[np.ndarray], batch_size: int) -> Feeder: ...
    def capture(
        self, work: Callable[[], Any], state: StepState, parts: Iterable[object] = ()
    ) -> Graph: ...
    def foreign(self, parts: Iterable[object]) -> str | None: ...
    def places(self, arrays: Iterable[Array | None]) -> Hashable: ...
    def out_of_memory(self, error: BaseException) -> str | None: ...
    def elementwise(self, expression: str, out: Array, **operands: Array | float) -> Array: ...
    def total(self, x: Array, scale: float = 1.0) -> Array: ...
    def erf(self, x: Array) -> Array: ...
    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array: ...
    def affine(
        self, x: Array, weight: Array, bias: Array, out: Array, *, relu: bool = False
    ) -> Array | None: ...
    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array: ...
    def relu(self, x: Array) -> tuple[Array, Array]: ...
    def relu_backward(self, dy: Array, mask: Array) -> Array: ...
    def bias_relu(self, z: Array, bias: Array) -> tuple[Array, Array]: ...
    def bias_relu_backward(
        self, dy: Array, mask: Array, dbias: Array, *, accumulate: bool = False
    ) -> Array: ...
    def softmax(self, x: Array, *, log: bool = False) -> Array: ...
    def softmax_backward(self, dy: Array, y: Array, *, log: bool = False) -> Array: ...
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
    ) -> tuple[Array, Array | None]: ...
    def dropout(
        self, x: Array, p: float, *, seed: int, stream: int, use: int, state: StepState
    ) -> tuple[Array, Array]: ...
    def dropout_backward(self, dy: Array, mask: Array, p: float) -> Array: ...
    def layer_norm(
        self, x: Array, weight: Array | None, bias: Array | None, *, eps: float, centered: bool
    ) -> tuple[Array, Array | None, Array]: ...
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
    ) -> Array | None: ...
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
    ) -> tuple[Array, Array, Array]: ...
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
    ) -> Array | None: ...
    def condition(
        self,
        update: Update,
        *,
        l1: float,
        l2: float,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> Update: ...
    def sgd(self, update: Update, *, momentum: float, nesterov: bool) -> None: ...
    def adam(self, update: Update, *, beta1: float, beta2: float, eps: float) -> None: ...
    def adagrad(self, update: Update, *, lr_decay: float, initial: float, eps: float) -> None: ...
    def rmsprop(self, update: Update, *, alpha: float, eps: float, momentum: float) -> None: ...
    def lion(self, update: Update, *, beta1: float, beta2: float) -> None: ...
    def pieces(
        self, groups: Groups | None, *arrays: Array
    ) -> Iterator[tuple[tuple[Array, ...], float, float]]: ...
    def gather_rows(
        self, sources: Sequence[Array], state: StepState, batch_size: int, n: int
    ) -> list[Array]: ...
    def count_correct(
        self,
        scores: Array,
        labels: Array,
        total: Array,
        *,
        k: int = 1,
        ignore_index: int | None = None,
    ) -> None: ...
    def confusion(
        self, scores: Array, labels: Array, total: Array, *, threshold: float | None = None
    ) -> None: ...
    def add_sums(self, terms: Array, total: Array) -> None: ...


FUNCTIONS = frozenset(
    (
        "abs",
        "erf",
        "exp",
        "expm1",
        "log",
        "log1p",
        "maximum",
        "minimum",
        "sign",
        "sqrt",
        "tanh",
        "where",
    )
)
"""What an expression of `elementwise` may call; NaN goes through all of them."""


@functools.cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, f"<{expression}>", "eval")


def check_operands(expression: str, out: Array, operands: dict[str, Any]) -> None:
    """Check that every array among the operands has the shape and dtype of `out`."""
    for name, operand in operands.items():
        if isinstance(operand, (int, float)):
            continue
        if operand.shape != out.shape:
            raise ValueError(
                f"elementwise ({expression}): expected {name} of shape {out.shape}, "
                f"got {operand.shape}"
            )
        if operand.dtype != out.dtype:
            raise TypeError(
                f"elementwise ({expression}): expected {name} of {out.dtype}, got {operand.dtype}"
            )


# Coefficients of `erf` (Cody 1969, tables II and III), numerator and denominator, highest first.
_ERF_NEAR = (
    (
        *(1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2),
        *(3.77485237685302021e2, 3.20937758913846947e3),
    ),
    (
        *(1.0, 2.36012909523441209e1, 2.44024637934444173e2),
        *(1.28261652607737228e3, 2.84423683343917062e3),
    ),
)
_ERF_FAR = (
    (
        *(2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0),
        *(6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2),
        *(1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    ),
    (
        *(1.0, 1.57449261107098347e1, 1.17693950891312499e2),
        *(5.37181101862009858e2, 1.62138957456669019e3, 3.29079923573345963e3),
        *(4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
    ),
)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Horner's scheme; the first coefficient is that of the highest power."""
    total = x * coefficients[0]
    for c in coefficients[1:-1]:
        total += c
        total *= x
    total += coefficients[-1]
    return total


class Groups:
    """Which elements of the flat vector are updated how.

    Attributes:
        runs: `(start, stop, lr_scale, decay_scale)` of each stretch of equal treatment, in order.
        stretches: The same, `(n_runs, 4)` float64 on the host, where the C kernels read it.
        ids: uint8 group of each 64-element block, on the device.
        table: `(n_groups, 2)` float64 rows `(lr_scale, decay_scale)`, on the device.
    """

    BLOCK = 64

    def __init__(self, runs: Sequence[tuple[int, int, float, float]], backend: Backend) -> None:
        self.runs = tuple(runs)
        self.stretches = np.array(self.runs, np.float64).reshape(-1, 4)
        settings = list(dict.fromkeys(run[2:] for run in runs))
        if len(settings) > 256:
            raise ValueError(
                f"Groups: expected at most 256 different settings, got {len(settings)}"
            )
        blocks = np.concatenate(
            [
                np.full((stop - start) // self.BLOCK, settings.index((scale, decay)), np.uint8)
                for start, stop, scale, decay in runs
            ]
            or [np.empty(0, np.uint8)]
        )
        self.ids = backend.asarray(blocks)
        self.table = backend.asarray(np.array(settings, np.float64).reshape(-1, 2))


class _Rows:
    """The `Feeder` of a backend whose device is the host."""

    def __init__(self, sources: Sequence[np.ndarray]) -> None:
        self._sources = sources

    def send(self, index: np.ndarray) -> list[Array]:
        return [source[index] for source in self._sources]


class Update(NamedTuple):
    """What every optimizer's operation works on: one step of the flat parameter vector.

    The C kernels read the fields by their places.

    Attributes:
        value: `(K, P)`, one row per model; written.
        grad: `(K, P)`; written by `condition` only.
        slots: The rule's own state, `(K, P)` each, in its order; written. None is one not in use.
        groups: Which elements are updated how; frozen ones (`lr_scale` 0) keep their bits.
        state: Number and learning rate of the step; the operation ends with its `advance(loss)`.
        loss: Entered in the loss log, `()` or `(K,)`.
        scale: Factor of each model's gradient, `(K,)`; set by `condition`.
        decay: `decay * decay_scale * value` is added to the gradient, after `scale`.
        shrink: Before that, `value *= 1 - lr * shrink * decay_scale`.
    """

    value: Array
    grad: Array
    slots: tuple[Array | None, ...]
    groups: Groups
    state: StepState
    loss: Array | None = None
    scale: Array | None = None
    decay: float = 0.0
    shrink: float = 0.0


class XpBackend:
    """Every operation in plain xp, with `xp` NumPy or CuPy.

    Attributes:
        graphs: Whether `capture` can work.
        graphs_unasked: Whether graphs cost nothing and change nothing, so that `fit` makes them
            unasked; and anew each time, since they hold its data.
        device: Number of the device; None for the host.

    Arrays named `out`, `total`, `dweight`, `dbias`, `z` and `running_...` are written, of an
    optimizer the parameters and its own state, by `condition` the gradient; no other argument ever
    is. Masks are opaque to callers.
    """

    graphs = False
    graphs_unasked = False
    device: int | None = None
    piece = 2**16
    """Elements that an optimizer of several elementwise passes takes at a time."""

    def __init__(self, xp: ModuleType, name: str | None = None) -> None:
        self.xp = self._library = xp
        self.name = name or f"reference ({xp.__name__})"

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    # ---- arrays --------------------------------------------------------------------------------

    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """`a` as an array of this backend, C-contiguous: the only way in."""
        return self.xp.asarray(a, dtype=dtype, order="C")

    def to_numpy(self, a: Array) -> np.ndarray:
        """`a` on the host: the only way out. Waits for the device."""
        return np.asarray(a)

    def fetch(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        """Several arrays on the host, the caller's own; waits for the device once."""
        return [self.to_numpy(a).copy() for a in arrays]

    def upload(self, host: np.ndarray, out: Array) -> None:
        """Copy a host array to `out`, of its shape and dtype, without waiting."""
        out[...] = host

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array not initialized, from the running step's arena, else a fresh one."""
        arena = running.arena
        if (
            arena is not None
            and arena.xp is self._library
            and (arena.device is None or arena.device == self.device)
        ):
            return arena.empty(shape, dtype)
        return self.xp.empty(shape, dtype)

    def cast(self, a: Array, dtype: Any) -> Array:
        """`a` in this dtype: itself if it has it, else a copy in an `empty` array."""
        if a.dtype == dtype:
            return a
        out = self.empty(a.shape, np.dtype(dtype))
        self.xp.copyto(out, a, casting="unsafe")
        return out

    def synchronize(self) -> None:
        """Wait until the device has done everything it was asked."""

    def activate(self, work: int | None = None) -> contextlib.AbstractContextManager[Any]:
        """A context in which this backend's device is the current one.

        Args:
            work: Multiply-adds of a forward pass in it. A backend on the CPU chooses its number of
                threads by them, until the context ends; by default it leaves them as they are.
        """
        return contextlib.nullcontext()

    def stream(self) -> Hashable:
        """What tells the stream that work is now queued on from others; None without any."""
        return None

    def fits(self, nbytes: int) -> bool:
        """Whether a data set of this size should live on the device."""
        return True

    @contextlib.contextmanager
    def watch_memory(self) -> Iterator[Callable[[], tuple[int, int]]]:
        """A context whose function tells bytes allocated: now, and most since it was last asked.

        On the host these are tracemalloc's, so Python's objects count too. Where that traces
        already, it goes on, and the peak it knows stays.
        """
        tracing = tracemalloc.is_tracing()
        if not tracing:
            tracemalloc.start()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()

        def read() -> tuple[int, int]:
            found = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            return found

        try:
            yield read
        finally:
            if tracing:  # whoever traces finds the peak as it was: no page of this is touched
                np.empty(max(highest - tracemalloc.get_traced_memory()[0], 0), np.uint8)
            else:
                tracemalloc.stop()

    def step_state(self) -> StepState:
        """A fresh `StepState`."""
        return StepState(self)

    def feeder(self, sources: Sequence[np.ndarray], batch_size: int) -> Feeder:
        """What sends batches of at most `batch_size` rows of host arrays to the device."""
        return _Rows(sources)

    def capture(
        self, work: Callable[[], Any], state: StepState, parts: Iterable[object] = ()
    ) -> Graph:
        """A graph of what `work` does on the device, which its first `launch` will have done.

        `work` ran before with the same arrays, so that it has compiled and allocated what it needs.

        Args:
            work: One training step, that of `state`. What it does on the host happens.
            state: Counts the step.
            parts: What the step is made of: layers, loss, optimizer, metrics.

        Raises:
            CaptureError: The step can't be captured.
        """
        raise CaptureError(f"backend {self.name!r} has no graphs")

    def foreign(self, parts: Iterable[object]) -> str | None:
        """The name of the first layer, loss, metric or method whose work a graph may lack."""
        return None

    def places(self, arrays: Iterable[Array | None]) -> Hashable:
        """Tells whether a graph would find these arrays where it was captured with them."""
        return tuple([id(a) for a in arrays])

    def out_of_memory(self, error: BaseException) -> str | None:
        """What an error says about the device's memory, if that is what it is about; else None."""
        return None

    # ---- element by element ---------------------------------------------------------------------

    def elementwise(self, expression: str, out: Array, **operands: Array | float) -> Array:
        """`out[...] = expression`, element by element; one launch on CuPy.

        Args:
            expression: One line that means the same in Python and in CUDA C++: operands by name,
                numbers, `+ - * /`, comparisons, and calls of `FUNCTIONS`. Both sides of a `where`
                are computed, so neither may overflow.
            out: Written. May be one of the operands.
            operands: Arrays of the shape and dtype of `out`, and Python numbers.

        Raises:
            ValueError: An array's shape isn't that of `out`.
            TypeError: An array's dtype isn't that of `out`.
        """
        check_operands(expression, out, operands)
        out[...] = eval(_compiled(expression), self._functions, operands)
        return out

    @functools.cached_property
    def _functions(self) -> dict[str, Any]:
        names = {name: getattr(self, name, None) or getattr(self.xp, name) for name in FUNCTIONS}
        # CuPy makes its ufuncs when first used, and imports with the builtins of whoever calls them
        return {"__builtins__": {"__import__": __import__}} | names

    def total(self, x: Array, scale: float = 1.0) -> Array:
        """`scale` times the sum of all elements, `()`."""
        out = self.empty((), x.dtype)
        return self.xp.multiply(self.xp.sum(x, out=out), scale, out=out)

    def erf(self, x: Array) -> Array:
        """The error function, to a few ulp: `2 / sqrt(pi)` times the integral of exp(-t^2) to x.

        Cody 1969, "Rational Chebyshev approximations for the error function": x times a quotient
        of polynomials in x^2 up to 0.46875, beyond it `1 - exp(-x^2)` times one in |x|. His third
        range is left out: from 4 on `1 - erf(x) < 2e-8`, of which the second gives enough digits.
        """
        xp = self.xp
        a = xp.minimum(xp.abs(x), 6.0)  # where erf rounds to 1
        z = a * a
        near = a * _polynomial(_ERF_NEAR[0], z) / _polynomial(_ERF_NEAR[1], z)
        far = _polynomial(_ERF_FAR[0], a) / _polynomial(_ERF_FAR[1], a)
        return xp.copysign(xp.where(a <= 0.46875, near, 1 - xp.exp(-z) * far), x)

    # ---- linear algebra ------------------------------------------------------------------------

    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array:
        """`out = a @ b`, or `out += a @ b`: the one door to BLAS and cuBLAS.

        Args:
            a: `(..., M, K)`; transposes are views (`x.T`), not copies.
            b: `(..., K, N)`.
            out: `(..., M, N)`, written.
            accumulate: Add to `out` instead of overwriting it.
        """
        xp = self.xp
        if not accumulate:
            return xp.matmul(a, b, out=out)
        product = xp.matmul(a, b, out=self.empty(out.shape, out.dtype))
        return xp.add(out, product, out=out)

    def affine(
        self, x: Array, weight: Array, bias: Array, out: Array, *, relu: bool = False
    ) -> Array | None:
        """`out = x @ weight + bias`, or the `relu` of that, whose mask is returned."""
        self.gemm(x, weight, out)
        if relu:
            return self.bias_relu(out, bias)[1]
        self.xp.add(out, bias[..., None, :], out=out)
        return None

    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array:
        """Sum of `dy` `(..., N, n)` over its rows, into `out` `(..., n)`."""
        xp = self.xp
        if not accumulate:
            return xp.sum(dy, axis=-2, out=out)
        total = xp.sum(dy, axis=-2, out=self.empty(out.shape, out.dtype))
        return xp.add(out, total, out=out)

    # ---- ReLU ----------------------------------------------------------------------------------

    def relu(self, x: Array) -> tuple[Array, Array]:
        """`(max(x, 0), mask)`; NaN stays NaN. The mask is true where `x > 0`."""
        xp = self.xp
        mask = xp.greater(x, 0, out=self.empty(x.shape, bool))
        return xp.maximum(x, 0, out=self.empty(x.shape, x.dtype)), mask

    def relu_backward(self, dy: Array, mask: Array) -> Array:
        """`dy` where the mask is true, else 0: a selection, so NaN and inf in `dy` don't leak."""
        dx = self.empty(dy.shape, dy.dtype)
        dx.fill(0)
        self.xp.copyto(dx, dy, where=mask)
        return dx

    def bias_relu(self, z: Array, bias: Array) -> tuple[Array, Array]:
        """`relu(z + bias)` for rows `z` `(..., N, n)`; `z` is overwritten with the result."""
        xp = self.xp
        xp.add(z, bias[..., None, :], out=z)
        mask = xp.greater(z, 0, out=self.empty(z.shape, bool))
        return xp.maximum(z, 0, out=z), mask

    def bias_relu_backward(
        self, dy: Array, mask: Array, dbias: Array, *, accumulate: bool = False
    ) -> Array:
        """`relu_backward`, and its sum over rows into `dbias`."""
        dz = self.relu_backward(dy, mask)
        self.bias_grad(dz, dbias, accumulate=accumulate)
        return dz

    # ---- losses and metrics --------------------------------------------------------------------

    def softmax(self, x: Array, *, log: bool = False) -> Array:
        """`y = exp(x) / sum(exp(x))` over the last axis, or its logarithm `x - log(sum(exp(x)))`.

        The row's maximum is subtracted first, which changes nothing but keeps exp finite.
        """
        xp = self.xp
        row, y = self.empty((*x.shape[:-1], 1), x.dtype), self.empty(x.shape, x.dtype)
        powers = self.empty(x.shape, x.dtype) if log else y
        xp.max(x, axis=-1, keepdims=True, out=row)
        xp.subtract(x, row, out=y)
        xp.exp(y, out=powers)
        xp.sum(powers, axis=-1, keepdims=True, out=row)
        if log:
            return xp.subtract(y, xp.log(row, out=row), out=y)
        return xp.divide(y, row, out=y)

    def softmax_backward(self, dy: Array, y: Array, *, log: bool = False) -> Array:
        """`y * (dy - sum(dy * y))`, or of the logarithm `dy - exp(y) * sum(dy)`."""
        xp = self.xp
        row, dx = self.empty((*dy.shape[:-1], 1), dy.dtype), self.empty(dy.shape, dy.dtype)
        if log:
            xp.sum(dy, axis=-1, keepdims=True, out=row)
            xp.multiply(xp.exp(y, out=dx), row, out=dx)
            return xp.subtract(dy, dx, out=dx)
        xp.multiply(dy, y, out=dx)
        xp.sum(dx, axis=-1, keepdims=True, out=row)
        xp.subtract(dy, row, out=dx)
        return xp.multiply(dx, y, out=dx)

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
        """Mean negative log-likelihood of `softmax(logits)`, and its gradient, in one pass.

        With `s = z - max(z)`: `l = log(sum(exp(s))) - s[label]`, which keeps small losses that
        `max + log(sum) - z[label]` rounds away, and `dl/dz = softmax(z) - onehot(label)`. Soft
        targets, smoothing and class weights make it a sum over classes with terms q:
        `l = sum(q) log(sum(exp(s))) - sum(q s)` and `dl/dz = sum(q) softmax(z) - q`.

        Args:
            logits: `(N, C)`, or `(K, N, C)` for K models.
            target: Integer labels `(N,)` or `(K, N)`; a label outside 0..C-1 makes its loss and
                the gradient of its row NaN. Or soft targets `(N, C)` or `(K, N, C)`, of the dtype
                of the logits.
            weight: One weight per sample, `(N,)` or `(K, N)`.
            class_weight: `(C,)`, of the dtype of the logits; factor of each class's term.
            label_smoothing: Share of each target that is spread evenly over the classes.
            ignore_index: A sample with this label counts for nothing; nor does one whose soft
                target lies wholly on this class.
            normalizer: Replaces the denominator, the sum over samples of weight times class weight
                of the label; of a soft target, the mean of the class weights under it.
            grad_scale: Factor of the gradient only.
            need_gradient: Whether to compute the gradient.

        Returns:
            The loss, `()` or `(K,)`, and `grad_scale * dloss/dlogits` or None.
        """
        xp, dtype = self.xp, logits.dtype
        n_classes = logits.shape[-1]
        rows = logits.shape[:-1]
        soft = target.dtype.kind == "f"
        shifted = self.empty(logits.shape, dtype)
        xp.subtract(logits, logits.max(axis=-1, keepdims=True), out=shifted)
        if soft:
            valid, in_row = xp.ones(rows, bool), None
        else:
            labels = target.astype(np.int64, copy=False)
            valid = labels.view(np.uint64) < n_classes  # a negative label is a huge unsigned one
            in_row = xp.where(valid, labels, 0)
            at_label = xp.arange(0, shifted.size, n_classes).reshape(rows) + in_row  # flat index
        if weight is not None:
            weight = weight.astype(dtype, copy=False)
        if ignore_index is not None:
            weight = self._not_ignored(target, weight, ignore_index, n_classes, dtype)
        class_of_row = None
        if class_weight is not None:
            class_of_row = self._class_of_row(target, in_row, class_weight)
        plain = weight is None and class_of_row is None and normalizer is None
        factor = self._row_factors(valid, rows[-1], dtype, weight, class_of_row, normalizer)
        if class_of_row is not None:
            factor = xp.where(valid & (class_of_row == 0), dtype.type(0), factor)
        terms = None
        if soft or label_smoothing:
            terms = self._class_terms(target, in_row, n_classes, label_smoothing, dtype)
            if class_weight is not None:
                xp.multiply(terms, class_weight, out=terms)
            mass = terms.sum(axis=-1)
            picked = (terms * xp.where(terms == 0, dtype.type(0), shifted)).sum(axis=-1)
        else:
            picked = xp.take(shifted, at_label)
            if class_of_row is not None:
                factor = factor * class_of_row
        exponential = xp.exp(shifted, out=shifted)
        total = exponential.sum(axis=-1, keepdims=True)
        log_total = xp.log(total[..., 0])
        losses = log_total - picked if terms is None else mass * log_total - picked
        if not plain:
            losses = xp.where(factor == 0, dtype.type(0), losses)  # 0 * inf is NaN
        loss = xp.sum(losses * factor, axis=-1, out=self.empty(rows[:-1], dtype))
        if not need_gradient:
            return loss, None
        gradient = xp.divide(exponential, total, out=exponential)
        if terms is None:
            gradient.reshape(-1)[at_label] -= 1
        else:
            xp.multiply(gradient, mass[..., None], out=gradient)
            xp.subtract(gradient, terms, out=gradient)
        if grad_scale is not None:
            factor = factor * xp.asarray(grad_scale, dtype)[..., None]
        factor = factor[..., None]
        xp.multiply(gradient, factor, out=gradient)
        if not plain:
            xp.copyto(gradient, 0, where=factor == 0)
        return loss, gradient

    def _not_ignored(
        self,
        target: Array,
        weight: Array | None,
        ignore_index: int,
        n_classes: int,
        dtype: Any,
    ) -> Array | None:
        """The sample weights, 0 where the target is to be ignored; None if all are 1."""
        xp = self.xp
        if target.dtype.kind != "f":
            ignored = target == ignore_index
        elif 0 <= ignore_index < n_classes:
            ignored = (target[..., ignore_index] != 0) & ((target != 0).sum(axis=-1) == 1)
        else:
            return weight
        return xp.where(ignored, dtype.type(0), dtype.type(1) if weight is None else weight)

    def _class_of_row(self, target: Array, in_row: Array | None, class_weight: Array) -> Array:
        """The class weight of each label; of a soft target the mean under it, 0 for zeros."""
        xp = self.xp
        if in_row is not None:
            return xp.take(class_weight, in_row)
        mass = target.sum(axis=-1)
        return (target * class_weight).sum(axis=-1) / xp.where(mass == 0, 1, mass)

    def _class_terms(
        self, target: Array, in_row: Array | None, n_classes: int, smoothing: float, dtype: Any
    ) -> Array:
        """Smoothed targets, one row per target: `(1 - smoothing) y + smoothing / C`."""
        xp = self.xp
        if in_row is None:
            terms = self.empty(target.shape, dtype)
            xp.multiply(target, 1 - smoothing, out=terms)
            return xp.add(terms, smoothing / n_classes, out=terms) if smoothing else terms
        terms = self.empty((*in_row.shape, n_classes), dtype)
        terms.fill(smoothing / n_classes)
        starts = xp.arange(0, terms.size, n_classes).reshape(in_row.shape)
        terms.reshape(-1)[starts + in_row] += 1 - smoothing
        return terms

    def _row_factors(
        self,
        valid: Array,
        n: int,
        dtype: Any,
        weight: Array | None,
        class_of_row: Array | None,
        normalizer: float | Array | None,
    ) -> Array:
        """`w_i / D` for each row; D is the sum of `w_i` times class weight, or the normalizer.

        Where D is 0 it is 0. A row without a valid label gets NaN, unless its weight is 0.
        """
        xp, nan = self.xp, dtype.type(np.nan)
        if weight is None and class_of_row is None and normalizer is None:
            return xp.where(valid, dtype.type(1 / max(n, 1)), nan)
        if normalizer is not None:
            denominator = xp.asarray(normalizer, dtype)[..., None]
        else:
            counts = [a for a in (weight, class_of_row) if a is not None]
            product = counts[0] if len(counts) == 1 else counts[0] * counts[1]
            denominator = product.sum(axis=-1, keepdims=True, dtype=dtype)
        zero = denominator == 0
        factor = xp.where(zero, dtype.type(0), 1 / xp.where(zero, dtype.type(1), denominator))
        if weight is not None:
            factor = weight * factor
        return xp.where(valid | (factor == 0), factor, nan)

    def count_correct(
        self,
        scores: Array,
        labels: Array,
        total: Array,
        *,
        k: int = 1,
        ignore_index: int | None = None,
    ) -> None:
        """Add to `total` how many rows have their label among the k largest scores.

        Of equal scores those of lower classes count as larger; NaN is larger than any number.

        Args:
            scores: `(N, C)` or `(K, N, C)`.
            labels: int64 `(N,)` or `(K, N)`; one outside 0..C-1 is never right.
            total: int64 `()` or `(K,)`, written. With `ignore_index` `(2,)` or `(2, K)`: those that
                are right, and those that count.
            k: At least 1.
            ignore_index: Rows with this label count for nothing.
        """
        xp = self.xp
        right = scores.argmax(axis=-1) == labels if k == 1 else self._among(k, scores, labels)
        if ignore_index is None:
            xp.add(total, right.sum(axis=-1), out=total)
            return
        counts = labels != ignore_index
        for i, hits in enumerate((right & counts, counts)):
            xp.add(total[i, ...], hits.sum(axis=-1), out=total[i, ...])

    def _among(self, k: int, scores: Array, labels: Array) -> Array:
        """Whether fewer than k scores of a row come before the label's."""
        xp, n_classes = self.xp, scores.shape[-1]
        valid = (labels >= 0) & (labels < n_classes)
        at = xp.broadcast_to(xp.where(valid, labels, 0), scores.shape[:-1])[..., None]
        score = xp.take_along_axis(scores, at, axis=-1)
        nan = score != score
        level = (scores == score) | (nan & (scores != scores))
        before = ~(nan | (scores <= score)) | (level & (xp.arange(n_classes) < at))
        return valid & (before.sum(axis=-1) < k)

    def confusion(
        self, scores: Array, labels: Array, total: Array, *, threshold: float | None = None
    ) -> None:
        """Add to `total[..., i, j]` how many rows of label i are predicted to be of class j.

        Args:
            scores: `(N, C)` or `(K, N, C)`: the prediction is the first of the largest. Or the
                predictions as int64, `(N,)` or `(K, N)`. Or, with a threshold, one score, which is
                of class 1 where it is above.
            labels: int64 `(N,)` or `(K, N)`. A row whose label or prediction is outside 0..C-1
                isn't counted.
            total: int64 `(C, C)` or `(K, C, C)`, written.
            threshold: Compared in the dtype of the scores.
        """
        xp, c = self.xp, total.shape[-1]
        if threshold is not None:
            predicted = (scores > scores.dtype.type(threshold)).astype(np.int64)
        else:
            predicted = scores.argmax(axis=-1) if scores.dtype.kind == "f" else scores
        valid = (labels >= 0) & (labels < c) & (predicted >= 0) & (predicted < c)
        cell = xp.where(valid, labels * c + predicted, 0)
        if total.ndim == 3:
            cell = cell + xp.arange(len(total))[:, None] * c**2
        # CuPy adds uint64 by atomics, but not int64; integers come out the same in any order
        flat = total.reshape(-1).view(np.uint64)
        xp.add.at(flat, cell.reshape(-1), valid.reshape(-1).astype(np.uint64))

    def add_sums(self, terms: Array, total: Array) -> None:
        """Add to `total`, float64 `(..., n)`, the sum in float64 of the rows of `terms`.

        Args:
            terms: `(..., N, n)`.
            total: Written.
        """
        if terms.shape[-1] == 1:  # NumPy adds faster along the last axis
            sums = terms[..., 0].sum(axis=-1, keepdims=True, dtype=np.float64)
        else:
            sums = terms.sum(axis=-2, dtype=np.float64)
        self.xp.add(total, sums, out=total)

    # ---- dropout -------------------------------------------------------------------------------

    def dropout(
        self, x: Array, p: float, *, seed: int, stream: int, use: int, state: StepState
    ) -> tuple[Array, Array]:
        """`(x / (1 - p) where kept, else 0; mask)`.

        Element i in row-major order is dropped where word i of the Philox stream
        `(seed, stream, use, state.number)` is below `p`; see `nnx.backends.philox`.
        """
        random = words(seed, stream, x.size, use=use, step=state.number)
        dropped = self.asarray(random < drop_threshold(p)).reshape(x.shape)
        return self.dropout_backward(x, dropped, p), dropped

    def dropout_backward(self, dy: Array, mask: Array, p: float) -> Array:
        """`dy / (1 - p)` where it was kept, else 0."""
        scale = 1 / (1 - p) if p < 1 else 1.0  # at p = 1 nothing is kept
        dx = self.xp.multiply(dy, scale, out=self.empty(dy.shape, dy.dtype))
        self.xp.copyto(dx, 0, where=mask)
        return dx

    # ---- normalization -------------------------------------------------------------------------

    def layer_norm(
        self, x: Array, weight: Array | None, bias: Array | None, *, eps: float, centered: bool
    ) -> tuple[Array, Array | None, Array]:
        """`y = (x - mean) * rstd * weight + bias`, the statistics over the last axis.

        `rstd = 1 / sqrt(mean((x - mean)^2) + eps)`, and 0 in the place of the mean if not
        centered. E[x^2] - E[x]^2 would cancel, so the squares are those of the differences.

        Args:
            x: `(N, C)`, or `(K, N, C)` for K models.
            weight: `(C,)` or `(K, C)`, or None for 1.
            bias: The same, or None for 0.
            eps: Added to the variance.
            centered: Whether the mean is subtracted.

        Returns:
            `(y, mean, rstd)`, the latter two `(N,)` or `(K, N)`; no mean if not centered.
        """
        mean = self._mean(x, -1) if centered else None
        y, variance = self._spread(x, mean, -1)
        rstd = self._rstd(variance, eps)
        self._scale(y, rstd, weight, bias)
        return y, None if mean is None else mean[..., 0], rstd[..., 0]

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
        """The gradients of `layer_norm`: dx, and sums over samples into `dweight` and `dbias`.

        With `xhat = (x - mean) * rstd` and `g = dy * weight`: `dbias = sum(dy)`, `dweight =
        sum(dy * xhat)`, `dx = rstd * (g - mean(g) - xhat * mean(g * xhat))`, the means over
        features and the first of them only if centered.

        Args:
            dy: Gradient of y.
            x: What `layer_norm` got.
            mean: What it returned.
            rstd: The same.
            weight: What it got.
            dweight: Written, or None.
            dbias: Written, or None.
            accumulate: Whether to add to `dweight` and to `dbias` instead of overwriting them.
            need_dx: Whether to compute dx.
        """
        xp = self.xp
        rstd = rstd[..., None]
        xhat = self._xhat(x, None if mean is None else mean[..., None], rstd)
        if dbias is not None:
            self.bias_grad(dy, dbias, accumulate=accumulate[1])
        work = self.empty(dy.shape, dy.dtype)
        if dweight is not None:
            xp.multiply(dy, xhat, out=work)
            self.bias_grad(work, dweight, accumulate=accumulate[0])
        if not need_dx:
            return None
        dx = self.empty(dy.shape, dy.dtype)
        g = dy if weight is None else xp.multiply(dy, weight[..., None, :], out=dx)
        along = self._mean(xp.multiply(g, xhat, out=work), -1)
        if mean is not None:
            g = xp.subtract(g, self._mean(g, -1), out=dx)
        xp.subtract(g, xp.multiply(xhat, along, out=work), out=dx)
        return xp.multiply(dx, rstd, out=dx)

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
        """`y = (x - mean) * rstd * weight + bias`, the statistics over the samples.

        Args:
            x: `(N, C)`, or `(K, N, C)` for K models.
            weight: `(C,)` or `(K, C)`, or None for 1.
            bias: The same, or None for 0.
            running_mean: `(C,)` or `(K, C)`. In training it becomes `(1 - momentum) * itself +
                momentum * mean`; in evaluation it is the mean.
            running_var: The same of the variance: the unbiased one, divided by N - 1, while
                `rstd = 1 / sqrt(variance + eps)` has the one divided by N.
            eps: Added to the variance.
            momentum: Share of the new in the running statistics.
            training: Whether the statistics are those of x, which takes two samples or more.

        Returns:
            `(y, mean, rstd)`, the latter two new arrays `(C,)` or `(K, C)`.
        """
        xp, n = self.xp, x.shape[-2]
        mean = self.empty(running_mean.shape, x.dtype)
        if training:
            measured = self._mean(x, -2)
            y, variance = self._spread(x, measured, -2)
            mean[...], variance = measured[..., 0, :], variance[..., 0, :]
            part = self.empty(mean.shape, x.dtype)
            for running, new, share in (
                (running_mean, mean, momentum),
                (running_var, variance, momentum * n / (n - 1)),
            ):
                xp.multiply(running, 1 - momentum, out=running)
                xp.add(running, xp.multiply(new, share, out=part), out=running)
        else:
            mean[...], variance = running_mean, running_var
            y = xp.subtract(x, mean[..., None, :], out=self.empty(x.shape, x.dtype))
        rstd = self._rstd(variance, eps)
        self._scale(y, rstd[..., None, :], weight, bias)
        return y, mean, rstd

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
        """The gradients of `batch_norm`: dx, and sums over samples into `dweight` and `dbias`.

        With `xhat = (x - mean) * rstd`: `dbias = sum(dy)`, `dweight = sum(dy * xhat)`, and since
        the weight is the same for all samples `dx = rstd * weight * (dy - dbias / N - xhat *
        dweight / N)`; in evaluation, where the statistics don't depend on x, `rstd * weight * dy`.

        Args:
            dy: Gradient of y.
            x: What `batch_norm` got.
            mean: What it returned.
            rstd: The same.
            weight: What it got.
            dweight: Written, or None.
            dbias: Written, or None.
            training: What `batch_norm` got.
            accumulate: Whether to add to `dweight` and to `dbias` instead of overwriting them.
            need_dx: Whether to compute dx.
        """
        xp, n = self.xp, dy.shape[-2]
        xhat = self._xhat(x, mean[..., None, :], rstd[..., None, :])
        work = xp.multiply(dy, xhat, out=self.empty(dy.shape, dy.dtype))
        totals = []
        for terms, out, add in ((work, dweight, accumulate[0]), (dy, dbias, accumulate[1])):
            total = self.bias_grad(terms, self.empty(rstd.shape, dy.dtype))
            if out is not None and add:
                xp.add(out, total, out=out)
            elif out is not None:
                out[...] = total
            totals.append(total[..., None, :])
        if not need_dx:
            return None
        factor = self.empty(rstd.shape, dy.dtype)
        xp.multiply(rstd, 1 if weight is None else weight, out=factor)
        if not training:
            return xp.multiply(dy, factor[..., None, :], out=work)
        along, shift = (xp.divide(total, n, out=total) for total in totals)
        dx = xp.subtract(dy, shift, out=work)
        xp.subtract(dx, xp.multiply(xhat, along, out=xhat), out=dx)
        return xp.multiply(dx, factor[..., None, :], out=dx)

    def _mean(self, a: Array, axis: int) -> Array:
        """The mean along an axis, which is kept."""
        shape = list(a.shape)
        shape[axis] = 1
        out = self.empty(tuple(shape), a.dtype)
        return self.xp.mean(a, axis=axis, keepdims=True, out=out)

    def _spread(self, x: Array, mean: Array | None, axis: int) -> tuple[Array, Array]:
        """`(x - mean, the mean of its square along an axis)`; the mean is 0 if None."""
        xp = self.xp
        difference = self.empty(x.shape, x.dtype)
        if mean is None:
            difference[...] = x
        else:
            xp.subtract(x, mean, out=difference)
        square = xp.multiply(difference, difference, out=self.empty(x.shape, x.dtype))
        return difference, self._mean(square, axis)

    def _rstd(self, variance: Array, eps: float) -> Array:
        xp = self.xp
        out = xp.add(variance, eps, out=self.empty(variance.shape, variance.dtype))
        return xp.divide(1, xp.sqrt(out, out=out), out=out)

    def _scale(self, y: Array, rstd: Array, weight: Array | None, bias: Array | None) -> None:
        """`y = y * rstd * weight + bias` in place."""
        xp = self.xp
        xp.multiply(y, rstd, out=y)
        if weight is not None:
            xp.multiply(y, weight[..., None, :], out=y)
        if bias is not None:
            xp.add(y, bias[..., None, :], out=y)

    def _xhat(self, x: Array, mean: Array | None, rstd: Array) -> Array:
        """`(x - mean) * rstd`."""
        xp = self.xp
        xhat = self.empty(x.shape, x.dtype)
        difference = x if mean is None else xp.subtract(x, mean, out=xhat)
        return xp.multiply(difference, rstd, out=xhat)

    # ---- optimizers: one operation over the flat parameter vector ------------------------------

    def condition(
        self,
        update: Update,
        *,
        l1: float,
        l2: float,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> Update:
        """Penalize and clip the gradient of an update, before an optimizer's own operation.

        In place `grad += decay_scale * (l1 * sign(value) + l2 * value)`, then each element is
        limited to `[-clip_value, clip_value]`. A factor 0 adds nothing, None doesn't clip. Frozen
        elements count as having no gradient, and theirs is left alone.

        Returns:
            The update, with `clip_norm` its `scale` set to `min(1, clip_norm / (norm + 1e-6))`. The
            Euclidean norm is that of each model, its squares added in float64.
        """
        xp, value, grad = self.xp, update.value, update.grad
        work = self._space(value, value.dtype)
        wide = None if clip_norm is None else self._space(value, np.float64)
        square = xp.zeros(len(value), np.float64)
        for (w, g), lr_scale, decay_scale in self.pieces(update.groups, value, grad):
            if lr_scale == 0:
                continue
            cut = np.s_[:, : w.shape[1]]
            if l1 * decay_scale:  # 0 * inf is NaN
                sign = xp.sign(w, out=work[cut])
                xp.add(g, xp.multiply(sign, l1 * decay_scale, out=sign), out=g)
            if l2 * decay_scale:
                xp.add(g, xp.multiply(w, l2 * decay_scale, out=work[cut]), out=g)
            if clip_value is not None:
                xp.clip(g, -clip_value, clip_value, out=g)
            if wide is not None:
                squares = wide[cut]
                xp.copyto(squares, g)
                square += xp.multiply(squares, squares, out=squares).sum(axis=-1)
        if clip_norm is None:
            return update
        scale = self.empty((len(value),), value.dtype)
        scale[...] = xp.minimum(clip_norm / (xp.sqrt(square) + 1e-6), 1)
        return update._replace(scale=scale)

    def sgd(self, update: Update, *, momentum: float, nesterov: bool) -> None:
        """One step of SGD; the slot is a velocity, or None without momentum.

        `velocity = momentum * velocity + g`, and `value` goes down by `lr * velocity`, with
        Nesterov by `lr * (g + momentum * velocity)`.
        """
        xp = self.xp
        for w, g, (u,), work, lr in self._pieces(update):
            step = g
            if u is not None:
                xp.multiply(u, momentum, out=u)
                xp.add(u, g, out=u)
                step = xp.add(g, xp.multiply(u, momentum, out=work), out=work) if nesterov else u
            self._descend(w, step, lr, work)
        update.state.advance(update.loss)

    def adam(self, update: Update, *, beta1: float, beta2: float, eps: float) -> None:
        """One step of Adam; the slots are m, v and, for AMSGrad, the largest v so far.

        Kingma and Ba 2015, algorithm 1, with PyTorch's order of operations:
        `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`, and with
        `t = state.number + 1` `value` goes down by
        `lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`; for AMSGrad with the
        largest v under the root.
        """
        xp, t = self.xp, update.state.number + 1
        correction1 = 1 - beta1**t
        correction2 = (1 - beta2**t) ** 0.5
        for w, g, (m, v, v_max), work, lr in self._pieces(update):
            self._average(m, g, beta1, work)
            self._average(v, xp.multiply(g, g, out=work), beta2, work)
            if v_max is not None:
                v = xp.maximum(v_max, v, out=v_max)
            xp.sqrt(v, out=work)
            xp.divide(work, correction2, out=work)
            xp.add(work, eps, out=work)
            xp.divide(m, work, out=work)
            self._descend(w, work, lr / correction1, work)
        update.state.advance(update.loss)

    def adagrad(self, update: Update, *, lr_decay: float, initial: float, eps: float) -> None:
        """One step of AdaGrad; the slot is the sum of squares.

        `sum = sum + g^2`, and with `t = state.number` `value` goes down by
        `lr / (1 + t lr_decay) * g / (sqrt(sum + initial) + eps)`.
        """
        xp, slower = self.xp, 1 + update.state.number * lr_decay
        for w, g, (s,), work, lr in self._pieces(update):
            xp.add(s, xp.multiply(g, g, out=work), out=s)
            xp.sqrt(xp.add(s, initial, out=work), out=work)
            xp.add(work, eps, out=work)
            xp.divide(g, work, out=work)
            self._descend(w, work, lr / slower, work)
        update.state.advance(update.loss)

    def rmsprop(self, update: Update, *, alpha: float, eps: float, momentum: float) -> None:
        """One step of RMSProp; the slots are v, and m if centered, and u with momentum.

        `v = alpha v + (1 - alpha) g^2`, `d = g / (sqrt(v) + eps)`, and `value` goes down by
        `lr * d`. Centered, `m = alpha m + (1 - alpha) g`, and `max(v - m^2, 0)` is under the root.
        With momentum, `u = momentum * u + d` and `value` goes down by `lr * u`.
        """
        xp = self.xp
        for w, g, (v, m, u), work, lr in self._pieces(update):
            self._average(v, xp.multiply(g, g, out=work), alpha, work)
            square = v
            if m is not None:
                self._average(m, g, alpha, work)
                xp.subtract(v, xp.multiply(m, m, out=work), out=work)
                square = xp.maximum(work, 0, out=work)
            xp.add(xp.sqrt(square, out=work), eps, out=work)
            step = xp.divide(g, work, out=work)
            if u is not None:
                step = xp.add(xp.multiply(u, momentum, out=u), step, out=u)
            self._descend(w, step, lr, work)
        update.state.advance(update.loss)

    def lion(self, update: Update, *, beta1: float, beta2: float) -> None:
        """One step of Lion; the slot is m.

        `value` goes down by `lr * sign(beta1 m + (1 - beta1) g)`, then
        `m = beta2 m + (1 - beta2) g`.
        """
        xp, space = self.xp, self._space(update.value, update.value.dtype)
        for w, g, (m,), work, lr in self._pieces(update):
            step = space[:, : w.shape[1]]
            xp.multiply(m, beta1, out=step)
            xp.add(step, xp.multiply(g, 1 - beta1, out=work), out=work)
            self._descend(w, xp.sign(work, out=step), lr, work)  # in place NumPy's is slower
            self._average(m, g, beta2, work)
        update.state.advance(update.loss)

    def _average(self, mean: Array, term: Array, beta: float, work: Array) -> None:
        """`mean = beta * mean + (1 - beta) * term`; the term may be in `work`."""
        xp = self.xp
        xp.multiply(mean, beta, out=mean)
        xp.multiply(term, 1 - beta, out=work)
        xp.add(mean, work, out=mean)

    def _descend(self, value: Array, step: Array, lr: float, work: Array) -> None:
        """`value -= lr * step`; the step may be in `work`."""
        self.xp.multiply(step, lr, out=work)
        self.xp.subtract(value, work, out=value)

    def _pieces(self, update: Update) -> Iterator[tuple[Array, Array, list[Array], Array, float]]:
        """`pieces` of an update, those left out that are frozen, ready for an optimizer's rule.

        Yields:
            `(value, g, slots, work, lr)`: the value shrunk; the gradient scaled and decayed, not in
            place; the slots, each may be None; memory of their shape; the piece's learning rate.
        """
        xp, (value, grad, slots, groups, state, _, scale, decay, shrink) = self.xp, update
        rate = state.rate
        space = self._space(value, value.dtype)
        ready = space if scale is None and not decay else self._space(value, value.dtype)
        there = [slot for slot in slots if slot is not None]
        for (w, g, *views), lr_scale, decay_scale in self.pieces(groups, value, grad, *there):
            if lr_scale == 0:
                continue  # 0 * NaN would change it
            lr, n = rate * lr_scale, w.shape[1]
            work = space[:, :n]
            if scale is not None:
                g = xp.multiply(g, scale[:, None], out=ready[:, :n])
            if shrink * decay_scale:
                xp.multiply(w, 1 - lr * shrink * decay_scale, out=w)
            if decay * decay_scale:  # 0 * inf must not reach the gradient
                g = xp.add(g, xp.multiply(w, decay * decay_scale, out=work), out=ready[:, :n])
            rest = iter(views)
            yield w, g, [None if slot is None else next(rest) for slot in slots], work, lr

    def pieces(
        self, groups: Groups | None, *arrays: Array
    ) -> Iterator[tuple[tuple[Array, ...], float, float]]:
        """Views of flat arrays `(K, P)` piece by piece, each piece of one group.

        On the host a piece is small enough to stay in the cache from one pass to the next; on a
        device, where each pass is a launch, a piece is a whole run of equal settings.

        Args:
            groups: Which elements are updated how; None for all of them alike.
            arrays: Of one shape.

        Yields:
            `(views, lr_scale, decay_scale)`.
        """
        n_models, size = arrays[0].shape
        width = self._width(n_models)
        runs = ((0, size, 1.0, 1.0),) if groups is None else groups.runs
        for start, stop, lr_scale, decay_scale in runs:
            if stop - start == size <= width:  # a small model: views take a microsecond
                yield arrays, lr_scale, decay_scale
                return
            for i in range(start, stop, width):
                cut = np.s_[:, i : min(i + width, stop)]
                yield tuple([a[cut] for a in arrays]), lr_scale, decay_scale

    def _space(self, flat: Array, dtype: Any) -> Array:
        """Memory for a piece of arrays like `flat`."""
        n_models, size = flat.shape
        return self.empty((n_models, min(size, self._width(n_models))), dtype)

    def _width(self, n_models: int) -> int:
        """Columns of a piece."""
        return max(self.piece // n_models, 1)

    # ---- data ----------------------------------------------------------------------------------

    def gather_rows(
        self, sources: Sequence[Array], state: StepState, batch_size: int, n: int
    ) -> list[Array]:
        """Rows `order[p * B : p * B + n]` of each source; p is the position, B the batch size."""
        start = state.position * batch_size
        index = state.order[start : start + n]
        batch = []
        for source in sources:
            out = self.empty((n, *source.shape[1:]), source.dtype)
            batch.append(self._take_rows(source, index, out))
        return batch

    def _take_rows(self, source: Array, index: Array, out: Array) -> Array:
        return self.xp.take(source, index, axis=0, out=out)
